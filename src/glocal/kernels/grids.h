/* Channels-last grids [images, rows, columns, channels], and how work on them is cut into tasks.

   A file that includes this defines WIDE, the channels of a block, of which BLOCK_CHANNELS are real (fewer in the last
   block), and TILE, the neighboring positions that it works on together. */

typedef struct {
    int64_t images, rows, columns, channels;
} grid;

/* What a task works on: a piece of the grid of one image, and some neighboring blocks of channels. */
typedef struct {
    int64_t image, block, blocks, row, rows, column, columns;
} piece;

/* How all of the work is cut. */
typedef struct {
    grid of;
    int64_t blocks, rows, columns, block_pieces, row_pieces, column_pieces, tasks;
} cut;

static int64_t ceiling(int64_t a, int64_t b) { return a > 0 ? (a + b - 1) / b : 0; }

/* Pieces with the cells around them, `reach` more along each axis, take about `panel_bytes`: as many blocks as leave
   room for pieces of 64 columns and rows that are worth those around them, so that memory is read in long strips. There
   are 16 tasks at least, where there are rows for them, however many threads there are: sums over pieces must not
   depend on that. */
static cut cut_grid(grid g, int64_t blocks, int64_t panel_bytes, int64_t reach_rows, int64_t reach_columns) {
    cut c = {.of = g};
    int64_t block_cells = panel_bytes / (WIDE * (int64_t)sizeof(real));
    int64_t enough = (MIN(g.rows, reach_rows + 4) + reach_rows) * (MIN(g.columns, 64) + reach_columns);
    c.block_pieces = ceiling(blocks, MAX(block_cells / MAX(enough, 1), 1));
    c.blocks = ceiling(blocks, MAX(c.block_pieces, 1));
    c.block_pieces = ceiling(blocks, MAX(c.blocks, 1));
    int64_t cells = block_cells / MAX(c.blocks, 1);
    int64_t widest = g.rows > 1 ? g.columns : 16 + 4 * reach_columns; /* a line fits the first-level cache */
    int64_t columns = MIN(MIN(g.columns, widest), MAX(cells / (MIN(g.rows, 4) + reach_rows) - reach_columns, 16));
    c.columns = ceiling(ceiling(g.columns, MAX(ceiling(g.columns, columns), 1)), TILE) * TILE;
    c.column_pieces = ceiling(g.columns, MAX(c.columns, 1));
    int64_t tasks = g.images * c.block_pieces * c.column_pieces;
    int64_t rows = MAX(cells / MAX(c.columns + reach_columns, 1) - reach_rows, 4);
    int64_t pieces = MAX(ceiling(g.rows, rows), ceiling(16, MAX(tasks, 1)));
    c.rows = ceiling(g.rows, MAX(MIN(pieces, g.rows), 1));
    c.row_pieces = ceiling(g.rows, MAX(c.rows, 1));
    c.tasks = tasks * c.row_pieces;
    return c;
}

/* Blocks of one piece follow each other: they share lines of memory. */
static piece piece_at(cut c, int64_t blocks, int64_t task) {
    piece p;
    p.block = task % c.block_pieces * c.blocks, task /= c.block_pieces;
    p.column = task % c.column_pieces * c.columns, task /= c.column_pieces;
    p.row = task % c.row_pieces * c.rows, p.image = task / c.row_pieces;
    p.blocks = MIN(c.blocks, blocks - p.block);
    p.rows = MIN(c.rows, c.of.rows - p.row), p.columns = MIN(c.columns, c.of.columns - p.column);
    return p;
}

/* The taps [first, last) of a line of `taps`, `dilation` apart, that meet one of `length` cells, the first tap
   standing at cell `start`. */
INLINE void taps_met(int64_t start, int64_t taps, int64_t dilation, int64_t length, int64_t *first, int64_t *last) {
    *first = start >= 0 ? 0 : MIN(ceiling(-start, dilation), taps);
    *last = start >= length ? 0 : MIN(taps, ceiling(length - start, dilation));
}

/* What the three operations are told, each in the same way. Weights are [images, rows, columns, groups, taps] with these
   strides, 0 for an axis that shares them; all in all there are `weights_count` of them. Offsets: the source of the
   first tap less the output. */
#define SIZES                                                                                                       \
    int64_t images, int64_t in_rows, int64_t in_columns, int64_t out_rows, int64_t out_columns, int64_t channels,   \
        int64_t group_channels, int64_t row_offset, int64_t column_offset, int64_t image_stride, int64_t row_stride, \
        int64_t column_stride, int64_t weights_count, int64_t threads
