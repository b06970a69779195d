/* Total variation distance sum |p - q| / 2 (Wen et al., arXiv:2307.15190). Where p = q its
 * derivative is taken as 0. In this order of arguments a NaN, of either row, goes on into d. */
#ifdef PL_LOSS_TABLE
PL_PAIR_LOSS(tvd, "", 0)
#else
INLINE void FORMULA(tvd)(pair_element *e, const SCALAR *option) {
    (void)option;
    V up = v_set((SCALAR)0.5), d = v_max(e->q, e->p) - v_min(e->p, e->q);
    V sign = v_select(v_less(e->p, e->q), up, v_select(v_less(e->q, e->p), -up, d));
    e->loss = d * up;
    e->by_q = e->q * sign;
    e->by_p = -e->p * sign;
}
#endif
