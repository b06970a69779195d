/* Losses of rows of logits: a kernel for each line of losses.def.
 *
 *   losses/            the formulas, once for C and OpenCL C
 *   job.h              the rows of a call and their scratch
 *   f32.h f64.h        the computed types: the drivers below are compiled once for each
 *   rows, weights      rows in memory; the weights that probabilities are made of
 *   statistics         the walk that takes a row's statistics
 *   gradient           writing gradients, interleaved with that walk
 *   class pair element map   a driver for each kind of line
 *   cosine             the cosine distance of two rows of logits
 *   sparse             pair losses with a teacher that is known at few classes
 */
#ifndef PYLOSS_ROWLOSS_TPL_H
#define PYLOSS_ROWLOSS_TPL_H
#include "../kernel.h"
#include "job.h"

#include "f32.h"

#include "drivers.tpl.h"

#include "untyped.h"

#include "f64.h"

#include "drivers.tpl.h"

#include "untyped.h"

/* The position of the first largest element of each row, or of its first NaN, as numpy.argmax. */
static void argmax_piece(const void *context, int64_t begin, int64_t end, int worker) {
    const row_job *job = context;
    const argmax_args args = argmax_args_of(job->call);
    char *scratch = job->scratch + (size_t)worker * job->worker_bytes;
    for (int64_t i = begin; i < end; i++)
        args.index[i] =
            (int32_t)(job->call->wide
                          ? row_argmax_f64(args.x, i, PL_DIM(job->call, 'V'), (double *)scratch)
                          : row_argmax_f32(args.x, i, PL_DIM(job->call, 'V'), (float *)scratch));
}
pl_status KERNEL(cosine)(const pl_call *c) {
    return run_rows(c, 1, 0, cosine_args_of(c).q, NULL,
                    c->wide ? cosine_rows_f64 : cosine_rows_f32);
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
    } \
    pl_status KERNEL(sparse_##name)(const pl_call *c) { \
        const sparse_##name##_args args = sparse_##name##_args_of(c); \
        return run_rows(c, 1 + 2 * sparse_parts(c), 0, args.q, args.dq, \
                        c->wide ? sparse_##name##_rows_f64 : sparse_##name##_rows_f32); \
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

#endif
