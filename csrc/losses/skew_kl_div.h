/* Skewed Kullback-Leibler divergence KL(P || M) = sum p log(p / m), M = s P + (1 - s) Q with
 * 0 < s < 1 (Ko et al., arXiv:2402.03898, equation 4). m is at least s p: the loss is at most
 * -log s. As in js_div.h, log(m / p) comes from m relative to the larger of p and q. */
#ifdef PL_LOSS_TABLE
PL_PAIR_LOSS(skew_kl_div, "skew:real", 0)
#else
INLINE void FORMULA(skew_kl_div)(pair_element *e, const SCALAR *option) {
    V zero = v_set(0), skew = v_set(option[skew_kl_div_skew]),
      rest = v_set(1 - option[skew_kl_div_skew]);
    V larger = v_max(e->q, e->p), share = v_select(v_less(e->p, e->q), skew, rest);
    V log_mx = v_log_grown(larger, share * (v_min(e->p, e->q) - larger));
    V log_mp = log_mx + v_max(zero, e->log_ratio), m = skew * e->p + rest * e->q;
    /* (m - p) / m; both derivatives vanish where p = q. */
    V apart = v_select(v_equal(m, zero), m, rest * (e->q - e->p) / m);
    e->loss = v_select(v_equal(e->p, zero), e->p, -e->p * log_mp);
    e->by_p = e->loss + skew * e->p * apart;
    e->by_q = rest * e->q * apart;
}
#endif
