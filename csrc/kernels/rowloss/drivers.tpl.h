/* The work of each line of losses.def for one computed type: <name>_rows_f32 and <name>_rows_f64.
 * Included by rowloss.tpl.h, once per computed type. */
#include "class.tpl.h"
#include "cosine.tpl.h"
#include "element.tpl.h"
#include "job.h"
#include "map.tpl.h"
#include "pair.tpl.h"
#include "sparse.tpl.h"
#include "weights.tpl.h"

#define PL_LOSS_TABLE
#define PL_CLASS_LOSS(name, family, options, mean_option, softcap_option) \
    static void TYPED(name##_rows)(const void *job, int64_t begin, int64_t end, int worker) { \
        const class_args args = name##_class_args(((const row_job *)job)->call); \
        class_rows(FAMILY(family), TYPED(name), name##_##mean_option, name##_##softcap_option, \
                   &args, job, begin, end, worker); \
    }
#define PL_PAIR_LOSS(name, options, q_sums_to_0) \
    static void TYPED(name##_rows)(const void *job, int64_t begin, int64_t end, int worker) { \
        const pair_args args = name##_pair_args(((const row_job *)job)->call); \
        pair_rows(TYPED(name), q_sums_to_0, &args, job, begin, end, worker); \
    } \
    static void TYPED(sparse_##name##_rows)(const void *job, int64_t begin, int64_t end, \
                                            int worker) { \
        const sparse_args args = name##_sparse_args(((const row_job *)job)->call); \
        sparse_rows(TYPED(name), &args, job, begin, end, worker); \
    }
#define PL_ELEMENT_LOSS(name, options) \
    static void TYPED(name##_rows)(const void *job, int64_t begin, int64_t end, \
                                   int worker UNUSED) { \
        const element_args args = name##_element_args(((const row_job *)job)->call); \
        element_rows(TYPED(name), &args, job, begin, end); \
    }
#define PL_ROW_MAP(name, family, logarithm) \
    static void TYPED(name##_rows)(const void *job, int64_t begin, int64_t end, int worker) { \
        const name##_args args = name##_args_of(((const row_job *)job)->call); \
        map_rows(FAMILY(family), logarithm, args.x, args.dy, args.y, args.dx, job, begin, end, \
                 worker); \
    }
#include "../../losses.def"
