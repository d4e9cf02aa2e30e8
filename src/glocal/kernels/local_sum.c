/* Sums over the taps of a kernel at every position of a grid, and their gradients: the depthwise family.

       y[b, i, c] = sum over t of w[b, i, g(c), t] * x[b, i + offset + DILATION * t, c]      zeros outside

   on channels-last grids, with channels in the lanes of vectors. SUM is this; TRANSPOSED carries y back to x; PRODUCTS
   carries x and y to w. Where weights are the same at all positions (SHARED), each channel of a vector has its own, and
   the transposed sum is a sum with the taps reversed. Where they are not, a vector lies within one group, of D channels;
   local_sum_narrow.c has those groups that are narrower.

   The part of x that a task needs is copied into panels, [rows, columns, WIDE] for each block of channels, with zeros
   around it, so that no inner loop meets a border. Panels stay in the second-level cache.

   The build defines KH, KW, DILATION, D unless SHARED, and one of SUM, TRANSPOSED, PRODUCTS. */

#include "common.h"

#define TAPS (KH * KW)
#define REACH_ROWS ((KH - 1) * DILATION)
#define REACH_COLUMNS ((KW - 1) * DILATION)

/* VECS vectors of channels at TILE positions: eight sums or so, which 16 registers hold. */
#if defined(SHARED)
#define VECS 1
#elif defined(PRODUCTS)
#define VECS ((D + LANES - 1) / LANES)
#else
#define VECS MIN((D + LANES - 1) / LANES, 4)
#endif
#if defined(TRANSPOSED)
#define TILE 4
#elif defined(PRODUCTS)
#define TILE 1
#else
#define TILE (8 / VECS)
#endif
#define WIDE (VECS * LANES)

#include "grids.h"

/* Where a weight stands in [images, rows, columns, groups, taps], 0 for an axis that shares it. */
typedef struct {
    int64_t image, row, column;
} strides;

/* The channels of a block; at.group is that of their weights. */
typedef struct {
    int64_t group, channel, channels;
} block;

static int64_t count_blocks(int64_t channels) {
#if defined(SHARED)
    return ceiling(channels, WIDE);
#else
    return channels / D * ceiling(D, WIDE);
#endif
}

INLINE block block_at(int64_t number, int64_t channels) {
#if defined(SHARED)
    return (block){0, number * WIDE, MIN(WIDE, channels - number * WIDE)};
#else
    int64_t parts = ceiling(D, WIDE), part = number % parts, group = number / parts;
    return (block){group, group * D + part * WIDE, MIN(WIDE, D - part * WIDE)};
#endif
}

INLINE void widen_block(real *to, const scalar *from) {
    for (int v = 0; v < VECS; v++) store(to + v * LANES, load_widened(from + v * LANES));
}

/* Copies cells [row, row + rows) x [column, column + columns) of the piece's blocks to panels `next` numbers apart. */
static void fill_panels(real *panels, int64_t next, const scalar *x, grid g, piece p, int64_t row, int64_t rows,
                        int64_t column, int64_t columns) {
    int64_t first = MIN(MAX(-column, 0), columns), last = MAX(MIN(g.columns - column, columns), first);
    for (int64_t r = 0; r < rows; r++, panels += columns * WIDE) {
        int64_t from_row = row + r;
        int inside = from_row >= 0 && from_row < g.rows;
        for (int64_t b = 0; b < p.blocks; b++) {
            real *to = panels + b * next;
            memset(to, 0, (inside ? first : columns) * WIDE * sizeof(real));
            if (inside) memset(to + last * WIDE, 0, (columns - last) * WIDE * sizeof(real));
        }
        if (!inside) continue;
        block begin = block_at(p.block, g.channels), end = block_at(p.block + p.blocks - 1, g.channels);
        const scalar *cell = x + ((p.image * g.rows + from_row) * g.columns + column + first) * g.channels;
        if (end.channel + end.channels - begin.channel == p.blocks * WIDE) { /* all full: one behind the other */
            for (int64_t j = first; j < last; j++, cell += g.channels)
                for (int64_t b = 0; b < p.blocks; b++)
                    widen_block(panels + b * next + j * WIDE, cell + begin.channel + b * WIDE);
            continue;
        }
        for (int64_t j = first; j < last; j++, cell += g.channels)
            for (int64_t b = 0; b < p.blocks; b++) {
                block at = block_at(p.block + b, g.channels);
                real *to = panels + b * next + j * WIDE;
                widen(to, cell + at.channel, at.channels);
                memset(to + at.channels, 0, (WIDE - at.channels) * sizeof(real));
            }
    }
}

/* Writes the channels of one cell's block. */
INLINE void put(scalar *to, const vec *from, int64_t channels) {
    if (channels == WIDE) {
        for (int v = 0; v < VECS; v++) store_narrowed(to + v * LANES, from[v]);
    } else {
        real all[WIDE];
        for (int v = 0; v < VECS; v++) store(all + v * LANES, from[v]);
        narrow(to, all, channels);
    }
}

#if defined(SHARED)

typedef real weights; /* [taps + 1, WIDE], the bias behind the taps */

/* Weights [groups, taps] of one image, and the bias, for each channel of a block. */
static void expand_weights(real *to, const scalar *w, const scalar *bias, block at, int64_t group_channels) {
    for (int c = 0; c < WIDE; c++) {
        int64_t channel = at.channel + MIN(c, at.channels - 1);
        const scalar *from = w + channel / group_channels * TAPS;
        for (int t = 0; t < TAPS; t++) to[t * WIDE + c] = widened(from[t]);
        to[TAPS * WIDE + c] = bias ? widened(bias[channel]) : 0;
    }
}

INLINE vec weight(const weights *of, int i, int64_t t, int v) { return load(of + t * WIDE + v * LANES); }

#else

typedef const scalar *weights; /* of each position of a tile: [taps] */

/* Those of TILE positions of a row, `ahead` of which the next tile's are fetched: the processor does not guess these. */
INLINE void take_weights(weights *of, const scalar *row, strides s, int64_t group, int64_t column, int64_t columns) {
    for (int i = 0; i < TILE; i++) {
        of[i] = row + MIN(column + i, columns - 1) * s.column + group * TAPS; /* the last once more is never stored */
        for (int64_t byte = 0; byte < TAPS * (int64_t)sizeof(scalar); byte += 64)
            __builtin_prefetch((const char *)(of[i] + 4 * TILE * s.column) + byte, 0, 1);
    }
}

INLINE vec weight(const weights *of, int i, int64_t t, int v) { return splat(widened(of[i][t])); }

#endif

#if defined(SUM)

/* TILE sums whose first source stands at `panel`; only kernel rows [first, last). Each source is loaded once for all
   the sums that it enters. */
INLINE void sum_tile(vec sums[TILE][VECS], const real *panel, int64_t pitch, const weights *of, int64_t first,
                     int64_t last) {
    for (int i = 0; i < TILE; i++)
        for (int v = 0; v < VECS; v++) {
#if defined(SHARED)
            sums[i][v] = load(of + TAPS * WIDE + v * LANES);
#else
            sums[i][v] = (vec){0};
#endif
        }
    for (int64_t r = first; r < last; r++) {
        const real *row = panel + r * DILATION * pitch;
#if DILATION == 1
#pragma GCC unroll 64
        for (int m = 0; m < KW + TILE - 1; m++) {
            vec source[VECS];
            for (int v = 0; v < VECS; v++) source[v] = load(row + m * WIDE + v * LANES);
#pragma GCC unroll 8
            for (int i = 0; i < TILE; i++)
                if (m - i >= 0 && m - i < KW)
                    for (int v = 0; v < VECS; v++) sums[i][v] += weight(of, i, r * KW + m - i, v) * source[v];
        }
#else
#pragma GCC unroll 4
        for (int k = 0; k < KW; k++)
            for (int i = 0; i < TILE; i++)
                for (int v = 0; v < VECS; v++)
                    sums[i][v] += weight(of, i, r * KW + k, v) * load(row + (i + k * DILATION) * WIDE + v * LANES);
#endif
    }
}

/* y from x, w and, where weights are shared, the bias or null. Returns 1 if there is no memory. */
int local_sum(const scalar *x, const scalar *w, scalar *y, const scalar *bias, SIZES) {
    grid in = {images, in_rows, in_columns, channels}, out = {images, out_rows, out_columns, channels};
    strides s = {image_stride, row_stride, column_stride};
    int64_t blocks = count_blocks(channels);
#if defined(SHARED)
    cut c = cut_grid(out, blocks, 1 << 18, REACH_ROWS, REACH_COLUMNS);
#else
    cut c = cut_grid(out, blocks, 1 << 19, REACH_ROWS, REACH_COLUMNS);
#endif
    int64_t panel_rows = c.rows + REACH_ROWS, panel_columns = c.columns + REACH_COLUMNS;
    int64_t pitch = panel_columns * WIDE, next = panel_rows * pitch;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        real *panels = malloc((c.blocks * next + (TAPS + 1) * WIDE) * sizeof(real));
        if (!panels) failed = 1;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < c.tasks; task++) {
            if (!panels) continue;
            piece p = piece_at(c, blocks, task);
            const scalar *of_image = w + p.image * s.image;
            fill_panels(panels, next, x, in, p, p.row + row_offset, panel_rows, p.column + column_offset,
                        panel_columns);
#if defined(SHARED)
            for (int64_t b = 0; b < p.blocks; b++) {
                block at = block_at(p.block + b, channels);
                real *of = panels + c.blocks * next;
                expand_weights(of, of_image, bias, at, group_channels);
                for (int64_t i = 0; i < p.rows; i++) {
                    int64_t first, last;
                    taps_met(p.row + i + row_offset, KH, DILATION, in.rows, &first, &last);
                    for (int64_t j = 0; j < p.columns; j += TILE) {
#else
            for (int64_t i = 0; i < p.rows; i++) {
                int64_t first, last;
                taps_met(p.row + i + row_offset, KH, DILATION, in.rows, &first, &last);
                for (int64_t j = 0; j < p.columns; j += TILE) {
                    for (int64_t b = 0; b < p.blocks; b++) { /* innermost: w is read in order */
                        block at = block_at(p.block + b, channels);
                        weights of[TILE];
                        take_weights(of, of_image + (p.row + i) * s.row, s, at.group, p.column + j, out.columns);
#endif
                        vec sums[TILE][VECS];
                        sum_tile(sums, panels + b * next + i * pitch + j * WIDE, pitch, of, first, last);
                        scalar *to = y + ((p.image * out.rows + p.row + i) * out.columns + p.column + j) * channels;
                        if (p.columns - j >= TILE && at.channels == WIDE) { /* known lengths: sums stay in registers */
                            for (int n = 0; n < TILE; n++) put(to + n * channels + at.channel, sums[n], WIDE);
                        } else {
                            for (int64_t n = 0; n < MIN(TILE, p.columns - j); n++)
                                put(to + n * channels + at.channel, sums[n], at.channels);
                        }
                    }
                }
            }
        }
        free(panels);
    }
    return failed;
}

#elif defined(TRANSPOSED)

#define TOGETHER MIN(KW, 8) /* neighboring taps whose sums are held in registers */

/* Adds what `count` neighboring positions y [count, WIDE] send to a panel, on which their first tap stands. */
INLINE void send(real *panel, int64_t pitch, const real *y, const weights *of, int64_t first, int64_t last, int count) {
    for (int v = 0; v < VECS; v++) {
        vec sent[TILE];
        for (int i = 0; i < count; i++) sent[i] = load(y + i * WIDE + v * LANES);
        for (int64_t r = first; r < last; r++) {
            real *row = panel + r * DILATION * pitch + v * LANES;
#if DILATION == 1
#pragma GCC unroll 4
            for (int k = 0; k < KW; k += TOGETHER) {
                int taps = MIN(TOGETHER, KW - k);
                vec sums[TOGETHER + TILE - 1];
#pragma GCC unroll 16
                for (int m = 0; m < taps + count - 1; m++) sums[m] = load(row + (k + m) * WIDE);
#pragma GCC unroll 4
                for (int i = 0; i < count; i++)
#pragma GCC unroll 8
                    for (int t = 0; t < taps; t++) sums[i + t] += weight(of, i, r * KW + k + t, v) * sent[i];
#pragma GCC unroll 16
                for (int m = 0; m < taps + count - 1; m++) store(row + (k + m) * WIDE, sums[m]);
            }
#else
            for (int k = 0; k < KW; k++)
                for (int i = 0; i < count; i++) {
                    real *to = row + (i + k * DILATION) * WIDE;
                    store(to, load(to) + weight(of, i, r * KW + k, v) * sent[i]);
                }
#endif
        }
    }
}

/* x from y and w, each task a piece of x: positions of y that reach it send what it gets. Returns 1 without memory. */
int local_sum_transposed(const scalar *y, const scalar *w, scalar *x, SIZES) {
    grid in = {images, in_rows, in_columns, channels}, out = {images, out_rows, out_columns, channels};
    strides s = {image_stride, row_stride, column_stride};
    int64_t blocks = count_blocks(channels);
    cut c = cut_grid(in, blocks, 1 << 19, 0, 2 * REACH_COLUMNS);
    int64_t pitch = (c.columns + 2 * REACH_COLUMNS) * WIDE, next = c.rows * pitch;
    int64_t reaching = c.columns + REACH_COLUMNS; /* positions of a row of y that send something */
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        real *panels = malloc(c.blocks * (next + reaching * WIDE) * sizeof(real));
        if (!panels) failed = 1;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < c.tasks; task++) {
            if (!panels) continue;
            piece p = piece_at(c, blocks, task);
            real *line = panels + c.blocks * next;
            memset(panels, 0, c.blocks * next * sizeof(real));
            int64_t left = p.column - column_offset - REACH_COLUMNS;
            int64_t start = MAX(left, 0), stop = MIN(left + reaching, out.columns);
            int64_t top = MAX(p.row - row_offset - REACH_ROWS, 0);
            int64_t bottom = MIN(p.row + p.rows - row_offset, out.rows);
            for (int64_t i = top; i < bottom && start < stop; i++) {
                int64_t first, last, at_row = i + row_offset - p.row;
                taps_met(at_row, KH, DILATION, p.rows, &first, &last);
                if (first >= last) continue;
                fill_panels(line, reaching * WIDE, y, out, p, i, 1, start, stop - start);
                for (int64_t j = start; j < stop; j += TILE)
                    for (int64_t b = 0; b < p.blocks; b++) {
                        block at = block_at(p.block + b, channels);
                        weights of[TILE];
                        take_weights(of, w + p.image * s.image + i * s.row, s, at.group, j, out.columns);
                        real *panel = panels + b * next + at_row * pitch + (j - left) * WIDE;
                        const real *from = line + b * reaching * WIDE + (j - start) * WIDE;
                        if (stop - j >= TILE)
                            send(panel, pitch, from, of, first, last, TILE);
                        else
                            for (int n = 0; n < stop - j; n++)
                                send(panel + n * WIDE, pitch, from + n * WIDE, of + n, first, last, 1);
                    }
            }
            for (int64_t i = 0; i < p.rows; i++)
                for (int64_t j = 0; j < p.columns; j++)
                    for (int64_t b = 0; b < p.blocks; b++) {
                        block at = block_at(p.block + b, channels);
                        scalar *to = x + ((p.image * in.rows + p.row + i) * in.columns + p.column + j) * channels;
                        const real *from = panels + b * next + i * pitch + (REACH_COLUMNS + j) * WIDE;
                        vec all[VECS];
                        for (int v = 0; v < VECS; v++) all[v] = load(from + v * LANES);
                        put(to + at.channel, all, at.channels);
                    }
        }
        free(panels);
    }
    return failed;
}

#elif defined(SHARED)

/* As many sums at once as registers hold, since each waits for the last product that was added to it: taps of a part of
   a row or, where rows are short, of several. */
#define MOST 14
#define PARTS ((KW + MOST - 1) / MOST)
#define ROWS MIN(KH, MAX(MOST / KW, 1))

/* sums[r][t] += y[j] * x[j + DILATION * t] over lines of `rows` neighboring rows r of x, for `count` neighboring taps. */
INLINE void multiply(real *sums, const real *x, int64_t pitch, const real *y, int64_t columns, int rows, int count) {
    vec held[ROWS][MOST];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 16
        for (int t = 0; t < count; t++) held[r][t] = load(sums + (r * KW + t) * WIDE);
    for (int64_t j = 0; j < columns; j++) {
        vec of = load(y + j * WIDE);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 16
            for (int t = 0; t < count; t++)
                held[r][t] += of * load(x + r * DILATION * pitch + (j + t * DILATION) * WIDE);
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 16
        for (int t = 0; t < count; t++) store(sums + (r * KW + t) * WIDE, held[r][t]);
}

/* The same for all taps of `rows` rows, in parts that differ by one tap at most. */
INLINE void multiply_rows(real *sums, const real *x, int64_t pitch, const real *y, int64_t columns, int rows) {
    for (int part = 0, k = 0; part < PARTS; part++) {
        int end = KW * (part + 1) / PARTS;
        const real *from = x + k * DILATION * WIDE;
        if (end - k == KW / PARTS) multiply(sums + k * WIDE, from, pitch, y, columns, rows, KW / PARTS);
        else multiply(sums + k * WIDE, from, pitch, y, columns, rows, (KW + PARTS - 1) / PARTS);
        k = end;
    }
}

/* w from x and y, for weights shared by positions: sums over the pieces of each slot, then over slots, then over the
   channels of a group, always in this order. Returns 1 without memory. */
int local_sum_products(const scalar *x, const scalar *y, scalar *w, SIZES) {
    grid in = {images, in_rows, in_columns, channels}, out = {images, out_rows, out_columns, channels};
    int64_t blocks = count_blocks(channels), groups = channels / group_channels;
    cut c = cut_grid(out, blocks, 1 << 18, REACH_ROWS, REACH_COLUMNS);
    int64_t panel_rows = c.rows + REACH_ROWS, panel_columns = c.columns + REACH_COLUMNS;
    int64_t pitch = panel_columns * WIDE, next = panel_rows * pitch;
    int64_t of_image = c.row_pieces * c.column_pieces, all = images * of_image;
    int64_t kernels = image_stride ? images : 1, slots = MIN(image_stride ? of_image : all, 16);
    int64_t slot_size = TAPS * WIDE, total = kernels * slots * blocks;
    real *sums = calloc(MAX(total * slot_size, 1), sizeof(real));
    if (!sums) return 1;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        real *panels = malloc(c.blocks * (next + c.columns * WIDE) * sizeof(real));
        if (!panels) failed = 1;
#pragma omp for schedule(dynamic)
        for (int64_t job = 0; job < kernels * slots * c.block_pieces; job++) {
            if (!panels) continue;
            int64_t slot = job / c.block_pieces, kernel = slot / slots, number = slot % slots;
            int64_t count = image_stride ? of_image : all, begin = kernel * of_image;
            int64_t from = begin + count * number / slots, to = begin + count * (number + 1) / slots;
            for (int64_t place = from; place < to; place++) {
                piece p = piece_at(c, blocks, place * c.block_pieces + job % c.block_pieces);
                real *lines = panels + c.blocks * next;
                fill_panels(panels, next, x, in, p, p.row + row_offset, panel_rows, p.column + column_offset,
                            panel_columns);
                for (int64_t i = 0; i < p.rows; i++) {
                    int64_t first, last;
                    taps_met(p.row + i + row_offset, KH, DILATION, in.rows, &first, &last);
                    fill_panels(lines, c.columns * WIDE, y, out, p, p.row + i, 1, p.column, p.columns);
                    for (int64_t b = 0; b < p.blocks; b++) {
                        real *of = sums + (slot * blocks + p.block + b) * slot_size;
                        const real *panel = panels + b * next + i * pitch, *line = lines + b * c.columns * WIDE;
                        int64_t r = first;
                        for (; r + ROWS <= last; r += ROWS)
                            multiply_rows(of + r * KW * WIDE, panel + r * DILATION * pitch, pitch, line, p.columns,
                                          ROWS);
                        for (; r < last; r++)
                            multiply_rows(of + r * KW * WIDE, panel + r * DILATION * pitch, pitch, line, p.columns, 1);
                    }
                }
            }
        }
        free(panels);
#pragma omp for
        for (int64_t job = 0; job < kernels * groups; job++) {
            int64_t kernel = job / groups, group = job % groups;
            for (int t = 0; t < TAPS; t++) {
                real sum = 0;
                for (int64_t channel = group * group_channels; channel < (group + 1) * group_channels; channel++)
                    for (int64_t slot = kernel * slots; slot < (kernel + 1) * slots; slot++)
                        sum += sums[(slot * blocks + channel / WIDE) * slot_size + t * WIDE + channel % WIDE];
                w[job * TAPS + t] = narrowed(sum);
            }
        }
    }
    free(sums);
    return failed;
}

#else

/* w from x and y, for weights of each position: inner products of its group's channels. Returns 1 without memory. */
int local_sum_products(const scalar *x, const scalar *y, scalar *w, SIZES) {
    grid in = {images, in_rows, in_columns, channels}, out = {images, out_rows, out_columns, channels};
    int64_t blocks = count_blocks(channels);
    cut c = cut_grid(out, blocks, 1 << 19, REACH_ROWS, REACH_COLUMNS);
    int64_t panel_rows = c.rows + REACH_ROWS, panel_columns = c.columns + REACH_COLUMNS;
    int64_t pitch = panel_columns * WIDE, next = panel_rows * pitch;
    int64_t offsets[(TAPS + LANES - 1) / LANES * LANES];
    for (int64_t t = 0; t < (int64_t)(sizeof offsets / sizeof *offsets); t++) {
        int64_t tap = MIN(t, TAPS - 1); /* the last again fills the last vector */
        offsets[t] = tap / KW * DILATION * pitch + tap % KW * DILATION * WIDE;
    }
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        real *panels = malloc(c.blocks * (next + c.columns * WIDE) * sizeof(real));
        if (!panels) failed = 1;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < c.tasks; task++) {
            if (!panels) continue;
            piece p = piece_at(c, blocks, task);
            real *lines = panels + c.blocks * next;
            fill_panels(panels, next, x, in, p, p.row + row_offset, panel_rows, p.column + column_offset,
                        panel_columns);
            for (int64_t i = 0; i < p.rows; i++) {
                fill_panels(lines, c.columns * WIDE, y, out, p, p.row + i, 1, p.column, p.columns);
                for (int64_t j = 0; j < p.columns; j++)
                    for (int64_t b = 0; b < p.blocks; b++) {
                        const real *from = panels + b * next + i * pitch + j * WIDE;
                        const real *line = lines + (b * c.columns + j) * WIDE;
                        real products[TAPS + LANES];
                        for (int t = 0; t < TAPS; t += LANES) {
                            vec sums[LANES] = {0};
                            for (int v = 0; v < VECS; v++) {
                                vec of = load(line + v * LANES);
                                for (int n = 0; n < LANES; n++)
                                    sums[n] += of * load(from + offsets[t + n] + v * LANES);
                            }
                            store(products + t, sums_of(sums));
                        }
                        int64_t cell = (p.image * out.rows + p.row + i) * out.columns + p.column + j;
                        narrow(w + (cell * blocks + p.block + b) * TAPS, products, TAPS);
                    }
            }
        }
        free(panels);
    }
    return failed;
}

#endif
