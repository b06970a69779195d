/* Losses of two rows of logits. The second walk takes sums over both rows, and a third one writes
 * gradients that need these sums. Build options, in addition to those of statistics.cl:
 *
 *   Q_SUMS_TO_0  whether the derivatives by q's probabilities, times these, sum to 0
 *   KEEP         defined if the second walk stores terms where the gradient goes, instead of
 *                recomputing them; the gradients are of the computed type
 */
#include "statistics.cl"

TAKE_STATISTICS(statistics_of_1, IN1)

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
