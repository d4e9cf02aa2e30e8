/* Neighborhood attention in one pass over the tokens, and its gradients in another.

   Tokens i with the same i % dilation along both axes form a class, an image of its own in which the neighborhood is
   a block without gaps; all coordinates below are those within a class. A task is a tile of a class, for one image
   and head. It copies the keys and values that its queries see into panels of reals, zero outside the grid, so that
   a query's neighbors lie at the same distances from the first for all queries of a row, and inner loops test no
   borders: what is not seen has the score -inf from the bias line (bias_line).

   The backward pass owns tiles of keys. It goes over all queries that see them, also those of other tiles, so that
   nothing is added by two tasks: some products at its margin are made twice, which costs less than to share them.

   DIM and VALUE_DIM are the channels of a head. FORWARD or BACKWARD is defined. */

#include "common.h"

#define NOINLINE static __attribute__((noinline))
#define PADDED(n) (((n) + LANES - 1) / LANES * LANES)
#define DK PADDED(DIM)
#define DV PADDED(VALUE_DIM)
#if defined(FLOAT64)
#define LOG log
#else
#define LOG logf
#endif
#define QUERIES 8            /* of a row, taken through the stages of the forward pass together */
#define AHEAD 8              /* tokens that are asked for before they are copied */
#define COEFFICIENTS 4096    /* of a run of queries in the backward pass: they stay in the nearest cache */

typedef struct {
    int64_t batch, heads, rows, cols;  /* of the sources; a sequence is one row */
    int64_t past;                      /* sources in front of the first query, along the row */
    int64_t kh, kw, dh, dw;            /* kernel and dilation */
    int64_t causal, shifted;
    int64_t tile_area, tile_width, jobs;
    int64_t q[4], k[4], v[4], g[4];    /* strides: image, row, column, head; g: gradient of the output */
} Call;

/* One axis of a class. */
typedef struct {
    int64_t n, end, queries;  /* tokens, tokens that are real, the first that is a query */
    int64_t kernel, before;   /* neighbors, those in front of the query */
    int shifted;
} Axis;

typedef struct {
    int64_t image, head, row, col;  /* the class is that of this token */
    int64_t y0, y1, x0, x1;         /* the tile */
    Axis y, x;
} Task;

typedef struct {
    int64_t y0, x0, rows, cols;
    real *k, *v, *seen;  /* seen: 0, or -inf where a token is not real; null where all are */
    int32_t *k_places, *v_places;
} Panel;

/* What the scores of a query have added, and whose it is. */
typedef struct {
    int64_t entry_y, from_y, to_y, entry_x, from_x, to_x;
    int64_t until;  /* the queries of the row before this one share it */
    real *bias, *grad;
} Line;

INLINE int64_t start_of(const Axis *a, int64_t i) {
    if (!a->shifted) return i - a->before;
    return MAX(MIN(i - a->before, a->end - a->kernel), 0);
}

/* First query whose neighborhood ends behind m, and one behind the last whose neighborhood begins by m. */
static int64_t first_seeing(const Axis *a, int64_t m) {
    int64_t low = a->queries, high = a->n;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (start_of(a, middle) + a->kernel > m) high = middle;
        else low = middle + 1;
    }
    return low;
}

static int64_t behind_seeing(const Axis *a, int64_t m) {
    int64_t low = a->queries, high = a->n;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (start_of(a, middle) > m) high = middle;
        else low = middle + 1;
    }
    return low;
}

static Axis axis_of(int64_t length, int64_t extent, int64_t past, int64_t first, int64_t dilation, int64_t kernel,
                    const Call *c) {
    Axis a;
    a.n = MAX(length - first + dilation - 1, 0) / dilation;
    a.end = c->shifted ? MIN(a.n, MAX(extent - first + dilation - 1, 0) / dilation) : a.n;
    a.queries = MIN(a.n, MAX(past - first + dilation - 1, 0) / dilation);
    a.kernel = kernel;
    a.before = c->causal ? kernel - 1 : kernel / 2;
    a.shifted = (int)c->shifted;
    return a;
}

/* Tiles of the largest class, all of one size but the last. */
static void tile_size(const Call *c, int64_t *height, int64_t *width) {
    int64_t h = (c->rows + c->dh - 1) / c->dh, w = (c->cols + c->dw - 1) / c->dw;
    int64_t across = MAX(1, (w + MAX(c->tile_width, c->tile_area / h) - 1) / MAX(c->tile_width, c->tile_area / h));
    *width = (w + across - 1) / across;
    int64_t most = MAX(1, c->tile_area / *width);
    int64_t down = MAX(1, (h + most - 1) / most);
    *height = (h + down - 1) / down;
}

static int64_t tasks_per_head(const Call *c) {
    int64_t height, width, h = (c->rows + c->dh - 1) / c->dh, w = (c->cols + c->dw - 1) / c->dw;
    tile_size(c, &height, &width);
    return c->batch * MIN(c->dh, c->rows) * MIN(c->dw, c->cols) * ((h + height - 1) / height) *
           ((w + width - 1) / width);
}

static Task task_of(const Call *c, const int64_t *extents, int64_t head, int64_t index) {
    Task t;
    int64_t height, width, h = (c->rows + c->dh - 1) / c->dh, w = (c->cols + c->dw - 1) / c->dw;
    tile_size(c, &height, &width);
    int64_t down = (h + height - 1) / height, across = (w + width - 1) / width;
    t.head = head;
    t.x0 = index % across * width, index /= across;
    t.y0 = index % down * height, index /= down;
    t.col = index % MIN(c->dw, c->cols), index /= MIN(c->dw, c->cols);
    t.row = index % MIN(c->dh, c->rows), t.image = index / MIN(c->dh, c->rows);
    int64_t extent_y = extents ? extents[2 * t.image] : c->rows;
    int64_t extent_x = extents ? extents[2 * t.image + 1] : c->cols;
    t.y = axis_of(c->rows, extent_y, 0, t.row, c->dh, c->kh, c);
    t.x = axis_of(c->cols, extent_x, c->past, t.col, c->dw, c->kw, c);
    t.y1 = MIN(t.y0 + height, t.y.n), t.x1 = MIN(t.x0 + width, t.x.n);
    return t;
}

/* Memory of one thread, which grows. */
typedef struct {
    char *start;
    size_t size;
} Memory;

static real *reserve(Memory *m, size_t reals) {
    if (reals * sizeof(real) > m->size) {
        free(m->start);
        m->size = (reals * sizeof(real) + 63) / 64 * 64;
        m->start = aligned_alloc(64, m->size);
        if (!m->start) m->size = 0;
    }
    return (real *)m->start;
}

INLINE void prefetch(const scalar *from, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / sizeof(scalar)) __builtin_prefetch(from + i);
}

INLINE void copy_row(real *restrict to, const scalar *restrict from, int64_t count, int64_t padded, real scale) {
    for (int64_t i = 0; i < count; i++) to[i] = widened(from[i]) * scale;
    for (int64_t i = count; i < padded; i++) to[i] = 0;
}

NOINLINE void fill(const Call *c, const Task *t, Panel *p, const scalar *k, const scalar *v, const uint8_t *valid) {
    int64_t from = MIN(MAX(-p->x0, 0), p->cols), to = MAX(MIN(p->cols, t->x.end - p->x0), from);
    for (int64_t r = 0; r < p->rows; r++) {
        int64_t y = p->y0 + r, row = t->row + c->dh * y, first = t->col + c->dw * (p->x0 + from);
        int64_t left = y >= 0 && y < t->y.end ? from : p->cols, right = y >= 0 && y < t->y.end ? to : p->cols;
        real *to_k = p->k + r * p->cols * DK, *to_v = p->v + r * p->cols * DV;
        real *seen = valid ? p->seen + r * p->cols : 0;
        const scalar *one_k = k + t->image * c->k[0] + row * c->k[1] + first * c->k[2] + t->head * c->k[3];
        const scalar *one_v = v + t->image * c->v[0] + row * c->v[1] + first * c->v[2] + t->head * c->v[3];
        const uint8_t *real_token = valid ? valid + (t->image * c->rows + row) * c->cols + first : 0;
        memset(to_k, 0, left * DK * sizeof(real));
        memset(to_v, 0, left * DV * sizeof(real));
        for (int64_t i = left; i < right; i++) {
            int64_t ahead = MIN(AHEAD, right - 1 - i) * c->dw;
            prefetch(one_k + ahead * c->k[2], DIM);
            prefetch(one_v + ahead * c->v[2], VALUE_DIM);
            copy_row(to_k + i * DK, one_k, DIM, DK, 1);
            copy_row(to_v + i * DV, one_v, VALUE_DIM, DV, 1);
            one_k += c->dw * c->k[2], one_v += c->dw * c->v[2];
        }
        memset(to_k + right * DK, 0, (p->cols - right) * DK * sizeof(real));
        memset(to_v + right * DV, 0, (p->cols - right) * DV * sizeof(real));
        for (int64_t i = 0; valid && i < p->cols; i++) {
            seen[i] = i >= left && i < right && real_token[(i - left) * c->dw] ? 0 : -INFINITY;
            if (seen[i] == 0 || i < left || i >= right) continue;
            memset(to_k + i * DK, 0, DK * sizeof(real));
            memset(to_v + i * DV, 0, DV * sizeof(real));
        }
    }
}

/* How far the keys and values of a query's slots lie behind those of its first neighbor's column. A row outside the
   panel is not seen, or not wanted: another one stands for it. */
NOINLINE void slot_places(const Panel *p, int64_t start, int64_t kh, int64_t kw, int64_t slots) {
    int64_t t = 0;
    for (int64_t r = 0; r < kh; r++) {
        int64_t row = MIN(MAX(start + r - p->y0, 0), p->rows - 1) * p->cols;
        for (int64_t i = 0; i < kw; i++, t++) {
            p->k_places[t] = (int32_t)((row + i) * DK);
            p->v_places[t] = (int32_t)((row + i) * DV);
        }
    }
    for (; t < slots; t++) p->k_places[t] = p->k_places[0], p->v_places[t] = p->v_places[0];
}

/* Sums up what a line's queries, of one row, gave to the bias, and begins anew. */
NOINLINE void flush(const Call *c, Line *line, double *table) {
    if (!line->grad || !table) return;
    int64_t high = 2 * c->kh - 2, wide = 2 * c->kw - 2;
    for (int64_t r = line->from_y; r < line->to_y; r++) {
        double *row = table + MIN(MAX(line->entry_y + r, 0), high) * (wide + 1);
        const real *grad = line->grad + r * c->kw;
        for (int64_t i = line->from_x; i < line->to_x; i++) row[MIN(MAX(line->entry_x + i, 0), wide)] += grad[i];
    }
    memset(line->grad, 0, c->kh * c->kw * sizeof(real));
}

/* The bias of a query at (y, x), -inf where a slot is outside the grid; neighboring queries mostly share it. */
NOINLINE void bias_line(const Call *c, const Task *t, Line *line, int64_t y, int64_t x, int64_t slots, const real *bias,
                      double *table) {
    int64_t sy = start_of(&t->y, y), sx = start_of(&t->x, x);
    int64_t from_y = MAX(-sy, 0), to_y = MAX(MIN(c->kh, t->y.end - sy), 0);
    int64_t from_x = MAX(-sx, 0), to_x = MAX(MIN(c->kw, t->x.end - sx), 0);
    int64_t entry_y = c->kh - 1 + sy - y, entry_x = c->kw - 1 + sx - x;
    int whole = sx == x - t->x.before && from_x == 0 && to_x == c->kw;
    line->until = whole ? t->x.end - c->kw + t->x.before + 1 : x + 1;
    if (line->entry_y == entry_y && line->from_y == from_y && line->to_y == to_y && line->entry_x == entry_x &&
        line->from_x == from_x && line->to_x == to_x)
        return;
    flush(c, line, table);
    line->entry_y = entry_y, line->from_y = from_y, line->to_y = to_y;
    line->entry_x = entry_x, line->from_x = from_x, line->to_x = to_x;
    for (int64_t s = 0; s < slots; s++) line->bias[s] = -INFINITY;
    int64_t high = 2 * c->kh - 2, wide = 2 * c->kw - 2;
    for (int64_t r = from_y; r < to_y; r++) {
        const real *row = bias ? bias + MIN(MAX(entry_y + r, 0), high) * (wide + 1) : 0;
        real *to = line->bias + r * c->kw;
        for (int64_t i = from_x; i < to_x; i++) to[i] = row ? row[MIN(MAX(entry_x + i, 0), wide)] : 0;
    }
}

static void no_line(Line *line) {
    line->entry_y = line->entry_x = INT64_MIN;
    line->from_y = line->to_y = line->from_x = line->to_x = 0;
}

/* Adds -inf where the token of a slot is not real. */
NOINLINE void hide(real *scores, const real *seen, const int32_t *k_places, int64_t slots) {
    for (int64_t s = 0; s < slots; s++) scores[s] += seen[k_places[s] / DK];
}

/* Products of one row with LANES rows of a panel. */
INLINE vec dots(const real *row, const real *panel, const int32_t *places, const int width) {
    vec sums[LANES], x = load(row);
    const real *from[LANES];
#pragma GCC unroll 8
    for (int j = 0; j < LANES; j++) {
        from[j] = panel + places[j];
        __asm__("" : "+r"(from[j]));  /* one register each, instead of two that the compiler runs out of */
        sums[j] = x * load(from[j]);
    }
    for (int d = LANES; d < width; d += LANES) {
        x = load(row + d);
#pragma GCC unroll 8
        for (int j = 0; j < LANES; j++) sums[j] += x * load(from[j] + d);
    }
    return sums_of(sums);
}

INLINE real dot(const real *a, const real *b, const int width) {
    vec sum = load(a) * load(b);
    for (int d = LANES; d < width; d += LANES) sum += load(a + d) * load(b + d);
    return sum_lanes(sum);
}

/* The product with one row in the first lane, 0 in the others: odd kernels leave one slot over. */
INLINE vec lone_dot(const real *row, const real *panel, const int32_t *places, const int width) {
    vec only = {dot(row, panel + places[0], width)};
    return only;
}

/* to[0..width) = scale * sum over slots of w[slot] * the panel's row. `chains` sums are kept apart, since one alone
   would wait for itself. */
INLINE void weighted_part(real *to, const real *w, const real *panel, const int32_t *places, int64_t slots, real scale,
                          const int count, const int chains) {
    vec sums[12] = {{0}};
    int64_t s = 0;
    for (; s + chains <= slots; s += chains) {
#pragma GCC unroll 8
        for (int j = 0; j < chains; j++) {
            const real *from = panel + places[s + j];
#pragma GCC unroll 8
            for (int i = 0; i < count; i++) sums[j * count + i] += w[s + j] * load(from + i * LANES);
        }
    }
    for (; s < slots; s++) {
        const real *from = panel + places[s];
#pragma GCC unroll 8
        for (int i = 0; i < count; i++) sums[i] += w[s] * load(from + i * LANES);
    }
#pragma GCC unroll 8
    for (int j = 1; j < chains; j++) {
#pragma GCC unroll 8
        for (int i = 0; i < count; i++) sums[i] += sums[j * count + i];
    }
#pragma GCC unroll 8
    for (int i = 0; i < count; i++) store(to + i * LANES, sums[i] * scale);
}

#define CHAINS(count) ((count) >= 7 ? 1 : (count) >= 4 ? 2 : (count) == 3 ? 3 : (count) == 2 ? 4 : 8)

INLINE void weighted(real *to, const real *w, const real *panel, const int32_t *places, int64_t slots, real scale,
                     const int width) {
    const int whole = width / (8 * LANES) * 8 * LANES, rest = (width - whole) / LANES;
    for (int d = 0; d < whole; d += 8 * LANES) weighted_part(to + d, w, panel + d, places, slots, scale, 8, 1);
    if (rest) weighted_part(to + whole, w, panel + whole, places, slots, scale, rest, CHAINS(rest));
}

static size_t take(size_t *used, int64_t reals) {
    size_t at = *used;
    *used += (size_t)(reals + 15) / 16 * 16;
    return at;
}

#if defined(FORWARD)

/* The stages of the forward pass. Functions of their own: together they would need more registers than there are. */
NOINLINE void scores_of(real *to, const real *query, const real *keys, const int32_t *places, const real *bias,
                        int64_t slots) {
    int64_t s = 0;
    for (; s + 1 < slots; s += LANES) store(to + s, dots(query, keys, places + s, DK) + load(bias + s));
    if (s < slots) store(to + s, lone_dot(query, keys, places + s, DK) + load(bias + s));
}

NOINLINE void mix(real *to, const real *w, const real *values, const int32_t *places, int64_t slots, real scale) {
    weighted(to, w, values, places, slots, scale, DV);
}

/* p: scores of some queries to weights, not yet divided by their sums, which are 0 where nothing is seen. Query by
   query in each step, so that they do not wait for each other. */
NOINLINE void soften(real *p, int64_t padded, int64_t queries, real *most, real *sum) {
    for (int64_t j = 0; j < queries; j++) {
        vec high = load(p + j * padded);
        for (int64_t s = LANES; s < padded; s += LANES) high = max_vec(high, load(p + j * padded + s));
        most[j] = max_lanes(high);
    }
    for (int64_t j = 0; j < queries; j++) {
        real top = most[j] == -INFINITY ? 0 : most[j];
        vec total = {0};
        for (int64_t s = 0; s < padded; s += LANES) {
            vec e = exp_vec(load(p + j * padded + s) - top);
            store(p + j * padded + s, e);
            total += e;
        }
        sum[j] = sum_lanes(total);
    }
}

static int forward_tile(const Call *c, const Task *t, Memory *memory, const scalar *q, const scalar *k, const scalar *v,
                        const real *bias, const uint8_t *valid, scalar *out, real *lse, double scale) {
    int64_t x0 = MAX(t->x0, t->x.queries), x1 = t->x1, slots = c->kh * c->kw, padded = PADDED(slots);
    if (x0 >= x1 || t->y0 >= t->y1) return 0;
    Panel p;
    p.y0 = MAX(start_of(&t->y, t->y0), 0);
    p.rows = MAX(MIN(start_of(&t->y, t->y1 - 1) + c->kh, t->y.end) - p.y0, 1);
    p.x0 = start_of(&t->x, x0);
    p.cols = start_of(&t->x, x1 - 1) + c->kw - p.x0;
    size_t used = 0, keys = take(&used, p.rows * p.cols * DK), values = take(&used, p.rows * p.cols * DV);
    size_t seen = take(&used, valid ? p.rows * p.cols : 0), places = take(&used, 2 * padded);
    size_t line_at = take(&used, padded), query = take(&used, QUERIES * DK);
    size_t weights = take(&used, QUERIES * padded), row_at = take(&used, DV);
    real *base = reserve(memory, used);
    if (!base) return 1;
    p.k = base + keys, p.v = base + values, p.seen = valid ? base + seen : 0;
    p.k_places = (int32_t *)(base + places), p.v_places = p.k_places + padded;
    Line line;
    no_line(&line), line.bias = base + line_at, line.grad = 0;
    fill(c, t, &p, k, v, valid);
    int64_t queries = c->rows * (c->cols - c->past);
    for (int64_t y = t->y0; y < t->y1; y++) {
        int64_t row = t->row + c->dh * y;
        slot_places(&p, start_of(&t->y, y), c->kh, c->kw, padded);
        line.until = INT64_MIN;
        for (int64_t x = x0; x < x1; x += QUERIES) {
            int64_t count = MIN(QUERIES, x1 - x);
            real most[QUERIES], sum[QUERIES];
            for (int64_t j = 0; j < count; j++) {
                int64_t col = t->col + c->dw * (x + j) - c->past, first = start_of(&t->x, x + j) - p.x0;
                real *one = base + query + j * DK, *w = base + weights + j * padded;
                const scalar *from = q + t->image * c->q[0] + row * c->q[1] + col * c->q[2] + t->head * c->q[3];
                prefetch(from + MIN(AHEAD, x1 - 1 - x - j) * c->dw * c->q[2], DIM);
                copy_row(one, from, DIM, DK, (real)scale);
                if (x + j >= line.until) bias_line(c, t, &line, y, x + j, padded, bias, 0);
                scores_of(w, one, p.k + first * DK, p.k_places, line.bias, slots);
                if (p.seen) hide(w, p.seen + first, p.k_places, slots);
            }
            soften(base + weights, padded, count, most, sum);
            for (int64_t j = 0; j < count; j++) {
                int64_t at = t->image * queries + row * (c->cols - c->past) + t->col + c->dw * (x + j) - c->past;
                int64_t first = start_of(&t->x, x + j) - p.x0;
                real *to = base + row_at;
                mix(to, base + weights + j * padded, p.v + first * DV, p.v_places, slots, sum[j] == 0 ? 0 : 1 / sum[j]);
                narrow(out + (at * c->heads + t->head) * VALUE_DIM, to, VALUE_DIM);
                lse[at * c->heads + t->head] = sum[j] == 0 ? 0 : most[j] + LOG(sum[j]);
            }
        }
    }
    return 0;
}

int neighborhood_attention(const Call *c, const scalar *q, const scalar *k, const scalar *v, const real *bias,
                            const uint8_t *valid, const int64_t *extents, scalar *out, real *lse, double scale,
                            int64_t threads) {
    int64_t each = tasks_per_head(c), entries = (2 * c->kh - 1) * (2 * c->kw - 1);
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        Memory memory = {0};
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < each * c->heads; i++) {
            Task t = task_of(c, extents, i % c->heads, i / c->heads);
            if (forward_tile(c, &t, &memory, q, k, v, bias ? bias + t.head * entries : 0, valid, out, lse, scale))
                failed = 1;
        }
        free(memory.start);
    }
    return failed;
}

#else

/* Weights and gradients of scores, `ds`, of the slots from the multiple `from` of LANES on, of one query; row and grad
   are what it asked for and what its output's gradient is. */
NOINLINE void coefficients(real *w, real *ds, const real *row, const real *grad, const real *keys, const real *values,
                           const Panel *p, const real *seen, const real *bias, int64_t from, int64_t to, real lse,
                           real delta) {
    const int32_t *k_places = p->k_places, *v_places = p->v_places;
    int64_t s = from;
    for (; s + 1 < to; s += LANES) store(w + s, dots(row, keys, k_places + s, DK) + load(bias + s) - lse);
    if (s < to) store(w + s, lone_dot(row, keys, k_places + s, DK) + load(bias + s) - lse);
    if (seen) hide(w + from, seen, k_places + from, to - from);
    for (s = from; s + 1 < to; s += LANES) store(ds + s, dots(grad, values, v_places + s, DV) - delta);
    if (s < to) store(ds + s, lone_dot(grad, values, v_places + s, DV) - delta);
    for (s = from; s < to; s += LANES) {
        vec weight = exp_vec(load(w + s));
        store(w + s, weight), store(ds + s, weight * load(ds + s));
    }
}

NOINLINE void mix(real *to, const real *w, const real *keys, const int32_t *places, int64_t slots, real scale) {
    weighted(to, w, keys, places, slots, scale, DK);
}

/* to[i] += sum over j of w[at[j] + i * step] * rows[j] for `keys` rows i, 1 or 2, `apart` reals from each other. */
INLINE void gather_part(real *to, int64_t apart, const real *w, int64_t step, const int32_t *at, const real *rows,
                        int64_t count, const int width, const int parts, const int keys) {
    vec sums[8];
#pragma GCC unroll 2
    for (int i = 0; i < keys; i++) {
#pragma GCC unroll 8
        for (int d = 0; d < parts; d++) sums[i * parts + d] = load(to + i * apart + d * LANES);
    }
#pragma GCC unroll 2
    for (int64_t j = 0; j < count; j++) {
        const real *one = w + at[j];
#pragma GCC unroll 8
        for (int d = 0; d < parts; d++) {
            vec row = load(rows + j * width + d * LANES);
#pragma GCC unroll 2
            for (int i = 0; i < keys; i++) sums[i * parts + d] += one[i * step] * row;
        }
    }
#pragma GCC unroll 2
    for (int i = 0; i < keys; i++) {
#pragma GCC unroll 8
        for (int d = 0; d < parts; d++) store(to + i * apart + d * LANES, sums[i * parts + d]);
    }
}

INLINE void gather(real *to, int64_t apart, const real *w, int64_t step, const int32_t *at, const real *rows,
                   int64_t count, const int width, const int keys) {
    const int whole = width / (4 * LANES) * 4 * LANES, rest = (width - whole) / LANES;
    for (int d = 0; d < whole; d += 4 * LANES)
        gather_part(to + d, apart, w, step, at, rows + d, count, width, 4, keys);
    if (rest) gather_part(to + whole, apart, w, step, at, rows + whole, count, width, rest, keys);
}

/* What a run of queries gives to the keys of one row, or of two that follow each other (or to the values). */
typedef struct {
    int64_t width, keys;           /* of the tile, and those that are in the grid */
    int64_t start, count;          /* of the run */
    const int32_t *first, *behind; /* queries that see a key, counted from the first run's first */
    const int32_t *at;             /* where the coefficients of each query for a key in column 0 would be */
    int64_t step;                  /* from those for a row to those for the next */
} Run;

INLINE void gather_rows(const Run *run, real *to, const real *w, const real *rows, const int width, const int keys) {
    const Run r = *run;
    for (int64_t i = 0; i < r.keys; i++) {
        int64_t low = MAX(r.first[i] - r.start, 0), many = MIN(r.behind[i] - r.start, r.count) - low;
        if (many <= 0) continue;
        gather(to + i * width, r.width * width, w + i, r.step, r.at + low, rows + low * width, many, width, keys);
    }
}

NOINLINE void gather_keys(const Run *run, real *to, const real *w, const real *queries, int two) {
    if (two) gather_rows(run, to, w, queries, DK, 2);
    else gather_rows(run, to, w, queries, DK, 1);
}

#if DK == DV
#define gather_values gather_keys
#else
NOINLINE void gather_values(const Run *run, real *to, const real *w, const real *grads, int two) {
    if (two) gather_rows(run, to, w, grads, DV, 2);
    else gather_rows(run, to, w, grads, DV, 1);
}
#endif

typedef struct {
    const scalar *q, *k, *v, *out, *grad;
    const real *bias, *lse;
    const uint8_t *valid;
    scalar *dq, *dk, *dv;
    real scale;
} Tensors;

/* `table`: sums of the bias' gradient, or null. */
static int backward_tile(const Call *c, const Task *t, Memory *memory, const Tensors *a, const real *bias,
                         double *table) {
    int64_t height = t->y1 - t->y0, width = t->x1 - t->x0, slots = c->kh * c->kw, padded = PADDED(slots);
    if (height <= 0 || width <= 0) return 0;
    /* queries of the tile, and all those that see it */
    int64_t own_x0 = MIN(MAX(t->x0, t->x.queries), t->x1);
    int64_t qy0 = MIN(t->y0, first_seeing(&t->y, t->y0)), qy1 = MAX(t->y1, behind_seeing(&t->y, t->y1 - 1));
    int64_t qx0 = first_seeing(&t->x, t->x0), qx1 = behind_seeing(&t->x, t->x1 - 1);
    if (own_x0 < t->x1) qx0 = MIN(qx0, own_x0), qx1 = MAX(qx1, t->x1);
    Panel p;
    p.y0 = MAX(MIN(t->y0, start_of(&t->y, t->y0)), 0);
    p.rows = MAX(MAX(t->y1, MIN(start_of(&t->y, t->y1 - 1) + c->kh, t->y.end)) - p.y0, 1);
    p.x0 = qx0 < qx1 ? MIN(t->x0, start_of(&t->x, qx0)) : t->x0;
    p.cols = (qx0 < qx1 ? MAX(t->x1, start_of(&t->x, qx1 - 1) + c->kw) : t->x1) - p.x0;
    int64_t run = MAX(COEFFICIENTS / (2 * padded), 8), runs = MAX((qx1 - qx0 + run - 1) / run, 1);
    run = MAX((qx1 - qx0 + runs - 1) / runs, 1);
    size_t used = 0, keys = take(&used, p.rows * p.cols * DK), values = take(&used, p.rows * p.cols * DV);
    size_t seen = take(&used, a->valid ? p.rows * p.cols : 0), places = take(&used, 2 * padded);
    size_t line_at = take(&used, 2 * padded), dk_at = take(&used, height * width * DK);
    size_t dv_at = take(&used, height * width * DV), first_at = take(&used, width), behind_at = take(&used, width);
    size_t query_at = take(&used, run * DK), grad_at = take(&used, run * DV), pair_at = take(&used, run);
    size_t weight_at = take(&used, run * padded), score_at = take(&used, run * padded), row_at = take(&used, DK + DV);
    real *base = reserve(memory, used);
    if (!base) return 1;
    p.k = base + keys, p.v = base + values, p.seen = a->valid ? base + seen : 0;
    p.k_places = (int32_t *)(base + places), p.v_places = p.k_places + padded;
    int32_t *first = (int32_t *)(base + first_at), *behind = (int32_t *)(base + behind_at);
    int32_t *at = (int32_t *)(base + pair_at);
    real *dk = base + dk_at, *dv = base + dv_at;
    memset(dk, 0, height * width * DK * sizeof(real));
    memset(dv, 0, height * width * DV * sizeof(real));
    Line line;
    no_line(&line), line.bias = base + line_at, line.grad = line.bias + padded;
    memset(line.grad, 0, padded * sizeof(real));
    fill(c, t, &p, a->k, a->v, a->valid);
    for (int64_t i = 0; i < width; i++) {
        first[i] = (int32_t)(first_seeing(&t->x, t->x0 + i) - qx0);
        behind[i] = (int32_t)(behind_seeing(&t->x, t->x0 + i) - qx0);
    }
    int64_t queries = c->rows * (c->cols - c->past);
    for (int64_t y = qy0; y < qy1; y++) {
        int64_t row = t->row + c->dh * y, sy = start_of(&t->y, y);
        int own_row = y >= t->y0 && y < t->y1;
        int64_t from_row = MAX(t->y0 - sy, 0), to_row = MIN(MIN(t->y1, t->y.end) - sy, c->kh);
        slot_places(&p, sy, c->kh, c->kw, padded);
        line.until = INT64_MIN;
        for (int64_t start = qx0; start < qx1; start += run) {
            int64_t count = MIN(run, qx1 - start);
            for (int64_t j = 0; j < count; j++) {
                int64_t x = start + j, col = t->col + c->dw * x - c->past, sx = start_of(&t->x, x), lead = sx - p.x0;
                int own = own_row && x >= own_x0 && x < t->x1;
                int64_t from = own ? 0 : from_row * c->kw / LANES * LANES, to = own ? slots : to_row * c->kw;
                real *one = base + query_at + j * DK, *g = base + grad_at + j * DV, *o = base + row_at;
                real *w = base + weight_at + j * padded, *ds = base + score_at + j * padded;
                int64_t token = (t->image * queries + row * (c->cols - c->past) + col) * c->heads + t->head;
                at[j] = (int32_t)(j * padded - sx);
                if (from >= to) continue;
                const scalar *q = a->q + t->image * c->q[0] + row * c->q[1] + col * c->q[2] + t->head * c->q[3];
                const scalar *grad = a->grad + t->image * c->g[0] + row * c->g[1] + col * c->g[2] + t->head * c->g[3];
                int64_t ahead = MIN(AHEAD, count - 1 - j) * c->dw;
                prefetch(q + ahead * c->q[2], DIM);
                prefetch(grad + ahead * c->g[2], VALUE_DIM);
                prefetch(a->out + (token + ahead * c->heads) * VALUE_DIM, VALUE_DIM);
                copy_row(one, q, DIM, DK, a->scale);
                copy_row(g, grad, VALUE_DIM, DV, 1);
                copy_row(o, a->out + token * VALUE_DIM, VALUE_DIM, DV, 1);
                if (x >= line.until) bias_line(c, t, &line, y, x, padded, bias, table);
                coefficients(w, ds, one, g, p.k + lead * DK, p.v + lead * DV, &p, p.seen ? p.seen + lead : 0, line.bias,
                             from, to, a->lse[token], dot(o, g, DV));
                if (own) {
                    for (int64_t s = 0; table && s < padded; s += LANES)
                        store(line.grad + s, load(line.grad + s) + load(ds + s));
                    mix(o, ds, p.k + lead * DK, p.k_places, slots, a->scale);
                    narrow(a->dq + token * DIM, o, DIM);
                }
            }
            const Run r = {width, MIN(width, t->x.end - t->x0), start - qx0, count, first, behind, at, c->kw};
            for (int64_t i = from_row; i < to_row; i += 2) {
                int64_t key = (sy + i - t->y0) * width, s = i * c->kw + t->x0;
                gather_keys(&r, dk + key * DK, base + score_at + s, base + query_at, i + 1 < to_row);
                gather_values(&r, dv + key * DV, base + weight_at + s, base + grad_at, i + 1 < to_row);
            }
        }
        flush(c, &line, table);
    }
    for (int64_t y = t->y0; y < t->y1; y++) {
        for (int64_t x = t->x0; x < t->x1; x++) {
            int64_t row = t->row + c->dh * y, col = t->col + c->dw * x, i = (y - t->y0) * width + x - t->x0;
            int64_t token = ((t->image * c->rows + row) * c->cols + col) * c->heads + t->head;
            narrow(a->dk + token * DIM, dk + i * DK, DIM);
            narrow(a->dv + token * VALUE_DIM, dv + i * DV, VALUE_DIM);
        }
    }
    return 0;
}

/* Returns 1 if there is no memory. A job is a share of a head's tasks, with a table of its own for the bias: how the
   sums of its gradient are cut does not depend on the number of threads. */
int neighborhood_attention(const Call *c, const scalar *q, const scalar *k, const scalar *v, const real *bias,
                            const uint8_t *valid, const int64_t *extents, const scalar *out, const real *lse,
                            const scalar *grad, scalar *dq, scalar *dk, scalar *dv, real *dbias, double scale,
                            int64_t threads) {
    int64_t each = tasks_per_head(c), entries = (2 * c->kh - 1) * (2 * c->kw - 1), jobs = MIN(each, c->jobs);
    const Tensors a = {q, k, v, out, grad, bias, lse, valid, dq, dk, dv, (real)scale};
    double *tables = dbias ? calloc(jobs * c->heads * entries, sizeof(double)) : 0;
    int failed = 0;
    if (dbias && !tables) return 1;
#pragma omp parallel num_threads(threads)
    {
        Memory memory = {0};
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < jobs * c->heads; i++) {
            int64_t head = i % c->heads, job = i / c->heads;
            for (int64_t index = each * job / jobs; index < each * (job + 1) / jobs; index++) {
                Task t = task_of(c, extents, head, index);
                if (backward_tile(c, &t, &memory, &a, bias ? bias + head * entries : 0,
                                  dbias ? tables + i * entries : 0))
                    failed = 1;
            }
        }
        free(memory.start);
    }
    for (int64_t head = 0; dbias && head < c->heads; head++) {
        for (int64_t e = 0; e < entries; e++) {
            double sum = 0;
            for (int64_t job = 0; job < jobs; job++) sum += tables[(job * c->heads + head) * entries + e];
            dbias[head * entries + e] = (real)sum;
        }
    }
    free(tables);
    return failed;
}

#endif
