/* What the two passes of neighborhood attention share: the neighborhoods, and the panels that sums run over.

   Tokens i with the same i % dilation along both axes form a class, an image of its own in which the neighborhood is
   a block without gaps; all coordinates below are those within a class. A task is a tile of a class, for one image
   and head. It copies the keys and values that its queries see into panels of reals, zero outside the grid, so that
   a query's neighbors lie at the same distances from the first for all queries of a row, and inner loops test no
   borders: what is not seen has the score -inf from the bias line (bias_line).

   DIM and VALUE_DIM are the channels of a head. */

#define NOINLINE static __attribute__((noinline))
#define PADDED(n) (((n) + LANES - 1) / LANES * LANES)
#define DK PADDED(DIM)
#define DV PADDED(VALUE_DIM)
#define AHEAD 8              /* tokens that are asked for before they are copied */

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
