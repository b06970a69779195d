/* What stands between the matrix products: embeddings, norms, rotary positions, gates, rows, dropout, sums.
 *
 * N counts rows (or elements where an operation has no rows), D is the width of a row. Work is cut into pieces that
 * depend on the shapes alone; where pieces add into one result, they add into own memory first, or each owns some columns.
 */
#include "../random.h"
#include "common.tpl.h"
#include "map.tpl.h"
#include "quant.tpl.h"

/* Rows that add into one partial result. */
enum { BLOCK_ROWS = 32 };

/* ---- Rows */

/* y[n,:] = w[ids[n],:]   ids [N], w [V,D] in any format, y [N,D] */
static void embedding_forward_piece(const void *context, int64_t begin, int64_t end,
                                    int worker UNUSED) {
    const pl_call *c = context;
    const embedding_forward_args args = embedding_forward_args_of(c);
    const int32_t *ids = args.ids;
    float *y = args.y;
    int64_t d = PL_DIM(c, 'D');
    for (int64_t i = begin; i < end; i++) decode_row(args.w, ids[i], y + i * d);
}
pl_status KERNEL(embedding_forward)(const pl_call *c) {
    pl_parallel(PL_DIM(c, 'N'), grain_of(PL_DIM(c, 'D')), embedding_forward_piece, c);
    return PL_OK;
}

typedef struct {
    const float *from;
    const int32_t *rows;
    float *to;
    int64_t count, width;
} row_sum_job;

/* to[rows[i],:] += from[i,:] for the columns [begin, end), in the order of i. */
static void add_rows_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const row_sum_job *job = context;
    for (int64_t i = 0; i < job->count; i++) {
        const float *from = job->from + i * job->width;
        float *to = job->to + job->rows[i] * job->width;
        int64_t j = begin;
        for (; j + LANES <= end; j += LANES) vf_store(to + j, vf_load(to + j) + vf_load(from + j));
        for (; j < end; j++) to[j] += from[j];
    }
}
static void add_rows(const row_sum_job *job) {
    /* Whole cache lines of columns, at least 64 columns so that a row's visit pays. */
    int64_t columns = grain_of(job->count) / 64 * 64;
    pl_parallel(job->width, columns < 64 ? 64 : columns, add_rows_piece, job);
}

/* dw[ids[n],:] += dy[n,:]   dy [N,D], ids [N], dw [V,D] is added to */
pl_status KERNEL(embedding_grad)(const pl_call *c) {
    const embedding_grad_args args = embedding_grad_args_of(c);
    add_rows(&(row_sum_job){args.dy, args.ids, args.dw, PL_DIM(c, 'N'), PL_DIM(c, 'D')});
    return PL_OK;
}

/* y[m,:] = x[rows[m],:]   x [N,D], rows [M], y [M,D] */
static void gather_rows_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const pl_call *c = context;
    const gather_rows_args args = gather_rows_args_of(c);
    const float *x = args.x;
    const int32_t *rows = args.rows;
    float *y = args.y;
    int64_t d = PL_DIM(c, 'D');
    for (int64_t i = begin; i < end; i++) memcpy(y + i * d, x + rows[i] * d, (size_t)d * sizeof *y);
}
pl_status KERNEL(gather_rows)(const pl_call *c) {
    pl_parallel(PL_DIM(c, 'M'), grain_of(PL_DIM(c, 'D')), gather_rows_piece, c);
    return PL_OK;
}

/* Whether x and y [N] are the same bits: 1 or 0. */
static void same_bits_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const pl_call *c = context;
    const same_bits_args args = same_bits_args_of(c);
    const float *x = args.x, *y = args.y;
    uint8_t *same = args.same;
    if (memcmp(x + begin, y + begin, (size_t)(end - begin) * sizeof *x))
        __atomic_store_n(same, 0, __ATOMIC_RELAXED);
}
pl_status KERNEL(same_bits)(const pl_call *c) {
    const same_bits_args args = same_bits_args_of(c);
    *args.same = 1;
    pl_parallel(PL_DIM(c, 'N'), 8 * PIECE, same_bits_piece, c);
    return PL_OK;
}

/* Whether some |x[i]| is below the bound: 1 or 0. */
static void any_below_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const pl_call *c = context;
    const any_below_args args = any_below_args_of(c);
    const float *x = args.x, bound = (float)args.bound;
    int found = 0;
    for (int64_t i = begin; i < end; i++) found |= fabsf(x[i]) < bound;
    if (found) __atomic_store_n(args.found, 1, __ATOMIC_RELAXED);
}
pl_status KERNEL(any_below)(const pl_call *c) {
    const any_below_args args = any_below_args_of(c);
    *args.found = 0;
    pl_parallel(PL_DIM(c, 'N'), 8 * PIECE, any_below_piece, c);
    return PL_OK;
}

/* y[rows[m],:] = x[m,:], the last m where several are the same   x [M,D], rows [M], y [N,D]: other rows stay */
pl_status KERNEL(put_rows)(const pl_call *c) {
    const put_rows_args args = put_rows_args_of(c);
    const float *x = args.x;
    const int32_t *rows = args.rows;
    float *y = args.y;
    int64_t d = PL_DIM(c, 'D');
    for (int64_t i = 0; i < PL_DIM(c, 'M'); i++)
        memcpy(y + rows[i] * d, x + i * d, (size_t)d * sizeof *y);
    return PL_OK;
}

/* dx[n,:] = sum of dy[m,:] over rows[m] = n   dy [M,D], rows [M], dx [N,D] is overwritten; a row not named is 0 */
static void zero_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const row_sum_job *job = context;
    memset(job->to + begin * job->width, 0, (size_t)((end - begin) * job->width) * sizeof *job->to);
}
pl_status KERNEL(scatter_add_rows)(const pl_call *c) {
    const scatter_add_rows_args args = scatter_add_rows_args_of(c);
    row_sum_job job = {args.dy, args.rows, args.dx, PL_DIM(c, 'M'), PL_DIM(c, 'D')};
    pl_parallel(PL_DIM(c, 'N'), grain_of(job.width), zero_piece, &job);
    add_rows(&job);
    return PL_OK;
}

/* ---- Column sums: each block of BLOCK_ROWS rows into a partial row, then the partial rows in order */

typedef struct {
    const pl_call *call;
    float *partial; /* [blocks, D], or NULL when no sum is wanted */
    float *out;
    int64_t blocks, width;
} column_job;

/* Few enough partial rows to add in float64. */
static void join_partials_piece(const void *context, int64_t begin, int64_t end,
                                int worker UNUSED) {
    const column_job *job = context;
    for (int64_t j = begin; j < end; j++) {
        double sum = 0;
        for (int64_t i = 0; i < job->blocks; i++) sum += (double)job->partial[i * job->width + j];
        job->out[j] = (float)sum;
    }
}

/* fn over the blocks of rows of `call`; `out` [D] (or NULL) becomes the sum of what fn leaves in the zeroed partial rows. */
static pl_status sum_columns(const pl_call *call, int64_t rows, float *out, pl_range_fn fn) {
    int64_t width = PL_DIM(call, 'D');
    column_job job = {call, NULL, out, (rows + BLOCK_ROWS - 1) / BLOCK_ROWS, width};
    if (out) {
        job.partial = pl_acquire((size_t)job.blocks * (size_t)width * sizeof *out);
        if (!job.partial) return PL_NO_MEMORY;
    }
    pl_parallel(job.blocks, grain_of(BLOCK_ROWS * width), fn, &job);
    if (out) pl_parallel(width, grain_of(job.blocks), join_partials_piece, &job);
    pl_release(job.partial);
    return PL_OK;
}

/* y[j] = sum over n of x[n,j]   x [N,D], y [D] */
static void column_sum_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const column_job *job = context;
    int64_t n = PL_DIM(job->call, 'N'), d = job->width;
    const float *x = column_sum_args_of(job->call).x;
    for (int64_t b = begin; b < end; b++) {
        float *partial = job->partial + b * d;
        int64_t last = at_most((b + 1) * BLOCK_ROWS, n);
        memset(partial, 0, (size_t)d * sizeof *partial);
        for (int64_t i = b * BLOCK_ROWS; i < last; i++)
            for (int64_t j = 0; j < d; j++) partial[j] += x[i * d + j];
    }
}
pl_status KERNEL(column_sum)(const pl_call *c) {
    const column_sum_args args = column_sum_args_of(c);
    return sum_columns(c, PL_DIM(c, 'N'), args.y, column_sum_piece);
}

/* out[j] = sum over n of dy[n,j] (y[n,j] - offset[j])   dy, y [N,D], offset [D] or NULL, out [D] */
static void column_dot_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const column_job *job = context;
    const pl_call *c = job->call;
    const column_dot_args args = column_dot_args_of(c);
    int64_t n = PL_DIM(c, 'N'), d = job->width;
    const float *dy = args.dy, *y = args.y, *offset = args.offset;
    for (int64_t b = begin; b < end; b++) {
        float *partial = job->partial + b * d;
        int64_t last = at_most((b + 1) * BLOCK_ROWS, n);
        memset(partial, 0, (size_t)d * sizeof *partial);
        for (int64_t i = b * BLOCK_ROWS; i < last; i++) {
            const float *from = dy + i * d, *with = y + i * d;
            if (offset)
                for (int64_t j = 0; j < d; j++) partial[j] += from[j] * (with[j] - offset[j]);
            else
                for (int64_t j = 0; j < d; j++) partial[j] += from[j] * with[j];
        }
    }
}
pl_status KERNEL(column_dot)(const pl_call *c) {
    const column_dot_args args = column_dot_args_of(c);
    return sum_columns(c, PL_DIM(c, 'N'), args.out, column_dot_piece);
}

/* ---- Products of rows */

/* Sum of a[i] b[i] (w[i], unless w is NULL); several sums side by side, so that long rows keep their digits. */
INLINE float dot(const float *a, const float *b, const float *w, int64_t n) {
    enum { SUMS = 4 };
    vf sum[SUMS] = {{0}};
    int64_t i = 0;
    for (; i + SUMS * LANES <= n; i += SUMS * LANES)
        for (int k = 0; k < SUMS; k++) {
            int64_t j = i + k * LANES;
            vf t = vf_load(a + j) * vf_load(b + j);
            sum[k] += w ? t * vf_load(w + j) : t;
        }
    for (; i < n; i += LANES) {
        int64_t m = at_most(LANES, n - i);
        vf t = vf_load_part(a + i, m, 0.0f) * vf_load_part(b + i, m, 0.0f);
        sum[0] += w ? t * vf_load_part(w + i, m, 0.0f) : t;
    }
    return vf_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

/* n <= LANES elements of the sum of k rows, from x + the row's number times `stride` on. */
INLINE void combine_lanes(const float *x, const int32_t *rows, int64_t k, int64_t stride, int add,
                          float *y, int64_t n) {
    vf sum = !add ? vf_set1(0) : n == LANES ? vf_load(y) : vf_load_part(y, n, 0.0f);
    for (int64_t j = 0; j < k; j++) {
        const float *from = x + rows[j] * stride;
        sum += n == LANES ? vf_load(from) : vf_load_part(from, n, 0.0f);
    }
    vf_store_part(y, sum, n);
}

/* y[n,:] (+)= sum over k of x[rows[n,k],:], in the order of k   x [M,D], rows [N,K], y [N,D] */
static void combine_rows_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const pl_call *c = context;
    const combine_rows_args args = combine_rows_args_of(c);
    int64_t d = PL_DIM(c, 'D'), k = PL_DIM(c, 'K');
    for (int64_t n = begin; n < end; n++) {
        const int32_t *rows = args.rows + n * k;
        float *y = args.y + n * d;
        int64_t i = 0;
        for (; i + LANES <= d; i += LANES)
            combine_lanes(args.x + i, rows, k, d, args.accumulate != 0, y + i, LANES);
        if (i < d) combine_lanes(args.x + i, rows, k, d, args.accumulate != 0, y + i, d - i);
    }
}
pl_status KERNEL(combine_rows)(const pl_call *c) {
    pl_parallel(PL_DIM(c, 'N'), grain_of(PL_DIM(c, 'D') * PL_DIM(c, 'K')), combine_rows_piece, c);
    return PL_OK;
}

/* y[n,:] = factor[n] x[n,:] */
static void scale_rows_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const pl_call *c = context;
    const scale_rows_args args = scale_rows_args_of(c);
    const float *factor = args.factor;
    int64_t d = PL_DIM(c, 'D');
    for (int64_t n = begin; n < end; n++) {
        const float *x = args.x + n * d;
        float *y = args.y + n * d;
        for (int64_t i = 0; i < d; i++) y[i] = factor[n] * x[i];
    }
}
pl_status KERNEL(scale_rows)(const pl_call *c) {
    pl_parallel(PL_DIM(c, 'N'), grain_of(PL_DIM(c, 'D')), scale_rows_piece, c);
    return PL_OK;
}

/* y[n,:] = factor x[n,:], element by element */
static void scale_columns_piece(const void *context, int64_t begin, int64_t end,
                                int worker UNUSED) {
    const pl_call *c = context;
    const scale_columns_args args = scale_columns_args_of(c);
    const float *factor = args.factor;
    int64_t d = PL_DIM(c, 'D');
    for (int64_t n = begin; n < end; n++) {
        const float *x = args.x + n * d;
        float *y = args.y + n * d;
        for (int64_t i = 0; i < d; i++) y[i] = factor[i] * x[i];
    }
}
pl_status KERNEL(scale_columns)(const pl_call *c) {
    pl_parallel(PL_DIM(c, 'N'), grain_of(PL_DIM(c, 'D')), scale_columns_piece, c);
    return PL_OK;
}

/* y = x^T   x [N,D], y [D,N]; in blocks of rows, whose elements of some columns stay in the nearest cache */
static void transpose_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    enum { BLOCK = 16 };
    const pl_call *c = context;
    const transpose_args args = transpose_args_of(c);
    int64_t n = PL_DIM(c, 'N'), d = PL_DIM(c, 'D');
    for (int64_t block = begin; block < end; block++) {
        const float *x = args.x + block * BLOCK * d;
        float *y = args.y + block * BLOCK;
        int64_t rows = n - block * BLOCK < BLOCK ? n - block * BLOCK : BLOCK;
        for (int64_t j = 0; j < d; j++)
            for (int64_t i = 0; i < rows; i++) y[j * n + i] = x[i * d + j];
    }
}
pl_status KERNEL(transpose)(const pl_call *c) {
    pl_parallel((PL_DIM(c, 'N') + 15) / 16, grain_of(16 * PL_DIM(c, 'D')), transpose_piece, c);
    return PL_OK;
}

/* dfactor[n] = dy[n,:] . x[n,:]; dx[n,:] = factor[n] dy[n,:] */
static void scale_rows_grad_piece(const void *context, int64_t begin, int64_t end,
                                  int worker UNUSED) {
    const pl_call *c = context;
    const scale_rows_grad_args args = scale_rows_grad_args_of(c);
    const float *factor = args.factor;
    int64_t d = PL_DIM(c, 'D');
    for (int64_t n = begin; n < end; n++) {
        const float *dy = args.dy + n * d;
        float *dx = args.dx + n * d;
        args.dfactor[n] = dot(dy, args.x + n * d, NULL, d);
        for (int64_t i = 0; i < d; i++) dx[i] = factor[n] * dy[i];
    }
}
pl_status KERNEL(scale_rows_grad)(const pl_call *c) {
    pl_parallel(PL_DIM(c, 'N'), grain_of(PL_DIM(c, 'D')), scale_rows_grad_piece, c);
    return PL_OK;
}

/* ---- Root mean square norm */

/* y = x rstd w, rstd = 1 / sqrt(mean(x^2) + eps)   x, y [N,D], w [D], rstd [N] */
static void rms_norm_forward_piece(const void *context, int64_t begin, int64_t end,
                                   int worker UNUSED) {
    const pl_call *c = context;
    const rms_norm_forward_args args = rms_norm_forward_args_of(c);
    const float *w = args.w;
    float *rstd = args.rstd;
    int64_t d = PL_DIM(c, 'D');
    for (int64_t i = begin; i < end; i++) {
        const float *x = args.x + i * d;
        float *y = args.y + i * d;
        float r = rstd[i] = 1.0f / sqrtf(dot(x, x, NULL, d) / (float)d + (float)args.eps);
        for (int64_t j = 0; j < d; j++) y[j] = x[j] * r * w[j];
    }
}
pl_status KERNEL(rms_norm_forward)(const pl_call *c) {
    pl_parallel(PL_DIM(c, 'N'), grain_of(PL_DIM(c, 'D')), rms_norm_forward_piece, c);
    return PL_OK;
}

/* dx = rstd (dy w - x rstd^2 mean(dy w x)), dw[j] = sum over n of dy x rstd   dw may be NULL, and is overwritten */
static void rms_norm_grad_piece(const void *context, int64_t begin, int64_t end,
                                int worker UNUSED) {
    const column_job *job = context;
    const pl_call *c = job->call;
    const rms_norm_grad_args args = rms_norm_grad_args_of(c);
    const float *w = args.w, *rstd = args.rstd;
    int64_t n = PL_DIM(c, 'N'), d = job->width;
    for (int64_t b = begin; b < end; b++) {
        float *dw = job->partial ? job->partial + b * d : NULL;
        int64_t last = at_most((b + 1) * BLOCK_ROWS, n);
        if (dw) memset(dw, 0, (size_t)d * sizeof *dw);
        for (int64_t i = b * BLOCK_ROWS; i < last; i++) {
            const float *dy = args.dy + i * d, *x = args.x + i * d;
            float *dx = args.dx + i * d;
            float r = rstd[i], k = r * r * (dot(dy, x, w, d) / (float)d);
            for (int64_t j = 0; j < d; j++) dx[j] = r * (dy[j] * w[j] - k * x[j]);
            if (dw)
                for (int64_t j = 0; j < d; j++) dw[j] += dy[j] * x[j] * r;
        }
    }
}
pl_status KERNEL(rms_norm_grad)(const pl_call *c) {
    const rms_norm_grad_args args = rms_norm_grad_args_of(c);
    return sum_columns(c, PL_DIM(c, 'N'), args.dw, rms_norm_grad_piece);
}

/* ---- Rotary positions */

INLINE void rope_step(const float *x, const float *cosine, const float *sine, float sign,
                      int64_t half, float *y, int64_t n) {
    vf a = vf_load_part(x, n, 0.0f), b = vf_load_part(x + half, n, 0.0f);
    vf c = vf_load_part(cosine, n, 0.0f), s = sign * vf_load_part(sine, n, 0.0f);
    vf_store_part(y, a * c - b * s, n);
    vf_store_part(y + half, b * c + a * s, n);
}

/* Turns each pair (x[j], x[D/2 + j]) by the angle of its position, or back if inverse: the inverse is the gradient too.
 * x, y [N,H,D], positions [N], cos, sin [P,D/2]; y may be x */
static void rope_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const pl_call *call = context;
    const rope_args args = rope_args_of(call);
    const int32_t *positions = args.positions;
    float sign = args.inverse ? -1.0f : 1.0f;
    int64_t heads = PL_DIM(call, 'H'), d = PL_DIM(call, 'D'), half = d / 2;
    for (int64_t i = begin; i < end; i++) {
        const float *cosine = args.cos + positions[i] * half;
        const float *sine = args.sin + positions[i] * half;
        for (int64_t h = 0; h < heads; h++) {
            const float *x = args.x + (i * heads + h) * d;
            float *y = args.y + (i * heads + h) * d;
            int64_t j = 0;
            for (; j + LANES <= half; j += LANES)
                rope_step(x + j, cosine + j, sine + j, sign, half, y + j, LANES);
            if (j < half) rope_step(x + j, cosine + j, sine + j, sign, half, y + j, half - j);
        }
    }
}
pl_status KERNEL(rope)(const pl_call *c) {
    pl_parallel(PL_DIM(c, 'N'), grain_of(PL_DIM(c, 'H') * PL_DIM(c, 'D')), rope_piece, c);
    return PL_OK;
}

/* ---- Elementwise */

INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + vf_exp(-x)); }

/* Activations of the form g sigmoid(z(g)): z, and g z'(g) for the gradient. */
typedef struct {
    vf z, slope;
} activation;
INLINE activation silu(vf g) { return (activation){g, g}; }
/* The tanh form of GELU: 0.5 g (1 + tanh(u)) = g sigmoid(2 u), u = sqrt(2 / pi) (g + 0.044715 g^3). */
INLINE activation gelu_tanh(vf g) {
    vf near =
        vf_min(vf_set1(16.0f),
               vf_max(vf_set1(-16.0f), g)); /* beyond, the sigmoid is 0 or 1; a NaN stays one */
    vf k = 1.5957691216057308f * near, cube = 0.044715f * near * near;
    return (activation){k * (1.0f + cube), k * (1.0f + 3.0f * cube)};
}

/* y = act(gate) up; dgate = dy up s (1 + g z' (1 - s)), dup = dy gate s, s = sigmoid(z) */
INLINE void gated_lanes(vf *v, activation a) { v[0] = v[0] * sigmoid(a.z) * v[1]; }
INLINE void gated_grad_lanes(vf *v, activation a) {
    vf dy = v[0], gate = v[1], up = v[2], s = sigmoid(a.z);
    v[0] = dy * up * s * (1.0f + a.slope * (1.0f - s));
    v[1] = dy * gate * s;
}

#define GATED_UNIT(name, act) \
    INLINE void name##_lanes(vf *v, int64_t index UNUSED, const void *constants UNUSED) { \
        gated_lanes(v, act(v[0])); \
    } \
    INLINE void name##_grad_lanes(vf *v, int64_t index UNUSED, const void *constants UNUSED) { \
        gated_grad_lanes(v, act(v[1])); \
    } \
    static void name##_forward_piece(const void *context, int64_t begin, int64_t end, \
                                     int worker UNUSED) { \
        const name##_forward_args args = name##_forward_args_of(context); \
        map(name##_lanes, 2, (const float *[]){args.gate, args.up}, 1, (float *[]){args.y}, begin, \
            end, NULL); \
    } \
    pl_status KERNEL(name##_forward)(const pl_call *c) { \
        pl_parallel(PL_DIM(c, 'N'), PIECE, name##_forward_piece, c); \
        return PL_OK; \
    } \
    static void name##_grad_piece(const void *context, int64_t begin, int64_t end, \
                                  int worker UNUSED) { \
        const name##_grad_args args = name##_grad_args_of(context); \
        map(name##_grad_lanes, 3, (const float *[]){args.dy, args.gate, args.up}, 2, \
            (float *[]){args.dgate, args.dup}, begin, end, NULL); \
    } \
    pl_status KERNEL(name##_grad)(const pl_call *c) { \
        pl_parallel(PL_DIM(c, 'N'), PIECE, name##_grad_piece, c); \
        return PL_OK; \
    }
GATED_UNIT(swiglu, silu)
GATED_UNIT(geglu, gelu_tanh)

INLINE void add_lanes(vf *v, int64_t index UNUSED, const void *constants UNUSED) { v[0] += v[1]; }

/* y = a + b */
static void add_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const pl_call *c = context;
    const add_args args = add_args_of(c);
    map(add_lanes, 2, (const float *[]){args.a, args.b}, 1, (float *[]){args.y}, begin, end, NULL);
}
pl_status KERNEL(add)(const pl_call *c) {
    pl_parallel(PL_DIM(c, 'N'), PIECE, add_piece, c);
    return PL_OK;
}

INLINE void ratio_lanes(vf *v, int64_t index UNUSED, const void *constants UNUSED) {
    v[0] = vf_select(vf_equal(v[1], vf_set1(0)), vf_set1(0), v[0] / v[1]);
}

/* y = a / b, 0 where b is */
static void ratio_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const pl_call *c = context;
    const ratio_args args = ratio_args_of(c);
    map(ratio_lanes, 2, (const float *[]){args.a, args.b}, 1, (float *[]){args.y}, begin, end,
        NULL);
}
pl_status KERNEL(ratio)(const pl_call *c) {
    pl_parallel(PL_DIM(c, 'N'), PIECE, ratio_piece, c);
    return PL_OK;
}

INLINE void axpy_lanes(vf *v, int64_t index UNUSED, const void *constants) {
    v[0] = v[1] + *(const float *)constants * v[0];
}

/* y += alpha x */
static void axpy_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const pl_call *c = context;
    const axpy_args args = axpy_args_of(c);
    float alpha = (float)args.alpha, *y = args.y;
    map(axpy_lanes, 2, (const float *[]){args.x, y}, 1, (float *[]){y}, begin, end, &alpha);
}
pl_status KERNEL(axpy)(const pl_call *c) {
    pl_parallel(PL_DIM(c, 'N'), PIECE, axpy_piece, c);
    return PL_OK;
}

INLINE void scale_lanes(vf *v, int64_t index UNUSED, const void *constants) {
    v[0] *= *(const float *)constants;
}

/* y = alpha x */
static void scale_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const pl_call *c = context;
    const scale_args args = scale_args_of(c);
    float alpha = (float)args.alpha;
    map(scale_lanes, 1, (const float *[]){args.x}, 1, (float *[]){args.y}, begin, end, &alpha);
}
pl_status KERNEL(scale)(const pl_call *c) {
    pl_parallel(PL_DIM(c, 'N'), PIECE, scale_piece, c);
    return PL_OK;
}

/* ---- Dropout: a random word per element from (seed, index) alone */

typedef uint32_t vu __attribute__((vector_size(PL_BYTES)));

typedef struct {
    uint32_t key[3], drop_below;
    float scale;
} dropout_constants;

/* A bijection of 32-bit words with little bias (C. Wellons, "Prospecting for hash functions"). */
INLINE vu mix_words(vu x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ x >> 16;
}

INLINE void dropout_lanes(vf *v, int64_t index, const void *constants) {
    const dropout_constants *k = constants;
    static const uint32_t lane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    vu x;
    memcpy(&x, lane, sizeof x);
    /* Pieces begin at multiples of LANES, so that all lanes share the upper half of their index. */
    x = mix_words((x + (uint32_t)index) ^ k->key[0]);
    x = mix_words((x ^ k->key[1]) + ((uint32_t)(index >> 32) ^ k->key[2]));
    v[0] = (vf)((vi)(x >= k->drop_below) & (vi)(v[0] * k->scale));
}

/* y = x / (1 - p) with probability 1 - p, else 0; of dy with the same seed and p it is the gradient */
static void dropout_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const pl_call *c = context;
    const dropout_args args = dropout_args_of(c);
    double p = args.p;
    float *y = args.y;
    if (p >= 1) {
        memset(y + begin, 0, (size_t)(end - begin) * sizeof *y);
        return;
    }
    uint64_t state = (uint64_t)args.seed, a = pl_next_word(&state), b = pl_next_word(&state);
    dropout_constants k = {{(uint32_t)a, (uint32_t)(a >> 32), (uint32_t)b},
                           p > 0 ? (uint32_t)(p * 0x1p32) : 0,
                           (float)(1 / (1 - p))};
    map(dropout_lanes, 1, (const float *[]){args.x}, 1, (float *[]){y}, begin, end, &k);
}
pl_status KERNEL(dropout)(const pl_call *c) {
    pl_parallel(PL_DIM(c, 'N'), PIECE, dropout_piece, c);
    return PL_OK;
}

/* ---- Sum of squares */

typedef struct {
    const float *x;
    double *partial; /* one for each PIECE elements */
} square_job;

static void sum_squares_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const square_job *job = context;
    job->partial[begin / PIECE] = wide_dot(job->x + begin, job->x + begin, end - begin);
}

/* out[0] = sum of x^2 in float64 */
pl_status KERNEL(sum_squares)(const pl_call *c) {
    const sum_squares_args args = sum_squares_args_of(c);
    int64_t n = PL_DIM(c, 'N'), pieces = (n + PIECE - 1) / PIECE;
    square_job job = {args.x, pl_acquire((size_t)pieces * sizeof(double))};
    double *out = args.out;
    if (!job.partial) return PL_NO_MEMORY;
    pl_parallel(n, PIECE, sum_squares_piece, &job);
    *out = 0;
    for (int64_t i = 0; i < pieces; i++) *out += job.partial[i];
    pl_release(job.partial);
    return PL_OK;
}
