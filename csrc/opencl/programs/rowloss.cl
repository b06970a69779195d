/* Row losses, one work-group per row, over the formulas of losses/, which the C kernels share. A
 * first walk over the row computes the statistics of its weights; a second one computes sums over
 * both rows and gradients. A program is one of these kernels for one loss. Its build options
 * define, in addition to those of types.cl:
 *
 *   CLASS, PAIR, COSINE, SPARSE, ELEMENT, MAP, ARGMAX   one of them: the kernel
 *   LOSS, FAMILY, ...                   the loss's line in losses.def
 *   IN0, IN1, OUT0, OUT1                element types; an array without one is absent
 *   WITH_MEAN, WITH_CLASS_WEIGHT        defined if a class loss needs the mean log-probability, and
 *                                       if it has class weights
 *   KEEP                                defined if the first walk stores terms where the gradient
 *                                       goes, instead of recomputing them; the gradients are of the
 *                                       computed type
 */
#include "types.cl"
/* A family's properties in families.def, as constants. */
#define PL_FAMILY(name, shifted, sloped) \
    enum { name##_is_shifted = shifted, name##_is_sloped = sloped };
#include "../../families.def"
#include "options.h"
#include "../../losses/formulas.h"
#include "../../losses.def"

#define OF_FAMILY(what) CAT(FAMILY, what)
#define STORED(type) CAT(stored_, type)
#define FETCH(type) CAT(fetch_, type)
#define PUT(type) CAT(put_, type)
#define LOWEST (-(REAL)INFINITY) /* its weight is 0: a masked logit, or past a row's end */

#define SHIFTED OF_FAMILY(_is_shifted)
#define SLOPED OF_FAMILY(_is_sloped)

/* Parameters of the kernels. */
#ifdef OUT0
#define OUT0_ARGUMENT(name) ARRAY(STORED(OUT0), name),
#else
#define OUT0_ARGUMENT(name)
#endif
#ifdef OUT1
#define OUT1_ARGUMENT(name) ARRAY(STORED(OUT1), name),
#else
#define OUT1_ARGUMENT(name)
#endif
#ifdef IN1
#define IN1_ARGUMENT(name) ARRAY(const STORED(IN1), name),
#else
#define IN1_ARGUMENT(name)
#endif
#define LOSS_ARGUMENTS ARRAY(const REAL, dloss), ARRAY(REAL, loss),
#define OPTIONS SCALAR option0, SCALAR option1, SCALAR option2, SCALAR option3
#define GIVEN_OPTIONS \
    { option0, option1, option2, option3 }

#if defined(CLASS) || defined(PAIR) || defined(COSINE) || defined(SPARSE) || defined(MAP)

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
#ifdef PAIR
TAKE_STATISTICS(statistics_of_1, IN1)
#endif

/* The gradient of a row that is ignored or whose dloss is 0. */
#define PUT_ZEROS(type, row, n) \
    EACH_BLOCK(begin, n) \
        EACH_VECTOR(b, i, begin, n) PUT(type)(v_set(0), row, i, n)

#endif

#ifdef CLASS
KERNEL row_loss(ARRAY(const STORED(IN0), x), ARRAY(const int, labels),
                ARRAY(const REAL, class_weight), ARRAY(const REAL, dloss), ARRAY(const REAL, dlse),
                ARRAY(REAL, loss), ARRAY(REAL, lse), OUT0_ARGUMENT(dx) long length, OPTIONS) {
    GROUP_MEMORY
    const INDEX n = (INDEX)length;
    const long row = get_group_id(0);
    const global STORED(IN0) *x = ROW(x, row * length);
    const SCALAR option[4] = GIVEN_OPTIONS;
    const int label = *ROW(labels, row);
    const SCALAR given = dloss_data ? *ROW(dloss, row) : 1,
                 given_lse = dlse_data ? *ROW(dlse, row) : 0;
#ifdef WITH_CLASS_WEIGHT
    const global REAL *class_weight = ROW(class_weight, 0);
#endif
#ifdef OUT0
    global STORED(OUT0) *dx = ROW(dx, row * length);
    const int zero_gradient = label < 0 || (given == 0 && given_lse == 0);
    if (zero_gradient) PUT_ZEROS(OUT0, dx, n);
#endif
    if (label < 0) {
        if (LANE == 0) {
            *ROW(loss, row) = 0;
            if (lse_data) *ROW(lse, row) = 0;
        }
        return;
    }
    reading in = {1, 1, 0};
#ifdef PREPARE
    in.softcap = (REAL)option[SOFTCAP_OPTION];
#endif
    /* Read before another work-item may write dx, which may be x. */
    V raw = v_set(CAT(load1_, IN0)(x + label)), at_label = PREPARED(raw, in);
    statistics s = statistics_of_0(x, n CLASS_WEIGHT_ARGUMENT, in GROUP_ARGUMENT);
    SCALAR log_total = log(s.total);
    class_row r = {0};
    r.log_p = ((SCALAR)OF_FAMILY(_log_weight)(at_label).s0 - (SCALAR)s.shift) - log_total;
    r.log_sum = log_total + (SCALAR)s.shift;
    /* What multiplies -log_sum in the label's term and in the mean. */
    SCALAR of_label = 1, of_mean = 1;
#ifdef WITH_CLASS_WEIGHT
    of_label = class_weight[label];
    r.log_p = of_label > 0 ? of_label * r.log_p : 0; /* also if it is -inf */
#endif
#ifdef WITH_MEAN
#ifdef WITH_CLASS_WEIGHT
    of_mean = s.sum_class_weight / s.count;
#endif
    r.mean_log_p = (s.sum_x / s.count - of_mean * (SCALAR)s.shift) - of_mean * log_total;
#endif
    LOSS(&r, option);
    r.d_log_p *= of_label;
    if (LANE == 0) {
        *ROW(loss, row) = (REAL)r.loss;
        if (lse_data) *ROW(lse, row) = (REAL)r.log_sum;
    }
#ifdef OUT0
    if (zero_gradient) return;
    const V by_p =
        v_set((given * (r.d_log_sum - r.d_log_p - of_mean * r.d_mean_log_p) + given_lse) / s.total);
    const REAL by_label = (REAL)(given * r.d_log_p);
#ifdef WITH_MEAN
    const V by_mean = v_set(given * r.d_mean_log_p / s.count);
#endif
    EACH_BLOCK(begin, n) {
        V raws[BLOCK];
        EACH_VECTOR(b, i, begin, n) raws[b] = FETCH(IN0)(x, i, n, LOWEST);
        EACH_VECTOR(b, i, begin, n) {
            V z = PREPARED(raws[b], in), g = weight_of(z, s.shift, 1) * by_p;
#ifdef WITH_MEAN
#ifdef WITH_CLASS_WEIGHT
            V by_class = by_mean * fetch_real(class_weight, i, n, 0);
#else
            V by_class = by_mean;
#endif
            g += v_select(v_equal(z, LOWEST), v_set(0), by_class);
#endif
            if (label >= i && label - i < WIDTH) {
                REAL a[WIDTH];
                VSTORE(g, 0, a);
                a[label - i] += by_label;
                g = VLOAD(0, a);
            }
            if (SLOPED) g *= OF_FAMILY(_slope)(z);
            PUT(OUT0)(CAPPED_GRADIENT(g, z, in), dx, i, n);
        }
    }
#endif
}
#endif

#ifdef PAIR
/* The element of two rows at logits x of q and y of p. */
INLINE pair_element element_at(V x, V y, statistics q, statistics p, REAL scale, V by_q, V by_p,
                               V offset, const SCALAR *option) {
    pair_element e;
    V over_q = (x - q.shift) * scale, over_p = (y - p.shift) * scale;
    e.q = v_exp(over_q) * by_q;
    e.p = v_exp(over_p) * by_p;
    e.log_ratio = ((x - q.shift) - (y - p.shift)) * scale - offset;
    LOSS(&e, option);
    return e;
}

#define READ_Q(i) PREPARED(FETCH(IN0)(xq, i, n, LOWEST), in_q)
#define READ_P(i) PREPARED(FETCH(IN1)(xp, i, n, LOWEST), in_p)

KERNEL row_loss(ARRAY(const STORED(IN0), q), ARRAY(const STORED(IN1), p), ARRAY(const int, labels),
                LOSS_ARGUMENTS OUT0_ARGUMENT(dq) OUT1_ARGUMENT(dp) long length, SCALAR scale_q,
                SCALAR softcap_q, SCALAR scale_p, SCALAR softcap_p, OPTIONS) {
    GROUP_MEMORY
    const INDEX n = (INDEX)length;
    const long row = get_group_id(0);
    const global STORED(IN0) *xq = ROW(q, row * length);
    const global STORED(IN1) *xp = ROW(p, row * length);
    const SCALAR option[4] = GIVEN_OPTIONS;
    const int counted = !labels_data || *ROW(labels, row) >= 0;
    const SCALAR given = !counted ? 0 : dloss_data ? *ROW(dloss, row) : 1;
    const REAL factor_q = (REAL)(given * scale_q), factor_p = (REAL)(given * scale_p);
#ifdef PREPARE
    const REAL scale = 1;
#else
    const REAL scale = (REAL)scale_q;
#endif
    const reading in_q = {scale, (REAL)scale_q, (REAL)softcap_q},
                  in_p = {scale, (REAL)scale_p, (REAL)softcap_p};
#ifdef OUT0
    global STORED(OUT0) *dq = ROW(dq, row * length);
    if (given == 0) PUT_ZEROS(OUT0, dq, n);
#endif
#ifdef OUT1
    global STORED(OUT1) *dp = ROW(dp, row * length);
    if (given == 0) PUT_ZEROS(OUT1, dp, n);
#endif
    if (!counted) {
        if (LANE == 0) *ROW(loss, row) = 0;
        return;
    }
    statistics q = statistics_of_0(xq, n, in_q GROUP_ARGUMENT),
               p = statistics_of_1(xp, n, in_p GROUP_ARGUMENT);
    const V by_q = v_set(1 / q.total), by_p = v_set(1 / p.total),
            offset = v_set(log(q.total) - log(p.total));
    exact total = {0, 0}, sum_q = {0, 0}, sum_p = {0, 0};
    EACH_BLOCK(begin, n) {
        V x[BLOCK], y[BLOCK], l = v_set(0), lq = v_set(0), lp = v_set(0);
        EACH_VECTOR(b, i, begin, n) {
            x[b] = READ_Q(i);
            y[b] = READ_P(i);
        }
        EACH_VECTOR(b, i, begin, n) {
            pair_element e = element_at(x[b], y[b], q, p, scale, by_q, by_p, offset, option);
            l += e.loss;
            lq += e.by_q;
            lp += e.by_p;
#if defined(OUT0) && Q_SUMS_TO_0
            if (given != 0)
                PUT(OUT0)(CAPPED_GRADIENT(e.by_q * factor_q, x[b], in_q), dq, i, n);
#elif defined(OUT0) && defined(KEEP)
            if (given != 0) PUT(OUT0)(e.by_q, dq, i, n);
#endif
#if defined(OUT1) && defined(KEEP)
            if (given != 0) PUT(OUT1)(e.by_p, dp, i, n);
#endif
        }
        add_to(&total, sum_of(l));
        add_to(&sum_q, sum_of(lq));
        add_to(&sum_p, sum_of(lp));
    }
    SCALAR all = group_sum(value_of(total));
    /* A divergence is not negative; rounding of equal rows may make it so. */
    if (LANE == 0) *ROW(loss, row) = all < 0 ? 0 : (REAL)all;
#if (defined(OUT0) && !Q_SUMS_TO_0) || defined(OUT1)
    if (given == 0) return;
    /* gradient = factor (by - probability * sum) */
    const V all_q = v_set(group_sum(value_of(sum_q))), all_p = v_set(group_sum(value_of(sum_p)));
#ifdef KEEP
    /* The first walk stored by_q and by_p where the gradients go. */
    EACH_BLOCK(begin, n)
        EACH_VECTOR(b, i, begin, n) {
#if defined(OUT0) && !Q_SUMS_TO_0
            V x = READ_Q(i), prob_q = v_exp((x - q.shift) * scale) * by_q;
            V g = (FETCH(OUT0)(dq, i, n, 0) - prob_q * all_q) * factor_q;
            PUT(OUT0)(CAPPED_GRADIENT(g, x, in_q), dq, i, n);
#endif
#ifdef OUT1
            V y = READ_P(i), prob_p = v_exp((y - p.shift) * scale) * by_p;
            V h = (FETCH(OUT1)(dp, i, n, 0) - prob_p * all_p) * factor_p;
            PUT(OUT1)(CAPPED_GRADIENT(h, y, in_p), dp, i, n);
#endif
        }
#else
    EACH_BLOCK(begin, n) {
        V x[BLOCK], y[BLOCK];
        EACH_VECTOR(b, i, begin, n) {
            x[b] = READ_Q(i);
            y[b] = READ_P(i);
        }
        EACH_VECTOR(b, i, begin, n) {
            pair_element e = element_at(x[b], y[b], q, p, scale, by_q, by_p, offset, option);
#if defined(OUT0) && !Q_SUMS_TO_0
            PUT(OUT0)(CAPPED_GRADIENT((e.by_q - e.q * all_q) * factor_q, x[b], in_q), dq, i, n);
#endif
#ifdef OUT1
            PUT(OUT1)(CAPPED_GRADIENT((e.by_p - e.p * all_p) * factor_p, y[b], in_p), dp, i, n);
#endif
        }
    }
#endif
#endif
}
#endif

#ifdef COSINE
/* 1 - x y / (|x| |y|); 1, with gradient 0, where a row is 0. Classes that either row masks are left
 * out. */
KERNEL row_loss(ARRAY(const STORED(IN0), q), ARRAY(const STORED(IN1), p), ARRAY(const int, labels),
                LOSS_ARGUMENTS OUT0_ARGUMENT(dq) OUT1_ARGUMENT(dp) long length, SCALAR scale_q,
                SCALAR softcap_q, SCALAR scale_p, SCALAR softcap_p) {
    GROUP_MEMORY
    const INDEX n = (INDEX)length;
    const long row = get_group_id(0);
    const global STORED(IN0) *xq = ROW(q, row * length);
    const global STORED(IN1) *xp = ROW(p, row * length);
    const int counted = !labels_data || *ROW(labels, row) >= 0;
    const SCALAR given = !counted ? 0 : dloss_data ? *ROW(dloss, row) : 1;
    /* A scale without a cap changes no angle. */
    const reading in_q = {1, softcap_q > 0 ? (REAL)scale_q : 1, (REAL)softcap_q},
                  in_p = {1, softcap_p > 0 ? (REAL)scale_p : 1, (REAL)softcap_p};
#define TAKE_BOTH(x, y, i) \
    V x = PREPARED(FETCH(IN0)(xq, i, n, 0), in_q), y = PREPARED(FETCH(IN1)(xp, i, n, 0), in_p); \
    const V raw_##x = x, raw_##y = y; \
    x = v_select(v_equal(raw_##x, v_set(LOWEST)), v_set(0), \
                 v_select(v_equal(raw_##y, v_set(LOWEST)), v_set(0), raw_##x)); \
    y = v_select(v_equal(raw_##x, v_set(LOWEST)), v_set(0), \
                 v_select(v_equal(raw_##y, v_set(LOWEST)), v_set(0), raw_##y))
    exact of_xy = {0, 0}, of_xx = {0, 0}, of_yy = {0, 0};
    EACH_BLOCK(begin, n) {
        V xy = v_set(0), xx = v_set(0), yy = v_set(0);
        EACH_VECTOR(b, i, begin, n) {
            TAKE_BOTH(x, y, i);
            xy += x * y;
            xx += x * x;
            yy += y * y;
        }
        add_to(&of_xy, sum_of(xy));
        add_to(&of_xx, sum_of(xx));
        add_to(&of_yy, sum_of(yy));
    }
    const SCALAR xy = group_sum(value_of(of_xy)), xx = group_sum(value_of(of_xx)),
                 yy = group_sum(value_of(of_yy));
    const int zero = !counted || xx == 0 || yy == 0;
    const SCALAR norms = zero ? 1 : sqrt(xx) * sqrt(yy), cosine = zero ? 0 : xy / norms,
                 distance = 1 - cosine;
    if (LANE == 0) *ROW(loss, row) = (REAL)(!counted ? 0 : distance < 0 ? 0 : distance);
#if defined(OUT0) || defined(OUT1)
    const int none = zero || given == 0;
    const REAL scaled_q = (REAL)(given * in_q.factor), scaled_p = (REAL)(given * in_p.factor);
    const V own_q = v_set(none ? 0 : scaled_q * cosine / xx),
            own_p = v_set(none ? 0 : scaled_p * cosine / yy),
            other_q = v_set(-scaled_q / norms), other_p = v_set(-scaled_p / norms);
    EACH_BLOCK(begin, n)
        EACH_VECTOR(b, i, begin, n) {
            TAKE_BOTH(x, y, i);
            const V g = CAPPED_GRADIENT(x * own_q + y * other_q, raw_x, in_q),
                    h = CAPPED_GRADIENT(y * own_p + x * other_p, raw_y, in_p);
#ifdef OUT0
            PUT(OUT0)(none ? v_set(0) : g, ROW(dq, row * length), i, n);
#endif
#ifdef OUT1
            PUT(OUT1)(none ? v_set(0) : h, ROW(dp, row * length), i, n);
#endif
        }
#endif
}
#endif

#ifdef SPARSE
/* The loss with the student as q, or as p if REVERSE; `by` is the student's derivative. */
INLINE V student_element(V student, V teacher, V log_ratio, const SCALAR *option, V *by) {
    pair_element e;
    e.q = REVERSE ? teacher : student;
    e.p = REVERSE ? student : teacher;
    e.log_ratio = REVERSE ? -log_ratio : log_ratio;
    LOSS(&e, option);
    *by = REVERSE ? e.by_p : e.by_q;
    return e.loss;
}

/* WIDTH entries from j on: the capped logits and the probabilities of the student, the teacher's
 * probabilities, their part of the loss, and the student's derivatives. */
typedef struct {
    V x, student, teacher, loss, by;
} entries;

/* The teacher is known at `count` classes; all others are one more class, the rest. */
KERNEL row_loss(ARRAY(const STORED(IN0), q), ARRAY(const int, ids), ARRAY(const REAL, logp),
                ARRAY(const REAL, shares), ARRAY(const REAL, left), ARRAY(const int, labels),
                LOSS_ARGUMENTS OUT0_ARGUMENT(dq) long length, long count, SCALAR scale_q,
                SCALAR softcap_q, SCALAR scale_p, OPTIONS) {
    GROUP_MEMORY
    const INDEX n = (INDEX)length;
    const long row = get_group_id(0);
    const global STORED(IN0) *x = ROW(q, row * length);
    const global int *id_of = ROW(ids, row * count);
    const global REAL *logp_of = ROW(logp, row * count);
    const SCALAR option[4] = GIVEN_OPTIONS;
    const int counted = !labels_data || *ROW(labels, row) >= 0;
    const SCALAR given = !counted ? 0 : dloss_data ? *ROW(dloss, row) : 1;
#ifdef OUT0
    global STORED(OUT0) *dq = ROW(dq, row * length);
    if (given == 0) PUT_ZEROS(OUT0, dq, n);
#endif
    if (!counted) {
        if (LANE == 0) *ROW(loss, row) = 0;
        return;
    }
#ifdef PREPARE
    const reading in = {1, (REAL)scale_q, (REAL)softcap_q};
#else
    const reading in = {(REAL)scale_q, 1, 0};
#endif
    const REAL by_p = (REAL)scale_p;
    statistics s = statistics_of_0(x, n, in GROUP_ARGUMENT);
    const V over = v_set(1 / s.total), log_total = v_set(log(s.total));
    V log_sum = v_set(0);
#if RENORMALIZE
    SCALAR high = LOWEST;
    for (long j = LANE; j < count; j += GROUP)
        if (id_of[j] >= 0 && !(logp_of[j] <= high)) high = logp_of[j];
    high = group_max(high);
    exact powers = {0, 0};
    for (long j = LANE; j < count; j += GROUP)
        if (id_of[j] >= 0) add_to(&powers, exp((logp_of[j] - high) * scale_p));
    log_sum = v_set(log(group_sum(value_of(powers))) + high * scale_p);
#endif
#define EACH_ENTRIES(j) for (long j = LANE * WIDTH; j < count; j += GROUP * WIDTH)
#define TAKE_ENTRIES(e, j) \
    entries e; \
    do { \
        REAL z[WIDTH], l[WIDTH], share[WIDTH]; \
        for (int b = 0; b < WIDTH; b++) { \
            const int id = j + b < count ? id_of[j + b] : -1; \
            z[b] = id < 0 ? LOWEST : CAT(load1_, IN0)(x + id); \
            l[b] = id < 0 ? LOWEST : logp_of[j + b]; \
            share[b] = id < 0 || !shares_data ? 0 : *ROW(shares, row * count + j + b); \
        } \
        e.x = PREPARED(VLOAD(0, z), in); \
        V logp = VLOAD(0, l) * by_p - log_sum; \
        V log_q = (e.x - s.shift) * in.scale - log_total; \
        e.student = weight_of(e.x, s.shift, in.scale) * over; \
        e.teacher = shares_data ? VLOAD(0, share) : v_exp(logp); \
        e.loss = student_element(e.student, e.teacher, CROSS ? log_q : log_q - logp, option, \
                                 &e.by); \
    } while (0)
    exact of_loss = {0, 0}, of_student = {0, 0}, of_teacher = {0, 0}, of_by = {0, 0};
    SCALAR known = 0;
    EACH_ENTRIES(j) {
        TAKE_ENTRIES(e, j);
        add_to(&of_loss, sum_of(e.loss));
        add_to(&of_by, sum_of(e.by));
        add_to(&of_student, sum_of(e.student));
        add_to(&of_teacher, sum_of(e.teacher));
        for (int b = 0; b < WIDTH && j + b < count; b++) known += id_of[j + b] >= 0;
    }
    known = group_sum(known);
    SCALAR student = 1 - group_sum(value_of(of_student));
    SCALAR teacher = 1 - group_sum(value_of(of_teacher));
    /* A small difference of large sums has few digits: it is taken of exact sums. */
    if (student < (SCALAR)0.25) {
        exact rest = {0, 0};
        EACH_BLOCK(begin, n)
            EACH_VECTOR(b, i, begin, n) {
                REAL a[WIDTH];
                VSTORE(weight_of(PREPARED(FETCH(IN0)(x, i, n, LOWEST), in), s.shift, in.scale), 0,
                       a);
                for (int c = 0; c < WIDTH; c++) add_to(&rest, a[c]);
            }
        EACH_ENTRIES(j) {
            TAKE_ENTRIES(e, j);
            REAL a[WIDTH];
            VSTORE(weight_of(e.x, s.shift, in.scale), 0, a);
            for (int c = 0; c < WIDTH; c++) add_to(&rest, -a[c]);
        }
        const exact all = group_exact(rest);
        student = fmax(value_of(all), (SCALAR)0) / s.total;
    }
    if (RENORMALIZE || shares_data || known >= length) teacher = 0;
    else if (left_data) teacher = *ROW(left, row);
    else if (teacher < (sizeof(REAL) == 4 ? (SCALAR)1e-6 : (SCALAR)1e-15)) teacher = 0;
    V by_rest;
    const V of_rest = student_element(v_set(student), v_set(teacher),
                                      v_set(log(student) - (CROSS ? 0 : log(teacher))), option,
                                      &by_rest);
    REAL first[WIDTH], first_by[WIDTH];
    VSTORE(of_rest, 0, first);
    VSTORE(by_rest, 0, first_by);
    SCALAR all = group_sum(value_of(of_loss)) + first[0];
    const SCALAR sum = group_sum(value_of(of_by)) + first_by[0];
    if (LANE == 0) *ROW(loss, row) = all < 0 && !shares_data ? 0 : (REAL)all;
#ifdef OUT0
    if (given == 0) return;
    const REAL factor = (REAL)(given * scale_q);
    const V per_prob = v_set((student > 0 ? first_by[0] / student : 0) - sum) * factor * over;
    EACH_BLOCK(begin, n)
        EACH_VECTOR(b, i, begin, n) {
            V z = PREPARED(FETCH(IN0)(x, i, n, LOWEST), in);
            V g = weight_of(z, s.shift, in.scale) * per_prob;
            PUT(OUT0)(CAPPED_GRADIENT(g, z, in), dq, i, n);
        }
    barrier(CLK_GLOBAL_MEM_FENCE);
    EACH_ENTRIES(j) {
        TAKE_ENTRIES(e, j);
        V g = (e.by - e.student * (REAL)sum) * factor;
        REAL a[WIDTH];
        VSTORE(CAPPED_GRADIENT(g, e.x, in), 0, a);
        for (int b = 0; b < WIDTH && j + b < count; b++)
            if (id_of[j + b] >= 0) CAT(store1_, OUT0)(a[b], dq + id_of[j + b]);
    }
#endif
}
#endif

#ifdef MAP
KERNEL row_loss(ARRAY(const STORED(IN0), x),
                IN1_ARGUMENT(dy) OUT0_ARGUMENT(y) OUT1_ARGUMENT(dx) long length) {
    GROUP_MEMORY
    const INDEX n = (INDEX)length;
    const long row = get_group_id(0);
    const global STORED(IN0) *x = ROW(x, row * length);
    const reading in = {1, 1, 0};
    statistics s = statistics_of_0(x, n, in GROUP_ARGUMENT);
    const V by_p = v_set(1 / s.total), shift = v_set(s.shift), log_total = v_set(log(s.total));
    exact dot = {0, 0};
    EACH_BLOCK(begin, n) {
        V sum = v_set(0);
        EACH_VECTOR(b, i, begin, n) {
            V v = FETCH(IN0)(x, i, n, LOWEST), prob = weight_of(v, s.shift, 1) * by_p;
#ifdef OUT0
            const V y = LOGARITHM ? (OF_FAMILY(_log_weight)(v) - shift) - log_total : prob;
            PUT(OUT0)(y, ROW(y, row * length), i, n);
#endif
#ifdef IN1
            V d = FETCH(IN1)(ROW(dy, row * length), i, n, 0);
            sum += LOGARITHM ? d : d * prob;
#endif
        }
        add_to(&dot, sum_of(sum));
    }
#ifdef OUT1
    const V all = v_set(group_sum(value_of(dot)));
    EACH_BLOCK(begin, n) {
        EACH_VECTOR(b, i, begin, n) {
            V v = FETCH(IN0)(x, i, n, LOWEST), prob = weight_of(v, s.shift, 1) * by_p, d = v_set(0);
#ifdef IN1
            d = FETCH(IN1)(ROW(dy, row * length), i, n, 0);
#endif
            V g = LOGARITHM ? d - prob * all : prob * (d - all);
            if (SLOPED) g *= OF_FAMILY(_slope)(v);
            PUT(OUT1)(g, ROW(dx, row * length), i, n);
        }
    }
#endif
}
#endif

#ifdef ELEMENT
/* All elements as one row that the work-groups share: `length` is their number. */
KERNEL row_loss(ARRAY(const STORED(IN0), x), ARRAY(const STORED(IN1), t),
                LOSS_ARGUMENTS OUT0_ARGUMENT(dx) OUT1_ARGUMENT(dt) long length, OPTIONS) {
    const SCALAR option[4] = GIVEN_OPTIONS;
    const long i = get_global_id(0) * WIDTH, n = length;
    if (i >= n) return;
    loss_element e;
    e.x = FETCH(IN0)(ROW(x, 0), i, n, 0);
    e.t = FETCH(IN1)(ROW(t, 0), i, n, 0);
    LOSS(&e, option);
    V given = v_set(1);
    if (dloss_data) given = fetch_real(ROW(dloss, 0), i, n, 0);
    put_real(e.loss, ROW(loss, 0), i, n);
#ifdef OUT0
    PUT(OUT0)(v_select(v_equal(given, v_set(0)), v_set(0), e.by_x * given), ROW(dx, 0), i, n);
#endif
#ifdef OUT1
    PUT(OUT1)(v_select(v_equal(given, v_set(0)), v_set(0), e.by_t * given), ROW(dt, 0), i, n);
#endif
}
#endif

#ifdef ARGMAX
/* Whether element a at i ranks before b at j: NaN first, then the larger, then the earlier. */
INLINE int comes_first(REAL a, long i, REAL b, long j) {
    int odd_a = a != a, odd_b = b != b;
    if (odd_a != odd_b) return odd_a;
    if (!odd_a && a != b) return a > b;
    return i < j;
}

KERNEL row_loss(ARRAY(const STORED(IN0), x), ARRAY(int, index), long length) {
    const INDEX n = (INDEX)length;
    const long row = get_group_id(0);
    const global STORED(IN0) *x = ROW(x, row * length);
    REAL best = LOWEST;
    long at = LONG_MAX;
    EACH_BLOCK(begin, n)
        EACH_VECTOR(b, i, begin, n) {
            V v = FETCH(IN0)(x, i, n, LOWEST);
            REAL a[WIDTH];
            REAL high = max_of(v);
            /* Rare: an element is at least the best so far, or NaN. */
            if (!(high < best) || any(isnan(v))) {
                VSTORE(v, 0, a);
                for (int j = 0; j < WIDTH && i + j < n; j++)
                    if (comes_first(a[j], i + j, best, at)) {
                        best = a[j];
                        at = i + j;
                    }
            }
        }
#if GROUP > 1
    local REAL bests[GROUP];
    local long ats[GROUP];
    bests[LANE] = best;
    ats[LANE] = at;
    for (int h = GROUP / 2; h; h /= 2) {
        barrier(CLK_LOCAL_MEM_FENCE);
        if (LANE < h && comes_first(bests[LANE + h], ats[LANE + h], bests[LANE], ats[LANE])) {
            bests[LANE] = bests[LANE + h];
            ats[LANE] = ats[LANE + h];
        }
    }
    at = ats[0]; /* work-item 0 wrote it, and reads it below */
#endif
    if (LANE == 0) *ROW(index, row) = (int)at;
}
#endif
