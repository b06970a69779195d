/* Binary cross entropy of a logit x with a target t in [0, 1]:
 * |x| (x < 0 ? t : 1 - t) + log(1 + e^-|x|). */
#ifdef PL_LOSS_TABLE
PL_ELEMENT_LOSS(binary_cross_entropy, "")
#else
INLINE void FORMULA(binary_cross_entropy)(loss_element *e, const SCALAR *option) {
    (void)option;
    V zero = v_set(0), one = v_set(1), size = v_abs(e->x), decay = v_exp(-size);
    V share = v_select(v_less(e->x, zero), e->t, one - e->t);
    e->loss = v_select(v_equal(share, zero), zero, size * share) + v_log1p(decay);
    e->by_x = v_select(v_less(e->x, zero), decay, one) / (one + decay) - e->t;
    e->by_t = -e->x;
}
#endif
