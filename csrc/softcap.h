/* Softcapping of logits and scores, once for C and OpenCL C. The including file defines V, INLINE
 * and the functions v_set, v_abs, v_expm1, v_equal, v_less and v_select on V; losses/formulas.h
 * says what they do. */

/* c tanh(x / c); -inf stays -inf, so that a masked class stays masked. tanh |y| = -e / (2 + e) with
 * e = e^(-2|y|) - 1. */
INLINE V capped(V x, V softcap) {
    V e = v_expm1(v_set(-2) * v_abs(x) / softcap), t = -e / (v_set(2) + e) * softcap;
    return v_select(v_equal(x, v_set(-INFINITY)), x, v_select(v_less(x, v_set(0)), -t, t));
}
/* The derivative of the cap by its input, at the capped value z; 0 at -inf. */
INLINE V cap_slope(V z, V softcap) {
    V t = z / softcap;
    return v_select(v_equal(z, v_set(-INFINITY)), v_set(0), v_set(1) - t * t);
}
