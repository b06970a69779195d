/* The statistics of a row's weights, which a first walk over it takes. Build options, in addition
 * to those of rows.cl:
 *
 *   PREPARE                       defined if logits are scaled and capped before their use
 *   WITH_MEAN, WITH_CLASS_WEIGHT  defined if a class loss needs the mean log-probability, and if it
 *                                 has class weights
 */
#ifndef PYLOSS_CL_STATISTICS
#define PYLOSS_CL_STATISTICS
#include "rows.cl"

/* The weights w(scale x) of a row sum to total * e^(scale shift); shift is 0 unless the family is
 * shifted. */
typedef struct {
    REAL shift;
    SCALAR total;
    /* Of logits that are not masked, only with WITH_MEAN: their sum, with class weights times
     * these, the sum of the class weights, and their number. */
    SCALAR sum_x, sum_class_weight, count;
} statistics;

/* A prepared logit is factor x, capped if softcap > 0. */
typedef struct {
    REAL scale, factor, softcap;
} reading;
INLINE V prepared(V x, reading in) {
    V scaled = x * in.factor;
    return in.softcap > 0 ? capped(scaled, v_set(in.softcap)) : scaled;
}
#ifdef PREPARE
#define PREPARED(x, in) prepared(x, in)
#define CAPPED_GRADIENT(g, z, in) ((in).softcap > 0 ? (g) * cap_slope(z, v_set((in).softcap)) : (g))
#else
#define PREPARED(x, in) (x)
#define CAPPED_GRADIENT(g, z, in) (g)
#endif

INLINE V weight_of(V x, REAL shift, REAL scale) {
    return OF_FAMILY(_weight)(SHIFTED ? (x - shift) * scale : x);
}

#define TAKE_STATISTICS(name, type) \
    INLINE statistics name(const global STORED(type) * row, \
                           INDEX n CLASS_WEIGHT_PARAMETER, reading in GROUP_PARAMETER) { \
        const REAL scale = in.scale; \
        REAL shift = SHIFTED ? LOWEST : 0; \
        exact total = {0, 0}, sum_x = {0, 0}, sum_w = {0, 0}, count = {0, 0}; \
        EACH_BLOCK(begin, n) { \
            V x[BLOCK], high = v_set(LOWEST), sum = v_set(0), sum_b = v_set(0), \
                        sum_w_b = v_set(0), count_b = v_set(0); \
            EACH_OF_BLOCK(b) x[b] = v_set(LOWEST); \
            EACH_VECTOR(b, i, begin, n) x[b] = PREPARED(FETCH(type)(row, i, n, LOWEST), in); \
            if (SHIFTED) { \
                EACH_OF_BLOCK(b) high = x[b] > high ? x[b] : high; \
                REAL block_high = max_of(high); \
                if (block_high > shift) { \
                    rescale(&total, exp(((SCALAR)shift - (SCALAR)block_high) * scale)); \
                    shift = block_high; \
                } \
            } \
            /* While all logits are -inf, they add e^(-inf - 0) = 0. */ \
            REAL finite_shift = shift == LOWEST ? 0 : shift; \
            EACH_OF_BLOCK(b) { \
                sum += weight_of(x[b], finite_shift, scale); \
                MEAN_OF(x[b]) \
            } \
            WEIGHTED_MEAN_OF(x, begin, n) \
            add_to(&total, sum_of(sum)); \
            add_to(&sum_x, sum_of(sum_b)); \
            add_to(&sum_w, sum_of(sum_w_b)); \
            add_to(&count, sum_of(count_b)); \
        } \
        statistics s; \
        s.shift = SHIFTED ? (REAL)group_max((SCALAR)shift) : 0; \
        if (SHIFTED && shift != s.shift) \
            rescale(&total, exp(((SCALAR)shift - (SCALAR)s.shift) * scale)); \
        s.total = group_sum(value_of(total)); \
        s.sum_x = s.sum_class_weight = s.count = 0; \
        GROUP_MEAN \
        return s; \
    }
#define MEAN_OF(x)
#define WEIGHTED_MEAN_OF(x, begin, n)
#ifdef WITH_MEAN
#undef MEAN_OF
#ifdef WITH_CLASS_WEIGHT
#define MEAN_OF(x) count_b += v_select(v_equal(x, LOWEST), v_set(0), v_set(1));
#undef WEIGHTED_MEAN_OF
#define WEIGHTED_MEAN_OF(x, begin, n) \
    EACH_VECTOR(b, i, begin, n) { \
        V w = fetch_real(class_weight, i, n, 0); \
        sum_b += v_select(v_equal(x[b], LOWEST), v_set(0), w * x[b]); \
        sum_w_b += v_select(v_equal(x[b], LOWEST), v_set(0), w); \
    }
#else
#define MEAN_OF(x) \
    sum_b += v_select(v_equal(x, LOWEST), v_set(0), x); \
    count_b += v_select(v_equal(x, LOWEST), v_set(0), v_set(1));
#endif
#define GROUP_MEAN \
    s.sum_x = group_sum(value_of(sum_x)); \
    s.sum_class_weight = group_sum(value_of(sum_w)); \
    s.count = group_sum(value_of(count));
#else
#define GROUP_MEAN
#endif
#if GROUP == 1
#define GROUP_PARAMETER
#define GROUP_ARGUMENT
#else
#define GROUP_PARAMETER , local SCALAR *group_memory
#define GROUP_ARGUMENT , group_memory
#endif

#ifdef WITH_CLASS_WEIGHT
#define CLASS_WEIGHT_PARAMETER , const global REAL *class_weight
#define CLASS_WEIGHT_ARGUMENT , class_weight
#else
#define CLASS_WEIGHT_PARAMETER
#define CLASS_WEIGHT_ARGUMENT
#endif

TAKE_STATISTICS(statistics_of_0, IN0)

/* The gradient of a row that is ignored or whose dloss is 0. */
#define PUT_ZEROS(type, row, n) \
    EACH_BLOCK(begin, n) \
        EACH_VECTOR(b, i, begin, n) PUT(type)(v_set(0), row, i, n)

#endif
