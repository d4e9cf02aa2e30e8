/* The gradients of attention inside windows, written in place. */

#include "common.h"
#include "windows.h"

static void attend_backward(workspace *w, const problem *p, const scalar *grad, const scalar *qkv, const real *bias,
                            scalar *qkv_grad) {
    const int64_t channels = p->channels, width = p->width, columns = p->head_row;
    const int64_t n = w->now.n, row = w->now.row, *token = w->now.token, *soon = w->next.token;
    const real scale = 1 / sqrt(width);
    gather(w->q, qkv, token, &w->now, p, scale);
    gather(w->k, qkv + channels, token, &w->now, p, 1);
    transpose(w->k_columns, row, w->k, columns, row, columns);
    gather(w->other, qkv + 2 * channels, token, &w->now, p, 1);
    transpose(w->other_columns, row, w->other, columns, row, columns);
    gather(w->other, grad, w->now.query, &w->now, p, 1);
    for (int64_t first = 0, asked = 0; first < n; first += BLOCK) {
        int64_t rows = MIN(BLOCK, n - first), end = (first + rows) * w->next.n / n;
        real sums[BLOCK], means[BLOCK], *weights = w->scores + first * row, *grads = w->scores_grad + first * row;
        ask(qkv, soon, asked, end, width, 0);
        product(weights, row, w->q + first * columns, columns, 1, w->k_columns, row, rows, row, width);
        ask(qkv + channels, soon, asked, end, width, 0);
        ask(grad, w->next.query, asked, end, width, 0);
        weigh(weights, bias + first * row, rows, row, sums);
        ask(qkv + 2 * channels, soon, asked, end, width, 0);
        product(grads, row, w->other + first * columns, columns, 1, w->other_columns, row, rows, row, width);
        ask(qkv_grad, soon, asked, end, width, 1);
        for (int64_t i = 0; i < rows; i++) {
            vec mean = {0};
            for (int64_t j = i * row; j < (i + 1) * row; j += LANES) {
                vec weight = load(weights + j) * (1 / sums[i]);
                store(weights + j, weight);
                mean += weight * load(grads + j);
            }
            means[i] = sum_lanes(mean);
        }
        ask(qkv_grad + channels, soon, asked, end, width, 1);
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = i * row; j < (i + 1) * row; j += LANES)
                store(grads + j, load(weights + j) * (load(grads + j) - means[i]));
        product(w->block, columns, grads, row, 1, w->k, columns, rows, columns, n);
        ask(qkv_grad + 2 * channels, soon, asked, end, width, 1);
        for (int64_t i = 0; i < rows; i++) put(qkv_grad + token[first + i], w->block + i * columns, width, scale);
        asked = end;
    }
    real *found = w->k;
    product(found, columns, w->scores_grad, 1, row, w->q, columns, n, columns, n);
    for (int64_t i = 0; i < n; i++) put(qkv_grad + token[i] + channels, found + i * columns, width, 1);
    product(found, columns, w->scores, 1, row, w->other, columns, n, columns, n);
    for (int64_t i = 0; i < n; i++) put(qkv_grad + token[i] + 2 * channels, found + i * columns, width, 1);
}

/* Returns 1 if there is no memory. */
int window_attention_backward(const scalar *grad, const scalar *qkv, const scalar *table, const int64_t *extents,
                              const int64_t *shape, scalar *qkv_grad, scalar *table_grad, int64_t threads) {
    const problem p = problem_of(shape, extents);
    const int64_t panel = p.places * p.row, all = table ? p.heads * p.entries : 0;
    real *sums = zeros(p.chunks * all, sizeof(real));  /* [chunks][heads][entries] */
    int failed = !sums;
#pragma omp parallel num_threads(threads)
    {
        workspace w = workspace_of(&p, 1);
        if (!complete(&w)) failed = 1;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < p.chunks * p.groups; task++) {
            if (failed) continue;
            int64_t head, heads, part, parts;
            begin(&w, &p, table, task, &head, &heads, &part, &parts);
            real *own = table ? sums + task % p.chunks * all + head * p.entries : NULL;
            for (int64_t t = 0; t < parts; t++) {
                advance(&w, &p, part + t, t + 1 < parts);
                const real *bias = bias_of(&w, &p);
                for (int64_t i = 0; i < heads; i++) {
                    int64_t offset = (head + i) * p.width;
                    attend_backward(&w, &p, grad + offset, qkv + offset, bias + i * panel, qkv_grad + offset);
                    if (table && w.now.whole)
                        for (int64_t j = 0; j < panel; j++) w.bias_grad[i * panel + j] += w.scores_grad[j];
                    else if (table) add_to_table(own + i * p.entries, &w.now, &p, w.scores_grad);
                }
            }
            if (!table) continue;
            set_sides(&w.now, &p, p.axes[0].window, p.axes[1].window);
            for (int64_t i = 0; i < heads; i++) add_to_table(own + i * p.entries, &w.now, &p, w.bias_grad + i * panel);
            memset(w.bias_grad, 0, heads * panel * sizeof(real));
        }
        release(&w);
#pragma omp for
        for (int64_t e = 0; e < (failed ? 0 : all); e++) {
            real sum = 0;
            for (int64_t chunk = 0; chunk < p.chunks; chunk++) sum += sums[chunk * all + e];
            table_grad[(p.entries - 1 - e % p.entries) * p.heads + e / p.entries] = narrowed(sum);
        }
    }
    free(sums);
    return failed;
}
