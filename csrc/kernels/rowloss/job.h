/* What a row loss is called with, and how its rows are given to threads. Nothing here depends on
 * the computed type. */
#ifndef PYLOSS_ROWLOSS_JOB_H
#define PYLOSS_ROWLOSS_JOB_H
#include "../kernel.h"
#include "../pieces.h"

enum {
    ROW_BLOCK = 2048,        /* elements of a row that are walked at a time: they stay in L1 */
    STREAM_BYTES = 24 << 20, /* larger gradients are stored past the caches: too large to be still
                                 cached when read */
    PREFETCH_BYTES = 4096,   /* how far ahead a row is prefetched, past its next block */
    PAGE_SKEW = 640,         /* between parts of scratch, see run_rows */
    ENTRIES = 64             /* of a sparse loss, gathered at a time: a multiple of any vector */
};
static const int64_t float_bytes[] = {[PL_F32] = 4, [PL_F64] = 8, [PL_F16] = 2, [PL_BF16] = 2};

/* One call over its rows. A worker's scratch is a number of parts; a part holds a row of the
 * computed type and one number for each of its blocks. */
typedef struct {
    const pl_call *call;
    char *scratch;
    size_t worker_bytes, part_bytes;
    int stream; /* store the gradient past the caches */
} row_job;

/* Runs `piece` over all rows. `parts` parts of scratch are needed, and `stream_parts` more where
 * `out`, a gradient, is streamed. */
static pl_status run_rows(const pl_call *c, int parts, int stream_parts, const pl_rows *in,
                          const pl_rows *out, pl_range_fn piece) {
    int64_t n = PL_DIM(c, 'N'), v = PL_DIM(c, 'V'), size = c->wide ? 8 : 4;
    if (n == 0 || v == 0) return PL_OK;
    /* A store holds up loads from the same place of another page: parts begin at different places
     * of a page. */
    size_t bytes = (size_t)((v + v / ROW_BLOCK + 64) * size);
    row_job job = {.call = c, .part_bytes = (bytes + 4095) / 4096 * 4096 + PAGE_SKEW};
    job.stream = out && out->data && out->data != in->data && n > 1 &&
                 (double)n * (double)v * (double)size > STREAM_BYTES;
    job.worker_bytes = job.part_bytes * (size_t)(parts + (job.stream ? stream_parts : 0));
    char *scratch = pl_acquire(job.worker_bytes * (size_t)pl_num_threads() + PAGE_SKEW);
    if (!scratch) return PL_NO_MEMORY;
    job.scratch = scratch + PAGE_SKEW;
    /* Several rows per piece: row i's gradient is written while row i + 1's statistics are
     * taken. */
    int64_t several = n / (8 * pl_num_threads()), least = grain_of(v);
    pl_parallel(n, several > least ? several : least, piece, &job);
    pl_release(scratch);
    return PL_OK;
}

/* Parts of scratch that hold one number for each of a sparse loss's K entries. */
UNUSED static int sparse_parts(const pl_call *c) {
    int64_t v = PL_DIM(c, 'V');
    return 1 + (int)(PL_DIM(c, 'K') / (v ? v : 1));
}

/* The arguments of each kind of loss, whatever a loss calls its options. An absent array is NULL;
 * absent rows have data NULL. Arrays of type void are of the computed type. */
typedef struct {
    const pl_rows *logits;
    const int32_t *labels;
    const void *class_weight, *dloss, *dlse;
    void *loss, *lse;
    const pl_rows *dlogits;
    double option[PL_MAX_OPTIONS];
} class_args;
typedef struct {
    const pl_rows *q, *p;
    const int32_t *labels; /* -1: a row that is left out; or NULL */
    double scale_q, softcap_q, scale_p, softcap_p;
    const void *dloss;
    void *loss;
    const pl_rows *dq, *dp;
    double option[PL_MAX_OPTIONS];
} pair_args;
typedef struct {
    const pl_rows *q;
    const int32_t *ids;               /* [N, K]; -1: no entry */
    const void *logp, *shares, *left; /* [N, K], [N, K] or NULL, [N] or NULL */
    const int32_t *labels;
    double scale_q, softcap_q, scale_p;
    int renormalize, cross, reverse;
    const void *dloss;
    void *loss;
    const pl_rows *dq;
    double option[PL_MAX_OPTIONS];
} sparse_args;
typedef struct {
    const pl_rows *x, *t; /* logits and targets */
    const void *dloss;
    void *loss;
    const pl_rows *dx, *dt;
    double option[PL_MAX_OPTIONS];
} element_args;

#define PL_LOSS_TABLE
#define PL_CLASS_LOSS(name, family, options, mean_option, softcap_option) \
    UNUSED static class_args name##_class_args(const pl_call *c) { \
        const name##_args a = name##_args_of(c); \
        class_args args = {a.logits, a.labels, a.class_weight, a.dloss, a.dlse, \
                           a.loss,   a.lse,    a.dlogits,      {0}}; \
        name##_options_of(c, args.option); \
        return args; \
    }
#define PL_PAIR_LOSS(name, options, q_sums_to_0) \
    UNUSED static pair_args name##_pair_args(const pl_call *c) { \
        const name##_args a = name##_args_of(c); \
        pair_args args = {a.q,         a.p,     a.labels, a.scale_q, a.softcap_q, a.scale_p, \
                          a.softcap_p, a.dloss, a.loss,   a.dq,      a.dp,        {0}}; \
        name##_options_of(c, args.option); \
        return args; \
    } \
    UNUSED static sparse_args name##_sparse_args(const pl_call *c) { \
        const sparse_##name##_args a = sparse_##name##_args_of(c); \
        sparse_args args = {.q = a.q, \
                            .ids = a.ids, \
                            .logp = a.logp, \
                            .shares = a.shares, \
                            .left = a.left, \
                            .labels = a.labels, \
                            .scale_q = a.scale_q, \
                            .softcap_q = a.softcap_q, \
                            .scale_p = a.scale_p, \
                            .renormalize = a.renormalize != 0, \
                            .cross = a.cross != 0, \
                            .reverse = a.reverse != 0, \
                            .dloss = a.dloss, \
                            .loss = a.loss, \
                            .dq = a.dq}; \
        sparse_##name##_options_of(c, args.option); \
        return args; \
    }
#define PL_ELEMENT_LOSS(name, options) \
    UNUSED static element_args name##_element_args(const pl_call *c) { \
        const name##_args a = name##_args_of(c); \
        element_args args = {a.x, a.t, a.dloss, a.loss, a.dx, a.dt, {0}}; \
        name##_options_of(c, args.option); \
        return args; \
    }
#define PL_ROW_MAP(name, family, logarithm)
#include "../../losses.def"

#endif
