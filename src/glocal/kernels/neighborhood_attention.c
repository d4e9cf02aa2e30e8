/* Neighborhood attention in one pass over the tokens. */

#include "common.h"
#include "neighborhoods.h"

#if defined(FLOAT64)
#define LOG log
#else
#define LOG logf
#endif
#define QUERIES 8 /* of a row, taken through the stages together */

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

/* Returns 1 if there is no memory. */
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
