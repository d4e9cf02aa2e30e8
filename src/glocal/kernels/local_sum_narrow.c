/* local_sum.c for weights of each position whose groups have fewer channels, D, than a vector has lanes: here the lanes
   hold neighboring taps of one row of the kernel, since w is read in that order and far more often than x.

   Panels are planes, [channels, rows, columns], so that sources of neighboring taps are neighbors too. A row of KW taps
   is CHUNKS vectors; lanes of the last one beyond TAIL hold what belongs to other taps and are dropped at the end.

   The build defines KH, KW, DILATION, D and one of SUM, TRANSPOSED, PRODUCTS. */

#include "common.h"

#define TAPS (KH * KW)
#define REACH_ROWS ((KH - 1) * DILATION)
#define REACH_COLUMNS ((KW - 1) * DILATION)
#define CHUNKS ((KW + LANES - 1) / LANES)
#define TAIL (KW - (CHUNKS - 1) * LANES)
#define WIDE D
#define TILE 4 /* positions that use the planes of a group while they are in the first-level cache */

#include "grids.h"

/* The first TAIL lanes of the one and the others of the other. */
INLINE vec first_of(vec a, vec b) {
#if LANES == 8
    const ivec lane = {0, 1, 2, 3, 4, 5, 6, 7};
#else
    const ivec lane = {0, 1, 2, 3};
#endif
    const ivec ours = lane < TAIL;
    return (vec)(((ivec)a & ours) | ((ivec)b & ~ours));
}

/* Sources of neighboring taps; with a dilation they are not neighbors in a panel. */
INLINE vec sources(const real *plane, int chunk) {
#if DILATION == 1
    return load(plane + chunk * LANES);
#else
    vec v = {0};
    for (int lane = 0; lane < LANES; lane++)
        if (chunk * LANES + lane < KW) v[lane] = plane[(chunk * LANES + lane) * DILATION];
    return v;
#endif
}

/* Copies cells [row, row + rows) x [column, column + columns) of the channels from `channel` on to planes `pitch`
   apart from row to row and `next` apart, zeros where there are none and in the rest of a row. */
static void fill_planes(real *planes, int64_t next, int64_t pitch, const scalar *x, grid g, int64_t image,
                        int64_t channel, int64_t channels, int64_t row, int64_t rows, int64_t column,
                        int64_t columns) {
    int64_t first = MIN(MAX(-column, 0), columns), last = MAX(MIN(g.columns - column, columns), first);
    for (int64_t r = 0; r < rows; r++, planes += pitch) {
        int64_t from_row = row + r;
        int inside = from_row >= 0 && from_row < g.rows;
        for (int64_t c = 0; c < channels; c++) {
            real *to = planes + c * next;
            memset(to, 0, (inside ? first : pitch) * sizeof(real));
            if (inside) memset(to + last, 0, (pitch - last) * sizeof(real));
        }
        if (!inside) continue;
        const scalar *cells = x + ((image * g.rows + from_row) * g.columns + column) * g.channels + channel;
        for (int64_t j = first; j < last; j += LANES)
            for (int64_t c = 0; c < channels; c += LANES) {
                if (j + LANES <= last && c + LANES <= channels) {
                    vec square[LANES];
                    for (int n = 0; n < LANES; n++) square[n] = load_widened(cells + (j + n) * g.channels + c);
                    transpose_square(square);
                    for (int n = 0; n < LANES; n++) store(planes + (c + n) * next + j, square[n]);
                } else {
                    for (int64_t n = j; n < MIN(j + LANES, last); n++)
                        for (int64_t m = c; m < MIN(c + LANES, channels); m++)
                            planes[m * next + n] = widened(cells[n * g.channels + m]);
                }
            }
    }
}

/* Weights [taps] and what is read behind them: the very last ones of all are copied, as memory may end there. */
typedef struct {
    const scalar *end;
    scalar copy[TAPS + LANES];
} last_weights;

INLINE const scalar *weights_at(const scalar *w, last_weights *last) {
    if (w + TAPS + LANES <= last->end) return w;
    memcpy(last->copy, w, TAPS * sizeof(scalar));
    return last->copy;
}

/* Fetches the weights of the next tile: the processor does not guess these strips. */
INLINE void prefetch(const scalar *w, int64_t column_stride) {
    for (int64_t byte = 0; byte < TAPS * (int64_t)sizeof(scalar); byte += 64)
        __builtin_prefetch((const char *)(w + TILE * column_stride) + byte, 0, 2);
}

#if defined(SUM)

/* One position's sums for the D channels of a group, their lanes still to be added. */
INLINE void sum_group(vec *sums, const scalar *of, int64_t column_stride, const real *plane, int64_t next,
                      int64_t pitch, int64_t from, int64_t to) {
    vec whole[D] = {0}, part[D] = {0};
    prefetch(of, column_stride);
    of += from * KW, plane += from * DILATION * pitch;
#pragma GCC unroll 1 /* else it keeps a pointer for each row and channel, more than there are registers */
    for (int64_t r = from; r < to; r++, of += KW, plane += DILATION * pitch) {
#pragma GCC unroll 4
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            vec a = load_widened(of + chunk * LANES);
            for (int d = 0; d < D; d++) {
                vec b = sources(plane + d * next, chunk);
                if (chunk < CHUNKS - 1) whole[d] += a * b;
                else part[d] += a * b;
            }
        }
    }
    for (int d = 0; d < D; d++) sums[d] = whole[d] + first_of(part[d], (vec){0});
}

/* y from x and w; without bias. Returns 1 if there is no memory. */
int local_sum(const scalar *x, const scalar *w, scalar *y, const scalar *bias, SIZES) {
    grid in = {images, in_rows, in_columns, channels}, out = {images, out_rows, out_columns, channels};
    int64_t groups = channels / D;
    cut c = cut_grid(out, groups, 1 << 19, REACH_ROWS, REACH_COLUMNS + LANES);
    int64_t pitch = c.columns + REACH_COLUMNS + LANES, next = (c.rows + REACH_ROWS) * pitch;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        real *planes = malloc(c.blocks * D * next * sizeof(real));
        last_weights last = {.end = w + weights_count, .copy = {0}};
        if (!planes) failed = 1;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < c.tasks; task++) {
            if (!planes) continue;
            piece p = piece_at(c, groups, task);
            fill_planes(planes, next, pitch, x, in, p.image, p.block * D, p.blocks * D, p.row + row_offset,
                        c.rows + REACH_ROWS, p.column + column_offset, c.columns + REACH_COLUMNS);
            for (int64_t i = 0; i < p.rows; i++) {
                int64_t from, to;
                taps_met(p.row + i + row_offset, KH, DILATION, in.rows, &from, &to);
                for (int64_t j = 0; j < p.columns; j += TILE) {
                    int64_t places = MIN(TILE, p.columns - j);
                    const scalar *here = w + p.image * image_stride + (p.row + i) * row_stride +
                                         (p.column + j) * column_stride;
                    scalar *cells = y + ((p.image * out.rows + p.row + i) * out.columns + p.column + j) * channels;
                    for (int64_t g = 0; g < p.blocks; g += LANES) { /* LANES groups have D vectors of channels */
                        int64_t some = MIN(LANES, p.blocks - g);
                        vec sums[TILE][LANES * D];
                        for (int64_t n = 0; n < some; n++)
                            for (int64_t q = 0; q < places; q++)
                                sum_group(sums[q] + n * D,
                                          weights_at(here + q * column_stride + (p.block + g + n) * TAPS, &last),
                                          column_stride, planes + (g + n) * D * next + i * pitch + j + q, next, pitch,
                                          from, to);
                        for (int64_t q = 0; q < places; q++) {
                            for (int64_t n = some * D; n < LANES * D; n++) sums[q][n] = (vec){0};
                            for (int v = 0; v < D; v++) {
                                vec results = sums_of(sums[q] + v * LANES);
                                int64_t left = some * D - v * LANES;
                                scalar *put = cells + q * channels + (p.block + g) * D + v * LANES;
                                if (left >= LANES) {
                                    store_narrowed(put, results);
                                } else {
                                    real all[LANES];
                                    store(all, results);
                                    narrow(put, all, MAX(left, 0));
                                }
                            }
                        }
                    }
                }
            }
        }
        free(planes);
    }
    return failed;
}

#elif defined(TRANSPOSED)

/* Adds what one position sends to the planes of a group, on which its first tap stands. */
INLINE void send_group(real *plane, int64_t next, int64_t pitch, const scalar *y, const scalar *of,
                       int64_t column_stride, int64_t from, int64_t to) {
    vec sent[D];
    for (int d = 0; d < D; d++) sent[d] = splat(widened(y[d]));
    prefetch(of, column_stride);
    of += from * KW, plane += from * DILATION * pitch;
#pragma GCC unroll 1
    for (int64_t r = from; r < to; r++, of += KW, plane += DILATION * pitch)
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            vec a = load_widened(of + chunk * LANES);
            for (int d = 0; d < D; d++) {
                real *at = plane + d * next;
#if DILATION == 1
                vec old = load(at + chunk * LANES), more = old + a * sent[d];
                store(at + chunk * LANES, chunk < CHUNKS - 1 ? more : first_of(more, old));
#else
                vec more = a * sent[d];
                for (int lane = 0; lane < LANES; lane++)
                    if (chunk * LANES + lane < KW) at[(chunk * LANES + lane) * DILATION] += more[lane];
#endif
            }
        }
}

/* x from y and w, each task a piece of x: positions of y that reach it send what it gets. Returns 1 without memory. */
int local_sum_transposed(const scalar *y, const scalar *w, scalar *x, SIZES) {
    grid in = {images, in_rows, in_columns, channels}, out = {images, out_rows, out_columns, channels};
    int64_t groups = channels / D;
    cut c = cut_grid(in, groups, 1 << 19, 0, 2 * REACH_COLUMNS + LANES);
    int64_t pitch = c.columns + 2 * REACH_COLUMNS + LANES, next = c.rows * pitch;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        real *planes = malloc(c.blocks * D * next * sizeof(real));
        last_weights last = {.end = w + weights_count, .copy = {0}};
        if (!planes) failed = 1;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < c.tasks; task++) {
            if (!planes) continue;
            piece p = piece_at(c, groups, task);
            memset(planes, 0, c.blocks * D * next * sizeof(real));
            int64_t left = p.column - column_offset - REACH_COLUMNS;
            int64_t start = MAX(left, 0), stop = MIN(left + c.columns + REACH_COLUMNS, out.columns);
            int64_t top = MAX(p.row - row_offset - REACH_ROWS, 0);
            int64_t bottom = MIN(p.row + p.rows - row_offset, out.rows);
            for (int64_t i = top; i < bottom; i++) {
                int64_t from, to, at_row = i + row_offset - p.row;
                taps_met(at_row, KH, DILATION, p.rows, &from, &to);
                for (int64_t j = start; j < stop; j += TILE)
                    for (int64_t g = 0; g < p.blocks; g++)
                        for (int64_t q = j; q < MIN(j + TILE, stop); q++) {
                            const scalar *at = w + p.image * image_stride + i * row_stride + q * column_stride;
                            send_group(planes + g * D * next + at_row * pitch + q - left, next, pitch,
                                       y + ((p.image * out.rows + i) * out.columns + q) * channels + (p.block + g) * D,
                                       weights_at(at + (p.block + g) * TAPS, &last), column_stride, from, to);
                        }
            }
            for (int64_t i = 0; i < p.rows; i++)
                for (int64_t j = 0; j < p.columns; j++) {
                    scalar *to = x + ((p.image * in.rows + p.row + i) * in.columns + p.column + j) * channels +
                                 p.block * D;
                    const real *from = planes + i * pitch + REACH_COLUMNS + j;
                    for (int64_t n = 0; n < p.blocks * D; n++) to[n] = narrowed(from[n * next]);
                }
        }
        free(planes);
    }
    return failed;
}

#else

/* One position's products for a group. What is written beyond a row of taps is written over by the next. */
INLINE void multiply_group(real *products, const real *plane, int64_t next, int64_t pitch, const scalar *y) {
    vec of[D];
    for (int d = 0; d < D; d++) of[d] = splat(widened(y[d]));
#pragma GCC unroll 1
    for (int r = 0; r < KH; r++, plane += DILATION * pitch, products += KW)
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            vec sum = {0};
            for (int d = 0; d < D; d++) sum += of[d] * sources(plane + d * next, chunk);
            store(products + chunk * LANES, sum);
        }
}

/* w from x and y: inner products of a group's channels. Returns 1 if there is no memory. */
int local_sum_products(const scalar *x, const scalar *y, scalar *w, SIZES) {
    grid in = {images, in_rows, in_columns, channels}, out = {images, out_rows, out_columns, channels};
    int64_t groups = channels / D;
    cut c = cut_grid(out, groups, 1 << 19, REACH_ROWS, REACH_COLUMNS + LANES);
    int64_t pitch = c.columns + REACH_COLUMNS + LANES, next = (c.rows + REACH_ROWS) * pitch;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        real *planes = malloc(c.blocks * D * next * sizeof(real));
        real *products = malloc(TILE * (c.blocks * TAPS + LANES) * sizeof(real));
        if (!planes || !products) failed = 1;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < c.tasks; task++) {
            if (!planes || !products) continue;
            piece p = piece_at(c, groups, task);
            fill_planes(planes, next, pitch, x, in, p.image, p.block * D, p.blocks * D, p.row + row_offset,
                        c.rows + REACH_ROWS, p.column + column_offset, c.columns + REACH_COLUMNS);
            for (int64_t i = 0; i < p.rows; i++)
                for (int64_t j = 0; j < p.columns; j += TILE) {
                    int64_t place = (p.image * out.rows + p.row + i) * out.columns + p.column + j;
                    int64_t places = MIN(TILE, p.columns - j);
                    for (int64_t g = 0; g < p.blocks; g++)
                        for (int64_t q = 0; q < places; q++)
                            multiply_group(products + q * (p.blocks * TAPS + LANES) + g * TAPS,
                                           planes + g * D * next + i * pitch + j + q, next, pitch,
                                           y + (place + q) * channels + (p.block + g) * D);
                    for (int64_t q = 0; q < places; q++)
                        narrow(w + ((place + q) * groups + p.block) * TAPS, products + q * (p.blocks * TAPS + LANES),
                               p.blocks * TAPS);
                }
        }
        free(planes);
        free(products);
    }
    return failed;
}

#endif
