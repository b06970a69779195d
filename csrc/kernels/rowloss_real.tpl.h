/* The row drivers and the formulas of the row losses, for one computed type; included by rowloss.tpl.h for each.
 *
 * A class loss of a row x with label y is log sum_i w(x_i) - log w(x_y), with gradient w'(x_i)/w(x_i) (p_i - [i = y]) where
 * p_i = w(x_i) / sum w. A new one is its class_formula and a one-line kernel. A loss of two rows is to take_statistics of
 * each, then walk both. The first pass leaves w'(x) where the gradient goes, so that w is computed once.
 */
#define REAL TYPED(real)
#define V TYPED(vector)
#define WIDTH TYPED(WIDTH)

typedef struct {
    V (*weight)(V x, V shift);                    /* w(x), divided by e^shift if shifted */
    V (*slope)(V x);                              /* w'(x) / w(x); NULL where it is 1 */
    double (*log_weight)(double x, double shift); /* log of `weight` */
    int shifted;                                  /* w grows like e^x: the largest logit is taken off first */
} TYPED(class_formula);

/* A row is walked in blocks that stay in the first-level cache between their maximum and their sum. Sums run in single
 * vectors within a block only, in float64 from block to block, so that the longest rows keep their digits. */
enum { TYPED(MIN_BLOCK) = 1024, TYPED(MAX_BLOCKS) = 256 };

INLINE int64_t TYPED(block_size)(int64_t n) {
    int64_t size = (n + TYPED(MAX_BLOCKS) - 1) / TYPED(MAX_BLOCKS);
    return size < TYPED(MIN_BLOCK) ? TYPED(MIN_BLOCK) : size;
}

/* The sum of the weights is total * e^shift (shift is 0 if the formula is not shifted). */
typedef struct {
    REAL shift;
    double total;
    REAL block_shift[TYPED(MAX_BLOCKS)]; /* what the weights kept of each block are relative to */
} TYPED(row_statistics);

INLINE REAL TYPED(block_max)(const REAL *x, int64_t n) {
    REAL lowest = (REAL)-INFINITY;
    V a = VEC(set1)(lowest), b = a;
    int64_t i = 0;
    for (; i + 2 * WIDTH <= n; i += 2 * WIDTH) {
        a = VEC(max)(VEC(load)(x + i), a);
        b = VEC(max)(VEC(load)(x + i + WIDTH), b);
    }
    for (; i < n; i += WIDTH) a = VEC(max)(VEC(load_part)(x + i, n - i < WIDTH ? n - i : WIDTH, lowest), a);
    return VEC(hmax)(VEC(max)(a, b));
}

/* w(x); and w'(x) for the gradient into `slopes`. */
INLINE V TYPED(weigh)(TYPED(class_formula) f, V x, V shift, V *slopes) {
    V w = f.weight(x, shift);
    *slopes = f.slope ? w * f.slope(x) : w;
    return w;
}

/* Sum of w(x); w'(x) into `kept` unless that is NULL (it may be x). */
INLINE double TYPED(block_sum)(TYPED(class_formula) f, const REAL *x, int64_t n, REAL shift, REAL *kept) {
    V s = VEC(set1)(shift), a = {0}, b = {0}, slopes;
    int64_t i = 0;
    for (; i + 2 * WIDTH <= n; i += 2 * WIDTH) {
        a += TYPED(weigh)(f, VEC(load)(x + i), s, &slopes);
        if (kept) VEC(store)(kept + i, slopes);
        b += TYPED(weigh)(f, VEC(load)(x + i + WIDTH), s, &slopes);
        if (kept) VEC(store)(kept + i + WIDTH, slopes);
    }
    double sum = (double)VEC(sum)(a + b);
    for (; i < n; i += WIDTH) {
        int64_t m = n - i < WIDTH ? n - i : WIDTH;
        V w = TYPED(weigh)(f, VEC(load_part)(x + i, m, 0), s, &slopes);
        for (int64_t j = 0; j < m; j++) sum += (double)w[j];
        if (kept) VEC(store_part)(kept + i, slopes, m);
    }
    return sum;
}

/* One pass over a row; the total is taken anew relative to each larger maximum. */
INLINE void TYPED(take_statistics)(TYPED(class_formula) f, const REAL *x, int64_t n, REAL *kept, TYPED(row_statistics) *row) {
    REAL shift = f.shifted ? (REAL)-INFINITY : 0;
    double total = 0;
    int64_t size = TYPED(block_size)(n);
    for (int64_t i = 0; i < n; i += size) {
        int64_t m = n - i < size ? n - i : size;
        REAL highest = f.shifted ? TYPED(block_max)(x + i, m) : 0;
        if (highest > shift) {
            /* e^-inf drops what only -inf logits left, but keeps a NaN. */
            total *= (double)VEC(exp)(VEC(set1)(shift - highest))[0];
            shift = highest;
        }
        row->block_shift[i / size] = shift;
        /* As long as all logits are -inf they add e^(-inf - 0) = 0. */
        total += TYPED(block_sum)(f, x + i, m, shift == (REAL)-INFINITY ? 0 : shift, kept ? kept + i : NULL);
    }
    row->shift = shift;
    row->total = total;
}

/* dx = dloss w'(x) / sum w over a row, from the w'(x) that take_statistics kept in dx. */
INLINE void TYPED(finish_grad)(const TYPED(row_statistics) *row, REAL dloss, int64_t n, REAL *dx) {
    int64_t size = TYPED(block_size)(n);
    for (int64_t begin = 0; begin < n; begin += size) {
        int64_t i = begin, end = n - begin < size ? n : begin + size;
        V relative = VEC(exp)(VEC(set1)(row->block_shift[begin / size] - row->shift));
        V factor = relative * (REAL)((double)dloss / row->total);
        for (; i + WIDTH <= end; i += WIDTH) VEC(store)(dx + i, VEC(load)(dx + i) * factor);
        for (; i < end; i++) dx[i] *= factor[0];
    }
}

/* Rows [begin, end) of a class loss: logits [N,V], labels [N], dloss [N] or NULL (ones), loss [N], dlogits [N,V] or NULL.
 * A row with label -1 gives 0 and gradient 0. */
INLINE void TYPED(class_rows)(TYPED(class_formula) f, const pl_call *c, int64_t begin, int64_t end) {
    int64_t n = PL_DIM(c, 'V');
    const int32_t *labels = c->arg[1].in;
    const REAL *dloss = c->arg[2].in;
    REAL *loss = c->arg[3].out;
    TYPED(row_statistics) row;
    for (int64_t i = begin; i < end; i++) {
        const REAL *x = (const REAL *)c->arg[0].in + i * n;
        REAL *dx = c->arg[4].out ? (REAL *)c->arg[4].out + i * n : NULL;
        int64_t label = labels[i];
        if (label < 0) {
            loss[i] = 0;
            if (dx) memset(dx, 0, (size_t)n * sizeof *dx);
            continue;
        }
        REAL at_label = x[label], given = dloss ? dloss[i] : 1; /* dx may be x */
        if (dx) TYPED(take_statistics)(f, x, n, dx, &row);
        else TYPED(take_statistics)(f, x, n, NULL, &row);
        loss[i] = (REAL)(log(row.total) - f.log_weight((double)at_label, (double)row.shift));
        if (!dx) continue;
        TYPED(finish_grad)(&row, given, n, dx);
        dx[label] -= given * (f.slope ? f.slope(VEC(set1)(at_label))[0] : 1);
    }
}

/* ---- softmax: w(x) = e^x */

INLINE V TYPED(softmax_weight)(V x, V shift) { return VEC(exp)(x - shift); }
INLINE double TYPED(softmax_log_weight)(double x, double shift) { return x - shift; }

/* loss = log sum exp(row) - row[label], dlogits = dloss (softmax(row) - onehot) */
static void TYPED(softmax_cross_entropy_piece)(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    TYPED(class_rows)((TYPED(class_formula)){TYPED(softmax_weight), NULL, TYPED(softmax_log_weight), 1}, context, begin, end);
}
static pl_status TYPED(softmax_cross_entropy)(const pl_call *c) {
    pl_parallel(PL_DIM(c, 'N'), grain_of(PL_DIM(c, 'V')), TYPED(softmax_cross_entropy_piece), c);
    return PL_OK;
}

#undef REAL
#undef V
#undef WIDTH
