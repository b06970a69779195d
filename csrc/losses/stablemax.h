/* The stablemax family, and the maps to its probabilities and their logarithms (Prieto et al.,
 * arXiv:2501.04697, section 4):
 *   s(x) = x + 1 for x >= 0, 1 / (1 - x) for x < 0
 *   log s(x) = sign(x) log(1 + |x|)
 *   s'(x) / s(x) = 1 / (1 + |x|) */
#ifdef PL_LOSS_TABLE
PL_ROW_MAP(stablemax, stablemax, 0)
PL_ROW_MAP(log_stablemax, stablemax, 1)
#else
INLINE V FORMULA(stablemax_weight)(V x) {
    V y = v_set(1) + v_abs(x);
    return v_select(v_less(x, v_set(0)), v_reciprocal(y), y);
}
INLINE V FORMULA(stablemax_log_weight)(V x) {
    V y = v_log1p(v_abs(x));
    return v_select(v_less(x, v_set(0)), -y, y);
}
INLINE V FORMULA(stablemax_slope)(V x) { return v_reciprocal(v_set(1) + v_abs(x)); }
#endif
