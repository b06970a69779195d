/* Products of a few rows, as in generation: rows of W are read once, where they lie, and multiplied as they come.
 * Included by matmul.tpl.h. */

/* The low-rank branch of one element of C. Not inlined: the compiler would fuse or split its products differently in every
 * instance of few_rows, and a row's bits would depend on how many rows come with it. */
static __attribute__((noinline)) float few_branch(const gemm *g, const float *h, int64_t o) {
    const float *u = (const float *)g->u.data;
    float sum = 0;
    for (int64_t j = 0; j < g->rank; j++) sum += g->u_scale * h[j] * (g->u_transposed ? u[o * g->rank + j] : u[j * g->n + o]);
    return sum;
}

/* Few rows against W transposed: every row of W is expanded once, a run at a time, and multiplied with all rows of A.
 * The number of rows and the format are constants in every instance, so that sums and expanded runs live in registers; the
 * formats of the instance PL_W_COUNT are those that nobody meets often. */
INLINE void few_rows(const gemm *g, int64_t begin, int64_t end, const int m, const int format) {
    const float *h = g->h_given ? g->h_given : g->h;
    for (int64_t o = begin; o < end; o++) {
        const int64_t row = pl_stored_row(&g->b, o);
        const float factor = g->b_rows ? g->a.factor * g->b_rows[o] : g->a.factor;
        vf acc[SMALL_M][32 / LANES];
#pragma GCC unroll 4
        for (int i = 0; i < m; i++)
#pragma GCC unroll 8
            for (int l = 0; l < 32 / LANES; l++) acc[i][l] = vf_set1(0);
        int64_t k = 0;
        for (; k + 32 <= g->k; k += 32) {
            float run[32];
            if (format == PL_W_COUNT) decoders[g->b.format](&g->b, row, k, 32, run);
            else decode_run(format, &g->b, row, k, 32, run);
#pragma GCC unroll 4
            for (int i = 0; i < m; i++)
#pragma GCC unroll 8
                for (int l = 0; l < 32 / LANES; l++)
                    acc[i][l] += vf_load(run + l * LANES) * vf_load(g->a.data + i * g->a.stride + k + l * LANES);
        }
        float tail[32];
        if (k < g->k) decoders[g->b.format](&g->b, row, k, g->k - k, tail);
#pragma GCC unroll 4
        for (int i = 0; i < m; i++) {
            vf total = acc[i][0];
#pragma GCC unroll 8
            for (int l = 1; l < 32 / LANES; l++) total += acc[i][l];
            float sum = vf_sum(total);
            for (int64_t l = 0; l < g->k - k; l++) sum += tail[l] * g->a.data[i * g->a.stride + k + l];
            float y = sum * factor + (g->bias ? g->bias[o] : 0);
            if (g->rank) y += few_branch(g, h + i * g->rank, o);
            float *c = g->c + i * g->n + o;
            *c = g->accumulate ? *c + y : y;
        }
    }
}

/* Every instance is a function of its own: in one that has them all, the compiler keeps sums on the stack. */
typedef void (*few_fn)(const gemm *g, int64_t begin, int64_t end);
#define FEW_ROWS(format, m) \
    static __attribute__((noinline)) void few_##format##_##m(const gemm *g, int64_t begin, int64_t end) { \
        few_rows(g, begin, end, m, PL_W_##format); \
    }
#define FEW(format) \
    FEW_ROWS(format, 1) \
    FEW_ROWS(format, 2) \
    FEW_ROWS(format, 3) \
    FEW_ROWS(format, 4)
FEW(F32)
FEW(BF16)
FEW(F16)
FEW(Q8_0)
FEW(Q4_0)
FEW(Q4_1)
FEW(Q4_K)
FEW(Q5_K)
FEW(Q6_K)
FEW(AFFINE4)
FEW(AFFINE8)
FEW(NF4)
FEW(COUNT)
#undef FEW
#undef FEW_ROWS

static few_fn few_of(int format, int64_t m) {
#define FEW(format) \
    { few_##format##_1, few_##format##_2, few_##format##_3, few_##format##_4 }
    static const few_fn own[PL_W_COUNT][SMALL_M] = {
        [PL_W_F32] = FEW(F32),   [PL_W_BF16] = FEW(BF16),       [PL_W_F16] = FEW(F16),         [PL_W_Q8_0] = FEW(Q8_0),
        [PL_W_Q4_0] = FEW(Q4_0), [PL_W_Q4_1] = FEW(Q4_1),       [PL_W_Q4_K] = FEW(Q4_K),       [PL_W_Q5_K] = FEW(Q5_K),
        [PL_W_Q6_K] = FEW(Q6_K), [PL_W_AFFINE4] = FEW(AFFINE4), [PL_W_AFFINE8] = FEW(AFFINE8), [PL_W_NF4] = FEW(NF4)};
    static const few_fn others[SMALL_M] = FEW(COUNT);
#undef FEW
    return own[format][m - 1] ? own[format][m - 1] : others[m - 1];
}

/* Products of at most SMALL_M rows, each in so many pieces of its columns; larger ones are passed over. */
typedef struct {
    const gemm *groups;
    int64_t columns, pieces;
} few_job;

INLINE int is_few(const gemm *g) { return g->m <= SMALL_M && g->b_transposed && !g->a.transposed; }

static void multiply_few(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const few_job *job = context;
    for (int64_t piece = begin; piece < end; piece++) {
        const gemm *g = job->groups + piece / job->pieces;
        int64_t first = piece % job->pieces * job->columns, last = first + job->columns < g->n ? first + job->columns : g->n;
        if (!g->m || !is_few(g)) continue;
        few_of(g->b.format, g->m)(g, first, last);
    }
}

/* a . b in float64, several sums side by side. */
INLINE double wide_dot(const float *a, const float *b, int64_t n) {
    typedef float half_vf __attribute__((vector_size(PL_BYTES / 2)));
    enum { SUMS = 4 };
    vd sum[SUMS] = {{0}};
    int64_t i = 0;
    for (; i + SUMS * DLANES <= n; i += SUMS * DLANES)
        for (int l = 0; l < SUMS; l++) {
            half_vf x, y;
            memcpy(&x, a + i + l * DLANES, sizeof x);
            memcpy(&y, b + i + l * DLANES, sizeof y);
            sum[l] += __builtin_convertvector(x, vd) * __builtin_convertvector(y, vd);
        }
    double total = vd_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
    for (; i < n; i++) total += (double)a[i] * b[i];
    return total;
}

/* H for few rows: P is in float32, as adapters store it. */
static void small_h(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    for (const gemm *g = (const gemm *)context + begin; g < (const gemm *)context + end; g++) {
        if (!is_few(g) || !g->rank || g->h_given) continue;
        const float *p = (const float *)g->p.data;
        for (int64_t i = 0; i < g->m; i++)
            for (int64_t j = 0; j < g->rank; j++) {
                const float *a = g->a.data + i * g->a.stride;
                double sum = 0;
                if (g->p_transposed) sum = wide_dot(a, p + j * g->k, g->k);
                else
                    for (int64_t k = 0; k < g->k; k++) sum += (double)a[k] * p[k * g->rank + j];
                g->h[i * g->rank + j] = (float)sum * g->h_scale;
            }
    }
}
