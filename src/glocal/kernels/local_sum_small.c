/* The sums of local_sum.c for kernels of three taps or fewer along an axis, the same at all positions, and channels
   that fill whole vectors: to copy a source to a panel would take as long as the few sums that it enters, so everything
   is read where it is. The taps stay in registers while a line of sources goes by.

   The build defines KH, KW and one of SUM, PRODUCTS. */

#include "common.h"

#define TAPS (KH * KW)
#define WIDE LANES
#if defined(SUM)
#define TILE 8 /* neighboring positions whose sums registers hold */
#else
#define TILE 4 /* whose factors they hold beside the taps */
#define COLUMNS 32 /* that a vector of channels is taken through at once */
#define PART 64 /* channels of a task */
#define TASKS 32 /* at least, where there are rows for them, however many threads there are */
#endif

#include "grids.h"

/* The line of sources that a row of taps meets: outside the grid one zero, over and over. */
typedef struct {
    const scalar *cells;
    int64_t pitch;
} line;

INLINE line line_at(const scalar *x, grid g, int64_t image, int64_t row, int64_t channel) {
    static const scalar zeros[LANES];
    if (row < 0 || row >= g.rows) return (line){zeros, 0};
    return (line){x + (image * g.rows + row) * g.columns * g.channels + channel, g.channels};
}

INLINE vec source_at(line of, int64_t column) { return load_widened(of.cells + column * of.pitch); }

#if defined(SUM)

/* Sums at the columns from `j` on for a vector of channels; each source is loaded once for all that it enters.
   `inside`: none is missing, and there are TILE. */
INLINE void sum_tile(scalar *y, int64_t channels, int64_t j, int64_t count, const line of[KH], int64_t in_columns,
                     int64_t offset, const real *w, int inside) {
    vec sums[TILE];
#pragma GCC unroll 8
    for (int i = 0; i < TILE; i++) sums[i] = load(w + TAPS * LANES);
#pragma GCC unroll 3
    for (int r = 0; r < KH; r++) {
        vec taps[KW];
        for (int k = 0; k < KW; k++) taps[k] = load(w + (r * KW + k) * LANES);
#pragma GCC unroll 10
        for (int m = 0; m < TILE + KW - 1; m++) {
            int64_t column = j + offset + m;
            if (!inside && (column < 0 || column >= in_columns)) continue;
            vec source = source_at(of[r], column);
#pragma GCC unroll 3
            for (int k = 0; k < KW; k++)
                if (m - k >= 0 && m - k < TILE) sums[m - k] += taps[k] * source;
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < TILE; i++)
        if (inside || i < count) store_narrowed(y + (j + i) * channels, sums[i]);
}

/* The taps, and the bias behind them, of each channel: [channels / LANES, TAPS + 1, LANES]. */
static void expand_weights(real *to, const scalar *w, const scalar *bias, int64_t channels, int64_t group_channels) {
    for (int64_t channel = 0; channel < channels; channel++) {
        real *of = to + channel / LANES * (TAPS + 1) * LANES + channel % LANES;
        for (int t = 0; t < TAPS; t++) of[t * LANES] = widened(w[channel / group_channels * TAPS + t]);
        of[TAPS * LANES] = bias ? widened(bias[channel]) : 0;
    }
}

/* y from x, w and the bias or null. Returns 1 without memory. */
int local_sum(const scalar *x, const scalar *w, scalar *y, const scalar *bias, SIZES) {
    grid in = {images, in_rows, in_columns, channels};
    int64_t kernels = image_stride ? images : 1, size = (TAPS + 1) * channels;
    real *weights = malloc(MAX(kernels * size, 1) * sizeof(real));
    if (!weights) return 1;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (int64_t kernel = 0; kernel < kernels; kernel++)
            expand_weights(weights + kernel * size, w + kernel * image_stride, bias, channels, group_channels);
#pragma omp for
        for (int64_t row = 0; row < images * out_rows; row++) {
            int64_t image = row / out_rows, i = row % out_rows;
            const real *of_image = weights + (image_stride ? image : 0) * size;
            for (int64_t j = 0; j < out_columns; j += TILE) {
                int64_t count = MIN(TILE, out_columns - j), start = j + column_offset;
                int inside = count == TILE && start >= 0 && start + TILE + KW - 1 <= in_columns;
                for (int64_t channel = 0; channel < channels; channel += LANES) {
                    line of[KH];
                    for (int r = 0; r < KH; r++) of[r] = line_at(x, in, image, i + row_offset + r, channel);
                    const real *taps = of_image + channel * (TAPS + 1);
                    scalar *to = y + row * out_columns * channels + channel;
                    if (inside) sum_tile(to, channels, j, TILE, of, in_columns, column_offset, taps, 1);
                    else sum_tile(to, channels, j, count, of, in_columns, column_offset, taps, 0);
                }
            }
        }
    }
    free(weights);
    return 0;
}

#else

/* sums[r][k] += y[j] * x[r][j + k] at TILE columns from `j` on, for a vector of channels. */
INLINE void multiply_tile(vec sums[TAPS], const scalar *y, int64_t channels, int64_t j, int64_t count,
                          const line of[KH], int64_t in_columns, int64_t offset, int inside) {
    vec by[TILE];
#pragma GCC unroll 4
    for (int i = 0; i < TILE; i++)
        if (inside || i < count) by[i] = load_widened(y + (j + i) * channels);
#pragma GCC unroll 3
    for (int r = 0; r < KH; r++)
#pragma GCC unroll 6
        for (int m = 0; m < TILE + KW - 1; m++) {
            int64_t column = j + offset + m;
            if (!inside && (column < 0 || column >= in_columns)) continue;
            vec source = source_at(of[r], column);
#pragma GCC unroll 3
            for (int k = 0; k < KW; k++)
                if (m - k >= 0 && m - k < TILE && (inside || m - k < count)) sums[r * KW + k] += by[m - k] * source;
        }
}

/* What one row of y adds to the sums of channels [first, last), [channels / LANES, TAPS, LANES]. */
static void multiply_row(real *sums, const scalar *x, const scalar *y, grid in, int64_t row, int64_t out_rows,
                         int64_t out_columns, int64_t row_offset, int64_t offset, int64_t first, int64_t last) {
    for (int64_t begin = 0; begin < out_columns; begin += COLUMNS)
        for (int64_t channel = first; channel < last; channel += LANES) {
            const scalar *from = y + row * out_columns * in.channels + channel;
            real *kept = sums + channel * TAPS;
            line of[KH];
            for (int r = 0; r < KH; r++)
                of[r] = line_at(x, in, row / out_rows, row % out_rows + row_offset + r, channel);
            vec held[TAPS];
#pragma GCC unroll 9
            for (int t = 0; t < TAPS; t++) held[t] = load(kept + t * LANES);
            for (int64_t j = begin; j < MIN(begin + COLUMNS, out_columns); j += TILE) {
                int64_t count = MIN(TILE, out_columns - j), start = j + offset;
                if (count == TILE && start >= 0 && start + TILE + KW - 1 <= in.columns)
                    multiply_tile(held, from, in.channels, j, TILE, of, in.columns, offset, 1);
                else
                    multiply_tile(held, from, in.channels, j, count, of, in.columns, offset, 0);
            }
#pragma GCC unroll 9
            for (int t = 0; t < TAPS; t++) store(kept + t * LANES, held[t]);
        }
}

/* w from x and y: sums over the rows of each slot, then over slots, then over the channels of a group, always in this
   order. Returns 1 without memory. */
int local_sum_products(const scalar *x, const scalar *y, scalar *w, SIZES) {
    grid in = {images, in_rows, in_columns, channels};
    int64_t kernels = image_stride ? images : 1, rows = images / MAX(kernels, 1) * out_rows;
    int64_t parts = ceiling(channels, PART), slots = MIN(rows, ceiling(TASKS, MAX(kernels * parts, 1)));
    int64_t size = TAPS * channels, groups = channels / group_channels;
    real *sums = calloc(MAX(kernels * slots * size, 1), sizeof(real));
    if (!sums) return 1;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (int64_t task = 0; task < kernels * slots * parts; task++) {
            int64_t slot = task / parts, first = task % parts * PART, last = MIN(first + PART, channels);
            int64_t kernel = slot / slots, number = slot % slots;
            for (int64_t n = rows * number / slots; n < rows * (number + 1) / slots; n++)
                multiply_row(sums + slot * size, x, y, in, kernel * rows + n, out_rows, out_columns, row_offset,
                             column_offset, first, last);
        }
#pragma omp for
        for (int64_t job = 0; job < kernels * groups; job++)
            for (int t = 0; t < TAPS; t++) {
                real sum = 0;
                for (int64_t c = job % groups * group_channels; c < (job % groups + 1) * group_channels; c++)
                    for (int64_t slot = job / groups * slots; slot < (job / groups + 1) * slots; slot++)
                        sum += sums[slot * size + (c / LANES * TAPS + t) * LANES + c % LANES];
                w[job * TAPS + t] = narrowed(sum);
            }
    }
    free(sums);
    return 0;
}

#endif
