/* The row drivers and the formulas of the row losses, for one computed type; included by rowloss.tpl.h for each.
 *
 * A class loss of a row x with label y is log sum_i w(x_i) - log w(x_y), with gradient w'(x_i)/w(x_i) (p_i - [i = y]) where
 * p_i = w(x_i) / sum w. A new one is its class_formula and a one-line kernel. A loss of two rows is to take_statistics of
 * each, then walk both.
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

/* The sum of the weights is total * e^shift (shift is 0 if the formula is not shifted). */
typedef struct {
    REAL shift;
    double total;
} TYPED(row_statistics);

/* A block stays in the first-level cache between its maximum and its sum. Sums run in single vectors within a block only,
 * in float64 from block to block, so that the longest rows keep their digits. */
enum { TYPED(BLOCK) = 1024 };

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

INLINE double TYPED(block_sum)(TYPED(class_formula) f, const REAL *x, int64_t n, REAL shift) {
    V s = VEC(set1)(shift), a = {0}, b = {0};
    int64_t i = 0;
    for (; i + 2 * WIDTH <= n; i += 2 * WIDTH) {
        a += f.weight(VEC(load)(x + i), s);
        b += f.weight(VEC(load)(x + i + WIDTH), s);
    }
    double sum = (double)VEC(sum)(a + b);
    if (i == n) return sum;
    REAL rest[2 * WIDTH];
    for (int64_t j = 0; j < 2 * WIDTH; j += WIDTH) {
        int64_t left = n - i - j < 0 ? 0 : n - i - j < WIDTH ? n - i - j : WIDTH;
        VEC(store)(rest + j, f.weight(VEC(load_part)(x + i + j, left, 0), s));
    }
    for (int64_t j = 0; j < n - i; j++) sum += (double)rest[j];
    return sum;
}

/* One pass over a row; the total is taken anew relative to each larger maximum. */
INLINE TYPED(row_statistics) TYPED(take_statistics)(TYPED(class_formula) f, const REAL *x, int64_t n) {
    REAL shift = f.shifted ? (REAL)-INFINITY : 0;
    double total = 0;
    for (int64_t i = 0; i < n; i += TYPED(BLOCK)) {
        int64_t m = n - i < TYPED(BLOCK) ? n - i : TYPED(BLOCK);
        REAL highest = f.shifted ? TYPED(block_max)(x + i, m) : 0;
        if (highest > shift) {
            /* The vector exponential, as for the elements; e^-inf drops what only -inf logits left, but keeps a NaN. */
            total *= (double)VEC(exp)(VEC(set1)(shift - highest))[0];
            shift = highest;
        }
        /* As long as all logits are -inf they add e^(-inf - 0) = 0. */
        total += TYPED(block_sum)(f, x + i, m, shift == (REAL)-INFINITY ? 0 : shift);
    }
    return (TYPED(row_statistics)){shift, total};
}

/* dx = dloss slope(x) w(x) / total over a row; dx may be x. */
INLINE void TYPED(class_grad)(TYPED(class_formula) f, const REAL *x, TYPED(row_statistics) row, REAL dloss, int64_t label,
                              int64_t n, REAL *dx) {
    V shift = VEC(set1)(row.shift), factor = VEC(set1)((REAL)((double)dloss / row.total)), at_label = VEC(set1)(x[label]);
    REAL onehot = dloss * (f.slope ? f.slope(at_label)[0] : 1);
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) {
        V v = VEC(load)(x + i), g = f.weight(v, shift) * factor;
        VEC(store)(dx + i, f.slope ? g * f.slope(v) : g);
    }
    if (i < n) {
        V v = VEC(load_part)(x + i, n - i, 0), g = f.weight(v, shift) * factor;
        VEC(store_part)(dx + i, f.slope ? g * f.slope(v) : g, n - i);
    }
    dx[label] -= onehot;
}

/* Rows [begin, end) of a class loss: logits [N,V], labels [N], dloss [N] or NULL (ones), loss [N], dlogits [N,V] or NULL.
 * A row with label -1 gives 0 and gradient 0. */
INLINE void TYPED(class_rows)(TYPED(class_formula) f, const pl_call *c, int64_t begin, int64_t end) {
    int64_t n = PL_DIM(c, 'V');
    const int32_t *labels = c->arg[1].in;
    const REAL *dloss = c->arg[2].in;
    REAL *loss = c->arg[3].out;
    for (int64_t i = begin; i < end; i++) {
        const REAL *x = (const REAL *)c->arg[0].in + i * n;
        REAL *dx = c->arg[4].out ? (REAL *)c->arg[4].out + i * n : NULL;
        int64_t label = labels[i];
        if (label < 0) {
            loss[i] = 0;
            if (dx) memset(dx, 0, (size_t)n * sizeof *dx);
            continue;
        }
        TYPED(row_statistics) row = TYPED(take_statistics)(f, x, n);
        loss[i] = (REAL)(log(row.total) - f.log_weight((double)x[label], (double)row.shift));
        if (dx) TYPED(class_grad)(f, x, row, dloss ? dloss[i] : 1, label, n, dx);
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
