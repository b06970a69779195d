/* Generalised Jensen-Shannon divergence b KL(P || M) + (1 - b) KL(Q || M), M = b P + (1 - b) Q (Agarwal et al., arXiv:2306.13649,
 * equation 1; Lin 1991). With t = log(q / p) <= 0: log(m / p) = log(1 + (1 - b)(e^t - 1)) and log(m / q) = log(m / p) - t; with
 * t > 0 the roles change. So nothing overflows, and close rows lose no digits. */
#ifdef PL_LOSS_TABLE
PL_PAIR_LOSS(js_div, "beta:real", 0)
#else
INLINE void FORMULA(js_div)(FORMULA(pair_element) *e, const SCALAR *option) {
    V zero = v_set(0), beta = v_set(option[0]), rest = v_set(1 - option[0]), t = e->log_ratio;
    V share = v_select(t > zero, beta, rest);
    V larger = v_log1p(share * v_expm1(-v_abs(t))); /* log(m / max(p, q)) */
    V log_mp = v_select(t > zero, larger + t, larger), log_mq = v_select(t > zero, larger, larger - t);
    e->by_p = v_select(e->p == zero, e->p, -beta * e->p * log_mp);
    e->by_q = v_select(e->q == zero, e->q, -rest * e->q * log_mq);
    e->loss = e->by_p + e->by_q;
}
#endif
