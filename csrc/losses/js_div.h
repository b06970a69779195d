/* Generalized Jensen-Shannon divergence b KL(P || M) + (1 - b) KL(Q || M), M = b P + (1 - b) Q
 * (Agarwal et al., arXiv:2306.13649, equation 1; Lin 1991). So that nothing overflows, m is
 * computed from the larger of p and q, x, and the smaller one, y, which has the factor s in m:
 *   m = x + s (y - x), log(m / y) = log(m / x) + |log(q / p)| */
#ifdef PL_LOSS_TABLE
PL_PAIR_LOSS(js_div, "beta:real", 0)
#else
INLINE void FORMULA(js_div)(pair_element *e, const SCALAR *option) {
    V zero = v_set(0), beta = v_set(option[js_div_beta]), rest = v_set(1 - option[js_div_beta]);
    V larger = v_max(e->q, e->p), share = v_select(v_less(e->p, e->q), beta, rest);
    V log_mx = v_log_grown(larger, share * (v_min(e->p, e->q) - larger));
    /* In this order of arguments a NaN in either row reaches both gradients. */
    V log_mp = log_mx + v_max(zero, e->log_ratio), log_mq = log_mx - v_min(zero, e->log_ratio);
    e->by_p = v_select(v_equal(e->p, zero), e->p, -beta * e->p * log_mp);
    e->by_q = v_select(v_equal(e->q, zero), e->q, -rest * e->q * log_mq);
    e->loss = e->by_p + e->by_q;
}
#endif
