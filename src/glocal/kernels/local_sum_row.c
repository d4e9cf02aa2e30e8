/* The sums of local_sum.c along sequences, with weights of each position for groups of whole vectors of channels.

   A source enters few sums here, and to copy it to a panel would take as long as they do: everything is read where it
   is. Sources outside are met only at the ends of a sequence, and skipped there.

   The build defines KW, 15 at most, D, a multiple of LANES, and one of SUM, TRANSPOSED, PRODUCTS. */

#include "common.h"

/* VECS vectors of channels at TILE positions: eight sums or so, which 16 registers hold. */
#define VECS (D / LANES % 4 == 0 ? 4 : D / LANES % 3 == 0 ? 3 : D / LANES % 2 == 0 ? 2 : 1)
#define WIDE (VECS * LANES)
#if defined(PRODUCTS)
#define TILE MIN(MAX(12 / KW, 1), 8)
#else
#define TILE (8 / VECS)
#endif
#define PIECE 64 /* positions of a task */

#include "grids.h"

#if !defined(PRODUCTS)

/* TILE sums at positions from `j` on, whose sources stand from `start` on, `length` there are. Each is loaded once for
   all the sums that it enters; `inside`: none of them is missing. */
INLINE void sum_tile(vec sums[TILE][VECS], const scalar *from, int64_t pitch, int64_t length, int64_t start,
                     const scalar *w, int64_t w_pitch, int64_t j, int64_t count, int inside) {
    for (int i = 0; i < TILE; i++)
        for (int v = 0; v < VECS; v++) sums[i][v] = (vec){0};
#pragma GCC unroll 72
    for (int m = 0; m < KW + TILE - 1; m++) {
        int64_t place = start + m;
        if (!inside && (place < 0 || place >= length)) continue;
        vec source[VECS];
        for (int v = 0; v < VECS; v++) source[v] = load_widened(from + place * pitch + v * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < TILE; i++)
            if (m - i >= 0 && m - i < KW && (inside || i < count)) {
#if defined(SUM)
                scalar weight = w[(j + i) * w_pitch + m - i];
#else
                scalar weight = w[place * w_pitch + KW - 1 - (m - i)];
#endif
                for (int v = 0; v < VECS; v++) sums[i][v] += splat(widened(weight)) * source[v];
            }
    }
}

/* Sums over `in` [images, in_length, channels] at each position of `out`; `offset`: of the first source. */
static void sum_pieces(const scalar *in, int64_t in_length, const scalar *w, int64_t image_stride, scalar *out,
                       int64_t out_length, int64_t offset, int64_t images, int64_t channels, int64_t threads) {
    int64_t pieces = ceiling(out_length, PIECE), groups = channels / D, w_pitch = groups * KW;
#pragma omp parallel for num_threads(threads)
    for (int64_t task = 0; task < images * pieces; task++) {
        int64_t image = task / pieces, begin = task % pieces * PIECE, end = MIN(begin + PIECE, out_length);
        const scalar *of_image = w + image * image_stride;
        for (int64_t j = begin; j < end; j += TILE) {
            int64_t count = MIN(TILE, end - j), start = j + offset;
            int inside = count == TILE && start >= 0 && start + KW + TILE - 1 <= in_length;
            for (int64_t channel = 0; channel < channels; channel += WIDE) {
                const scalar *from = in + image * in_length * channels + channel, *of = of_image + channel / D * KW;
                scalar *to = out + (image * out_length + j) * channels + channel;
                vec sums[TILE][VECS];
                if (inside) {
                    sum_tile(sums, from, channels, in_length, start, of, w_pitch, j, TILE, 1);
                    for (int i = 0; i < TILE; i++)
                        for (int v = 0; v < VECS; v++) store_narrowed(to + i * channels + v * LANES, sums[i][v]);
                } else {
                    sum_tile(sums, from, channels, in_length, start, of, w_pitch, j, count, 0);
                    for (int i = 0; i < count; i++)
                        for (int v = 0; v < VECS; v++) store_narrowed(to + i * channels + v * LANES, sums[i][v]);
                }
            }
        }
    }
}

#if defined(SUM)
/* y from x and w. */
int local_sum(const scalar *x, const scalar *w, scalar *y, const scalar *bias, SIZES) {
    sum_pieces(x, in_columns, w, image_stride, y, out_columns, column_offset, images, channels, threads);
    return 0;
}
#else
/* x from y and w: each source gathers what the positions that it enters send. */
int local_sum_transposed(const scalar *y, const scalar *w, scalar *x, SIZES) {
    sum_pieces(y, out_columns, w, image_stride, x, in_columns, -column_offset - (KW - 1), images, channels, threads);
    return 0;
}
#endif

#else

#define HELD ((TILE * KW + LANES - 1) / LANES * LANES)

/* Inner products of y [TILE, D] with the sources of their taps, the first of which stands at `start`. */
INLINE void multiply(real *products, const scalar *x, int64_t pitch, int64_t length, int64_t start, const scalar *y,
                     int64_t count, int inside) {
    vec sums[HELD] = {0};
    for (int v = 0; v < D / LANES; v++) {
        vec of[TILE];
#pragma GCC unroll 8
        for (int i = 0; i < TILE; i++)
            if (inside || i < count) of[i] = load_widened(y + i * pitch + v * LANES);
#pragma GCC unroll 24
        for (int m = 0; m < KW + TILE - 1; m++) {
            int64_t place = start + m;
            if (!inside && (place < 0 || place >= length)) continue;
            vec source = load_widened(x + place * pitch + v * LANES);
#pragma GCC unroll 8
            for (int i = 0; i < TILE; i++)
                if (m - i >= 0 && m - i < KW && (inside || i < count)) sums[i * KW + m - i] += of[i] * source;
        }
    }
#pragma GCC unroll 4
    for (int n = 0; n < HELD; n += LANES) store(products + n, sums_of(sums + n));
}

/* w from x and y. */
int local_sum_products(const scalar *x, const scalar *y, scalar *w, SIZES) {
    int64_t pieces = ceiling(out_columns, PIECE), groups = channels / D;
#pragma omp parallel for num_threads(threads)
    for (int64_t task = 0; task < images * pieces; task++) {
        int64_t image = task / pieces, begin = task % pieces * PIECE, end = MIN(begin + PIECE, out_columns);
        for (int64_t j = begin; j < end; j += TILE) {
            int64_t count = MIN(TILE, end - j), start = j + column_offset;
            int inside = count == TILE && start >= 0 && start + KW + TILE - 1 <= in_columns;
            for (int64_t group = 0; group < groups; group++) {
                const scalar *from = x + image * in_columns * channels + group * D;
                const scalar *line = y + (image * out_columns + j) * channels + group * D;
                scalar *to = w + ((image * out_columns + j) * groups + group) * KW;
                real products[HELD];
                if (inside) multiply(products, from, channels, in_columns, start, line, TILE, 1);
                else multiply(products, from, channels, in_columns, start, line, count, 0);
                for (int i = 0; i < count; i++) narrow(to + i * groups * KW, products + i * KW, KW);
            }
        }
    }
    return 0;
}

#endif
