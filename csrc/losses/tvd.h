/* Total variation distance sum |p - q| / 2 (Wen et al., arXiv:2307.15190). Where p = q its
 * derivative is taken as 0; the sign of a NaN is that NaN. */
#ifdef PL_LOSS_TABLE
PL_PAIR_LOSS(tvd, "", 0)
#else
INLINE void FORMULA(tvd)(pair_element *e, const SCALAR *option) {
    (void)option;
    V zero = v_set(0), up = v_set((SCALAR)0.5), d = e->q - e->p;
    V sign = v_select(v_less(zero, d), up, v_select(v_less(d, zero), -up, d));
    e->loss = d * sign;
    e->by_q = e->q * sign;
    e->by_p = -e->p * sign;
}
#endif
