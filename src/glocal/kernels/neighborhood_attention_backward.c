/* The gradients of neighborhood attention in one pass over the tokens.

   It owns tiles of keys and goes over all queries that see them, also those of other tiles, so that nothing is added
   by two tasks: some products at its margin are made twice, which costs less than to share them. */

#include "common.h"
#include "neighborhoods.h"

#define COEFFICIENTS 4096 /* of a run of queries: they stay in the nearest cache */

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
int neighborhood_attention_backward(const Call *c, const scalar *q, const scalar *k, const scalar *v, const real *bias,
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
