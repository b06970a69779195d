/* Losses of rows of logits: the row drivers (rowloss_real.tpl.h) and the formulas (losses/) for float32 and float64, and the
 * kernels over them, one for each line of losses.def.
 *
 * VEC(f) is the primitive f of the computed type's vector, TYPED(f) a function of this type.
 */
#include "../kernel.h"
#include "../pieces.h"
#include "../simd/narrow.h"
#include "../simd/vec.h"
#define FORMULA(name) TYPED(name)
#define SCALAR double
#define v_set(a) VEC(set1)(a)
#define v_exp(x) VEC(exp)(x)
#define v_decay(x) VEC(decay)(x)
#define v_expm1(x) VEC(expm1)(x)
#define v_log1p(x) VEC(log1p)(x)
#define v_reciprocal(x) VEC(reciprocal)(x)
#define v_abs(x) VEC(abs)(x)
#define v_max(a, b) VEC(max)(a, b)
#define v_min(a, b) VEC(min)(a, b)
#define v_log_grown(x, more) VEC(log_grown)(x, more)
#define v_less(a, b) VEC(less)(a, b)
#define v_equal(a, b) VEC(equal)(a, b)
#define v_select(mask, a, b) VEC(select)(mask, a, b)

/* What families.def says of a family, as constants. */
#define PL_FAMILY(name, shifted, sloped) \
    enum { name##_is_shifted = shifted, name##_is_sloped = sloped };
#include "../../families.def"

/* Gradients larger than this are stored past the caches: nobody finds them there any more. */
enum { STREAM_BYTES = 24 << 20 };

/* One call over its rows: what a piece of work on some worker needs. */
typedef struct {
    const pl_call *call;
    char *scratch; /* per worker */
    size_t stride,
        row; /* bytes of all parts, and of one: a row of the computed type and a number for each of its blocks */
    int stream;
} row_job;

enum { ROW_BLOCK = 2048, AHEAD_BYTES = 4096, PAGE_SKEW = 640 };
static const int64_t float_bytes[] = {[PL_F32] = 4, [PL_F64] = 8, [PL_F16] = 2, [PL_BF16] = 2};

/* The arguments of each kind of loss, whatever a loss calls its options; absent ones are NULL, rows with data NULL. `dloss` and
 * `loss` are of the computed type. */
typedef struct {
    const pl_rows *logits;
    const int32_t *labels;
    const void *dloss;
    void *loss;
    const pl_rows *dlogits;
    double option[PL_MAX_OPTIONS];
} class_args;
typedef struct {
    const pl_rows *q, *p;
    double temperature;
    const void *dloss;
    void *loss;
    const pl_rows *dq, *dp;
    double option[PL_MAX_OPTIONS];
} pair_args;
typedef struct {
    const pl_rows *x, *t;
    const void *dloss;
    void *loss;
    const pl_rows *dx, *dt;
    double option[PL_MAX_OPTIONS];
} element_args;

#define PL_LOSS_TABLE
#define PL_CLASS_LOSS(name, family, options, mean_option, softcap_option) \
    static class_args name##_class_args(const pl_call *c) { \
        const name##_args a = name##_args_of(c); \
        class_args args = {a.logits, a.labels, a.dloss, a.loss, a.dlogits, {0}}; \
        name##_options_of(c, args.option); \
        return args; \
    }
#define PL_PAIR_LOSS(name, options, q_sums_to_0) \
    static pair_args name##_pair_args(const pl_call *c) { \
        const name##_args a = name##_args_of(c); \
        pair_args args = {a.q, a.p, a.temperature, a.dloss, a.loss, a.dq, a.dp, {0}}; \
        name##_options_of(c, args.option); \
        return args; \
    }
#define PL_ELEMENT_LOSS(name, options) \
    static element_args name##_element_args(const pl_call *c) { \
        const name##_args a = name##_args_of(c); \
        element_args args = {a.x, a.t, a.dloss, a.loss, a.dx, a.dt, {0}}; \
        name##_options_of(c, args.option); \
        return args; \
    }
#define PL_ROW_MAP(name, family, logarithm)
#include "../../losses.def"

/* Runs `piece` over all rows with `parts` padded rows of scratch for each worker. `out` is the gradient that may be streamed, for
 * which `waiting` more are needed. */
static pl_status run_rows(const pl_call *c, int parts, int waiting, const pl_rows *in,
                          const pl_rows *out, pl_range_fn piece) {
    int64_t n = PL_DIM(c, 'N'), v = PL_DIM(c, 'V'), size = c->wide ? 8 : 4;
    if (n == 0 || v == 0) return PL_OK;
    /* Parts begin at different places of a page: stores hold up loads from the same place of another. */
    size_t bytes = (size_t)((v + v / ROW_BLOCK + 64) * size);
    row_job job = {.call = c, .row = (bytes + 4095) / 4096 * 4096 + PAGE_SKEW};
    job.stream = out && out->data && out->data != in->data && n > 1 &&
                 (double)n * (double)v * (double)size > STREAM_BYTES;
    job.stride = job.row * (size_t)(parts + (job.stream ? waiting : 0));
    char *scratch = pl_acquire(job.stride * (size_t)pl_num_threads() + PAGE_SKEW);
    if (!scratch) return PL_NO_MEMORY;
    job.scratch = scratch + PAGE_SKEW;
    /* Some rows in a piece, so that there is a next one while whose statistics are taken a gradient is written. */
    int64_t some = n / (8 * pl_num_threads()), least = grain_of(v);
    pl_parallel(n, some > least ? some : least, piece, &job);
    pl_release(scratch);
    return PL_OK;
}

#define VEC(name) vf_##name
#define TYPED(name) name##_f32
typedef float real_f32;
typedef vf vector_f32;
enum { WIDTH_f32 = LANES };
#include "real.tpl.h"
#undef VEC
#undef TYPED

#define VEC(name) vd_##name
#define TYPED(name) name##_f64
typedef double real_f64;
typedef vd vector_f64;
enum { WIDTH_f64 = DLANES };
#include "real.tpl.h"
#undef VEC
#undef TYPED

#undef FORMULA
#undef SCALAR
#undef v_set
#undef v_exp
#undef v_decay
#undef v_expm1
#undef v_log1p
#undef v_reciprocal
#undef v_abs
#undef v_max
#undef v_min
#undef v_log_grown
#undef v_less
#undef v_equal
#undef v_select

/* The position of the first largest element of each row, or of its first NaN, as numpy.argmax. */
static void argmax_piece(const void *context, int64_t begin, int64_t end, int worker) {
    const row_job *job = context;
    const argmax_args args = argmax_args_of(job->call);
    char *scratch = job->scratch + (size_t)worker * job->stride;
    for (int64_t i = begin; i < end; i++)
        args.index[i] =
            (int32_t)(job->call->wide
                          ? row_argmax_f64(args.x, i, PL_DIM(job->call, 'V'), (double *)scratch)
                          : row_argmax_f32(args.x, i, PL_DIM(job->call, 'V'), (float *)scratch));
}
pl_status KERNEL(argmax)(const pl_call *c) {
    return run_rows(c, 1, 0, argmax_args_of(c).x, NULL, argmax_piece);
}

#define PL_LOSS_TABLE
#define PL_CLASS_LOSS(name, family, options, mean_option, softcap_option) \
    pl_status KERNEL(name)(const pl_call *c) { \
        const name##_args args = name##_args_of(c); \
        return run_rows(c, 1, 1, args.logits, args.dlogits, \
                        c->wide ? name##_rows_f64 : name##_rows_f32); \
    }
#define PL_PAIR_LOSS(name, options, q_sums_to_0) \
    pl_status KERNEL(name)(const pl_call *c) { \
        const name##_args args = name##_args_of(c); \
        return run_rows(c, 4, 2, args.q, args.dq, c->wide ? name##_rows_f64 : name##_rows_f32); \
    }
#define PL_ELEMENT_LOSS(name, options) \
    pl_status KERNEL(name)(const pl_call *c) { \
        return run_rows(c, 1, 0, name##_args_of(c).x, NULL, \
                        c->wide ? name##_rows_f64 : name##_rows_f32); \
    }
#define PL_ROW_MAP(name, family, logarithm) \
    pl_status KERNEL(name)(const pl_call *c) { \
        return run_rows(c, 2, 0, name##_args_of(c).x, NULL, \
                        c->wide ? name##_rows_f64 : name##_rows_f32); \
    }
#include "../../losses.def"
