/* Kullback-Leibler divergence sum p log(p / q) from the student q to the teacher p, both softmax of
 * logits / temperature (Hinton et al., arXiv:1503.02531). It is infinite if a class has p > 0 and
 * q = 0. */
#ifdef PL_LOSS_TABLE
PL_PAIR_LOSS(kl_div, "", 1)
#else
INLINE void FORMULA(kl_div)(pair_element *e, const SCALAR *option) {
    (void)option;
    e->loss = v_select(v_equal(e->p, v_set(0)), e->p, -e->p * e->log_ratio);
    e->by_q = e->q - e->p;
    e->by_p = e->loss;
}
#endif
