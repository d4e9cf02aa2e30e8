/* What both passes of window attention share: windows, cut into parts, and products on panels.

   A window whose places may not all see each other (empty ones at the border; tokens that a rolled grid brings
   together) is cut into its parts: rectangles of places that do. A part is then plain attention of n queries over
   n sources, without a mask. Its rows are copied into panels that fit the cache, converted to `real`, and all five
   products are taken there by one function. A task is some parts of some heads; what it adds up for the table is
   its own, so that no result depends on the threads.

   Rows of scores are whole vectors. Behind the last source the bias is minus infinity, so the weight is 0. */

#define APART static __attribute__((noinline))  /* once in the library, which then compiles faster */
#define BLOCK 6    /* queries whose scores are taken together; all heights of `tile` divide it */
#define TASKS 64  /* about so many, however many threads there are */
#define CACHE 65536  /* reals: the biases of the heads of a task stay below */

typedef struct {
    int64_t length;  /* tokens, padding included */
    int64_t size;    /* tokens that are queries too: those in front */
    int64_t window, shift;
    int64_t entries;  /* of the table: offsets from 1 - window_size to window_size - 1 */
    int64_t parts;
    int rolled;
} axis;

typedef struct {
    axis axes[2];
    const int64_t *extents;  /* [images, 2] or null */
    int64_t images, heads, width, channels, entries;
    int64_t places, row, head_row;  /* of the largest part; reals in a row of its scores, and in one of its heads */
    int64_t parts, group, groups, chunk, chunks;  /* a task is `chunk` of the parts for `group` of the heads */
} problem;

static axis axis_of(const int64_t *shape, int rolled) {
    axis a = {shape[0], shape[1], shape[2], shape[3], 2 * shape[2] - 1, 0, rolled};
    if (a.length <= a.window) a.window = a.length, a.shift = 0;
    if (!rolled && a.shift) a.shift = a.window - a.shift;  /* empty places in front */
    a.parts = rolled ? a.length / a.window + (a.shift > 0) : (a.length + a.shift + a.window - 1) / a.window;
    return a;
}

/* shape: images, heads, width, rolled, then length, size, window, shift of each axis. */
static problem problem_of(const int64_t *shape, const int64_t *extents) {
    problem p = {.extents = extents, .images = shape[0], .heads = shape[1], .width = shape[2]};
    for (int i = 0; i < 2; i++) p.axes[i] = axis_of(shape + 4 + 4 * i, shape[3]);
    p.entries = p.axes[0].entries * p.axes[1].entries;
    p.channels = p.heads * p.width;
    p.places = p.axes[0].window * p.axes[1].window;
    p.row = (p.places + LANES - 1) / LANES * LANES;
    p.head_row = (p.width + LANES - 1) / LANES * LANES;
    p.parts = p.images * p.axes[0].parts * p.axes[1].parts;
    p.group = MAX(MIN(p.parts * p.heads / TASKS, CACHE / (p.places * p.row)), 1);
    p.groups = (p.heads + p.group - 1) / p.group;
    p.chunk = MAX(p.parts * p.groups / TASKS, 1);
    p.chunks = (p.parts + p.chunk - 1) / p.chunk;
    return p;
}

/* The first place of a part along an axis; returns how many it has. */
static int64_t cut(const axis *a, int64_t extent, int64_t part, int64_t *first) {
    int64_t start = part * a->window, end = start + a->window;
    if (a->rolled) {  /* the last window is cut in two: before and after the places that hold the first tokens */
        int64_t border = a->length - a->shift;
        if (start == a->length) start = border, end = a->length;
        else if (end == a->length) end = border;
    } else {
        int64_t front = extent <= a->window ? 0 : a->shift;
        start = MAX(start - front, 0);
        end = MIN(end - front, extent);
    }
    *first = start;
    return MAX(end - start, 0);
}

INLINE int64_t token_at(const axis *a, int64_t place) {
    return a->rolled && place < a->size ? (place + a->shift) % a->size : place;
}

/* A part of a window. */
typedef struct {
    int64_t *token, *query;  /* [n]: where their rows of qkv begin, and those of the output (-1: padding) */
    int64_t side[2], n, row;
    int whole;
} places;

/* What a thread works with; lines behind [group] are there for each head of a task. */
typedef struct {
    places now, next;
    real *q, *k, *other;              /* [row][head_row]: tokens of a part */
    real *k_columns, *other_columns;  /* [head_row][row]: transposed */
    real *scores, *scores_grad;       /* forward: [BLOCK][row]; backward: [places][row] */
    real *block;                      /* [BLOCK][head_row] */
    int64_t head;                     /* the first whose table is at hand */
    real *table;                      /* [group][entries], the last first: they rise with the source */
    struct {
        real *rows;  /* [group][places][row] */
        int64_t side[2];
    } bias[2];        /* of the last part that is less than a window, and of whole windows */
    real *bias_grad;  /* [group][places][row], of whole windows */
} workspace;

static void *zeros(int64_t count, size_t size) {
    size_t bytes = (count * size + 63) / 64 * 64;
    void *found = aligned_alloc(64, MAX(bytes, 64));
    return found ? memset(found, 0, bytes) : NULL;
}

static workspace workspace_of(const problem *p, int backward) {
    int64_t panel = p->row * p->head_row, scores = p->places * p->row, token = sizeof(int64_t);
    workspace w = {
        .head = -1,
        .now = {zeros(p->places, token), zeros(p->places, token)},
        .next = {zeros(p->places, token), zeros(p->places, token)},
        .q = zeros(panel, sizeof(real)),
        .k = zeros(panel, sizeof(real)),
        .other = zeros(panel, sizeof(real)),
        .k_columns = zeros(panel, sizeof(real)),
        .other_columns = zeros(backward ? panel : 0, sizeof(real)),
        .scores = zeros(backward ? scores : BLOCK * p->row, sizeof(real)),
        .scores_grad = zeros(backward ? scores : 0, sizeof(real)),
        .block = zeros(BLOCK * p->head_row, sizeof(real)),
        .table = zeros(p->group * p->entries + LANES, sizeof(real)),  /* rows of biases are copied in whole vectors */
        .bias = {{zeros(p->group * scores + LANES, sizeof(real))}, {zeros(p->group * scores + LANES, sizeof(real))}},
        .bias_grad = zeros(backward ? p->group * scores : 0, sizeof(real)),
    };
    return w;
}

#define BUFFERS(w)                                                                                                  \
    {w->q, w->k, w->other, w->k_columns, w->other_columns, w->scores, w->scores_grad, w->block, w->table,          \
     w->bias[0].rows, w->bias[1].rows, w->bias_grad, w->now.token, w->now.query, w->next.token, w->next.query}

static int complete(const workspace *w) {
    const void *all[] = BUFFERS(w);
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (!all[i]) return 0;
    return 1;
}

static void release(workspace *w) {
    void *all[] = BUFFERS(w);
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

/* Loads once what several sums take: gcc would load it again for each, and two loads a cycle are what holds it up. */
#if defined(__AVX__)
#define HOLD(v) __asm__("" : "+x"(v))
#else
#define HOLD(v)
#endif
#if defined(__AVX512VL__)
#define REGISTERS 32
#else
#define REGISTERS 16
#endif

/* c[i][j] = sum over t of a[i * a_row + t * a_step] * b[t][j], for `rows` rows i and `vecs` vectors j. */
INLINE void tile(real *c, int64_t c_row, const real *a, int64_t a_row, int64_t a_step, const real *b, int64_t b_row,
                 int64_t depth, int rows, int vecs) {
    vec sum[6][7] = {0};
    for (int64_t t = 0; t < depth; t++) {
        vec factor[6];
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++) factor[i] = splat(a[i * a_row + t * a_step]);
#pragma GCC unroll 7
        for (int j = 0; j < vecs; j++) {
            vec from = load(b + t * b_row + j * LANES);
            if (rows * (vecs + 1) < REGISTERS) HOLD(from);
#pragma GCC unroll 6
            for (int i = 0; i < rows; i++) sum[i][j] += factor[i] * from;
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 7
        for (int j = 0; j < vecs; j++) store(c + i * c_row + j * LANES, sum[i][j]);
}

/* `tile` for any size, in tiles whose sums, with what they are made of, fit 16 registers. */
APART void product(real *c, int64_t c_row, const real *a, int64_t a_row, int64_t a_step, const real *b,
                    int64_t b_row, int64_t rows, int64_t columns, int64_t depth) {
    int64_t vecs = columns / LANES, tiles = (vecs + 6) / 7;
    for (int64_t done = 0, j = 0; j < tiles; j++) {
        int64_t count = (vecs - done + tiles - j - 1) / (tiles - j), i = 0;
#define TILES(height, width)                                                                             \
    case width:                                                                                          \
        for (; i + height <= rows; i += height)                                                          \
            tile(c + i * c_row, c_row, a + i * a_row, a_row, a_step, b, b_row, depth, height, width);    \
        for (; i < rows; i++) tile(c + i * c_row, c_row, a + i * a_row, a_row, a_step, b, b_row, depth, 1, width); \
        break;
        switch (count) {
            TILES(6, 1)
            TILES(6, 2)
            TILES(3, 3)
            TILES(3, 4)
            TILES(2, 5)
            TILES(2, 6)
            TILES(2, 7)
        }
#undef TILES
        done += count, b += count * LANES, c += count * LANES;
    }
}

/* [rows][from_row] to [columns][to_row], both whole vectors. */
APART void transpose(real *to, int64_t to_row, const real *from, int64_t from_row, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows; i += LANES)
        for (int64_t j = 0; j < columns; j += LANES) {
            vec v[LANES], u[LANES];
            for (int t = 0; t < LANES; t++) v[t] = load(from + (i + t) * from_row + j);
#if LANES == 8
            for (int t = 0; t < 8; t += 2) {
                u[t] = __builtin_shufflevector(v[t], v[t + 1], 0, 8, 2, 10, 4, 12, 6, 14);
                u[t + 1] = __builtin_shufflevector(v[t], v[t + 1], 1, 9, 3, 11, 5, 13, 7, 15);
            }
            for (int t = 0; t < 8; t++) {
                int s = t / 4 * 4 + t % 2;
                v[t] = t & 2 ? __builtin_shufflevector(u[s], u[s + 2], 2, 3, 10, 11, 6, 7, 14, 15)
                             : __builtin_shufflevector(u[s], u[s + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            }
            for (int t = 0; t < 4; t++) {
                u[t] = __builtin_shufflevector(v[t], v[t + 4], 0, 1, 2, 3, 8, 9, 10, 11);
                u[t + 4] = __builtin_shufflevector(v[t], v[t + 4], 4, 5, 6, 7, 12, 13, 14, 15);
            }
#else
            for (int t = 0; t < 4; t += 2) {
                u[t] = __builtin_shufflevector(v[t], v[t + 1], 0, 4, 2, 6);
                u[t + 1] = __builtin_shufflevector(v[t], v[t + 1], 1, 5, 3, 7);
            }
            for (int t = 0; t < 2; t++) {
                v[t] = __builtin_shufflevector(u[t], u[t + 2], 0, 1, 4, 5);
                v[t + 2] = __builtin_shufflevector(u[t], u[t + 2], 2, 3, 6, 7);
            }
            memcpy(u, v, sizeof u);
#endif
            for (int t = 0; t < LANES; t++) store(to + (j + t) * to_row + i, u[t]);
        }
}


/* Calls body with each row of sources that a query sees: `i` and `j`, the query and the first source; `entry`, where in
   the table the bias of the two stands, followed by those of the row's others. */
#define FOR_ROWS(at, p, body)                                                                              \
    for (int64_t i = 0, y = 0; y < (at).side[0]; y++)                                                      \
        for (int64_t x = 0; x < (at).side[1]; x++, i++)                                                    \
            for (int64_t row = 0, j = 0; row < (at).side[0]; row++, j += (at).side[1]) {                   \
                int64_t entry = (row - y + (p)->axes[0].entries / 2) * (p)->axes[1].entries - x +          \
                                (p)->axes[1].entries / 2;                                                  \
                body                                                                                       \
            }

/* Biases of the part at hand, [group][places][row]; without a table they are 0 too. */
APART const real *bias_of(workspace *w, const problem *p) {
    const places *at = &w->now;
    real *bias = w->bias[at->whole].rows;
    int64_t *side = w->bias[at->whole].side;
    if (side[0] == at->side[0] && side[1] == at->side[1]) return bias;
    memcpy(side, at->side, sizeof at->side);
    for (int64_t head = 0; head < p->group; head++) {
        const real *table = w->table + head * p->entries;
        real *to = bias + head * p->places * p->row;
        FOR_ROWS(*at, p, for (int64_t c = 0; c < side[1]; c += LANES)
                             store(to + i * at->row + j + c, load(table + entry + c));)
        for (int64_t i = 0; i < at->n; i++)
            for (int64_t j = at->n; j < at->row; j++) to[i * at->row + j] = -INFINITY;
    }
    return bias;
}

/* Adds [n][row] to the entries that they were biases from. */
APART void add_to_table(real *entries, const places *at, const problem *p, const real *grad) {
    FOR_ROWS(*at, p, for (int64_t c = 0; c < at->side[1]; c++) entries[entry + c] += grad[i * at->row + j + c];)
}

static void set_sides(places *at, const problem *p, int64_t down, int64_t across) {
    at->side[0] = down, at->side[1] = across, at->n = down * across;
    at->row = (at->n + LANES - 1) / LANES * LANES;
    at->whole = down == p->axes[0].window && across == p->axes[1].window;
}

/* Finds the tokens of a part. */
APART void find(places *at, const problem *p, int64_t part) {
    const axis *down = &p->axes[0], *across = &p->axes[1];
    int64_t image = part / (down->parts * across->parts), y0, x0;
    const int64_t whole[] = {down->length, across->length}, *extent = p->extents ? p->extents + 2 * image : whole;
    int64_t height = cut(down, MIN(extent[0], whole[0]), part / across->parts % down->parts, &y0);
    int64_t width = cut(across, MIN(extent[1], whole[1]), part % across->parts, &x0);
    set_sides(at, p, height, width);
    for (int64_t i = 0, row = 0; row < height; row++) {
        int64_t y = token_at(down, y0 + row);
        for (int64_t column = 0; column < width; column++, i++) {
            int64_t x = token_at(across, x0 + column);
            int64_t query = ((image * down->size + y) * across->size + x) * p->channels;
            at->token[i] = ((image * down->length + y) * across->length + x) * 3 * p->channels;
            at->query[i] = y < down->size && x < across->size ? query : -1;
        }
    }
}

/* The heads and parts of a task, the first of which is made the next one. */
static void begin(workspace *w, const problem *p, const scalar *table, int64_t task, int64_t *head, int64_t *heads,
                  int64_t *part, int64_t *parts) {
    *head = task / p->chunks * p->group, *heads = MIN(p->group, p->heads - *head);
    *part = task % p->chunks * p->chunk, *parts = MIN(p->chunk, p->parts - *part);
    find(&w->next, p, *part);
    if (!table || w->head == *head) return;
    w->head = *head;
    for (int i = 0; i < 2; i++) w->bias[i].side[0] = 0;
    for (int64_t e = 0; e < p->entries; e++)
        for (int64_t i = 0; i < *heads; i++)
            w->table[i * p->entries + e] = widened(table[(p->entries - 1 - e) * p->heads + *head + i]);
}

/* Goes on to the next part, and finds the one after it if there is one. */
static void advance(workspace *w, const problem *p, int64_t part, int more) {
    places next = w->next;
    w->next = w->now, w->now = next;
    if (more) find(&w->next, p, part + 1);
    else set_sides(&w->next, p, 0, 0);
}

/* Rows of a tensor times a factor into a panel, zeros where there are none and behind the last. */
APART void gather(real *to, const scalar *from, const int64_t *index, const places *at, const problem *p,
                   real factor) {
    for (int64_t i = 0; i < at->n; i++, to += p->head_row) {
        if (index[i] < 0) memset(to, 0, p->width * sizeof(real));
        else
            for (int64_t d = 0; d < p->width; d++) to[d] = widened(from[index[i] + d]) * factor;
    }
    memset(to, 0, (at->row - at->n) * p->head_row * sizeof(real));
}

/* Asks for rows that the next part will gather or write. Into the second cache: the first is full of panels. */
APART void ask(const scalar *from, const int64_t *index, int64_t first, int64_t end, int64_t width, int write) {
    __asm__ volatile("");  /* does something: calls may not be left out */
    for (int64_t i = first; i < end; i++) {
        const scalar *row = from + MAX(index[i], 0);
        for (int64_t d = 0; d < width; d += 64 / sizeof(scalar)) {
            if (write) __builtin_prefetch(row + d, 1, 2);
            else __builtin_prefetch(row + d, 0, 2);
        }
    }
}

APART void put(scalar *to, const real *from, int64_t width, real factor) {
    for (int64_t d = 0; d < width; d++) to[d] = narrowed(from[d] * factor);
}

/* Scores and biases, [rows][row], to exponentials, whose sums are returned. Row by row each step would wait for the
   one before. */
APART void weigh(real *scores, const real *bias, int64_t rows, int64_t row, real *sums) {
    real most[BLOCK];
    for (int64_t i = 0; i < rows; i++) {
        vec found = splat(-INFINITY);
        for (int64_t j = i * row; j < (i + 1) * row; j += LANES) {
            vec score = load(scores + j) + load(bias + j);
            store(scores + j, score);
            found = max_vec(score, found);
        }
        most[i] = max_lanes(found);
    }
    for (int64_t i = 0; i < rows; i++) {
        vec sum = {0};
        for (int64_t j = i * row; j < (i + 1) * row; j += LANES) {
            vec weight = exp_vec(load(scores + j) - most[i]);
            store(scores + j, weight);
            sum += weight;
        }
        sums[i] = sum_lanes(sum);
    }
}
