/* Attention inside the windows of a grid, read and written in place. */

#include "common.h"
#include "windows.h"

static void attend(workspace *w, const problem *p, const scalar *qkv, const real *bias, scalar *out) {
    const int64_t channels = p->channels, width = p->width, columns = p->head_row;
    const int64_t n = w->now.n, row = w->now.row, *token = w->now.token, *query = w->now.query;
    const int64_t *soon = w->next.token;
    real *v = w->k;
    gather(w->q, qkv, token, &w->now, p, 1 / sqrt(width));
    gather(w->k, qkv + channels, token, &w->now, p, 1);
    transpose(w->k_columns, row, w->k, columns, row, columns);
    gather(v, qkv + 2 * channels, token, &w->now, p, 1);
    for (int64_t first = 0, asked = 0; first < n; first += BLOCK) {
        int64_t rows = MIN(BLOCK, n - first), end = (first + rows) * w->next.n / n;
        real sums[BLOCK];
        ask(qkv, soon, asked, end, width, 0);
        product(w->scores, row, w->q + first * columns, columns, 1, w->k_columns, row, rows, row, width);
        ask(qkv + channels, soon, asked, end, width, 0);
        weigh(w->scores, bias + first * row, rows, row, sums);
        ask(qkv + 2 * channels, soon, asked, end, width, 0);
        product(w->block, columns, w->scores, row, 1, v, columns, rows, columns, n);
        ask(out, w->next.query, asked, end, width, 1);
        for (int64_t i = 0; i < rows; i++)
            if (query[first + i] >= 0) put(out + query[first + i], w->block + i * columns, width, 1 / sums[i]);
        asked = end;
    }
}

/* Returns 1 if there is no memory. */
int window_attention(const scalar *qkv, const scalar *table, const int64_t *extents, const int64_t *shape,
                     scalar *out, int64_t threads) {
    const problem p = problem_of(shape, extents);
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        workspace w = workspace_of(&p, 0);
        if (!complete(&w)) failed = 1;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < p.chunks * p.groups; task++) {
            if (failed) continue;
            int64_t head, heads, part, parts;
            begin(&w, &p, table, task, &head, &heads, &part, &parts);
            for (int64_t t = 0; t < parts; t++) {
                advance(&w, &p, part + t, t + 1 < parts);
                const real *bias = bias_of(&w, &p);
                for (int64_t i = 0; i < heads; i++)
                    attend(&w, &p, qkv + (head + i) * p.width, bias + i * p.places * p.row, out + (head + i) * p.width);
            }
        }
        release(&w);
    }
    return failed;
}
