/* What the formulas of row losses are written in. The text of losses/ compiles as C, once for
 * float32 and once for float64 vectors, and as OpenCL C; whoever includes it defines first:
 *
 *   FORMULA(name)  the name of a function for the computed type
 *   V              some elements of a row at once (a vector, or one value)
 *   SCALAR         one value, in the most exact type there is
 *   v_set(a) v_exp(x) v_expm1(x) v_log1p(x) v_abs(x)   on V
 *   v_max(a, b) v_min(a, b)    b if either is NaN
 *   v_decay(x) v_reciprocal(x)   e^x for x <= 0; 1/x for x >= 1
 *   v_log_grown(x, d)          log((x + d) / x) for x > 0, x + d > 0
 *   v_less(a, b) v_equal(a, b) v_select(mask, a, b)   masks, and mask ? a : b
 *   INLINE         for functions
 *
 * A weight family turns logits into unnormalized probabilities w(x), so that probabilities are
 * w(x) / sum w:
 *   V weight(V x)        w(x), and 0 at -inf: a masked class has no weight
 *   V log_weight(V x)    log w(x)
 *   V slope(V x)         w'(x) / w(x)
 * families.def lists them, and says of which the largest logit is subtracted first, and whose
 * slope is not 1.
 *
 * A class loss is a function of its label's log-probability and of the row's statistics; a pair
 * loss is a sum over the elements of two rows of probabilities; an element loss is one value per
 * element. */

/* One row of a class loss: in, what the driver found; out, the loss and its derivatives by the
 * three. */
typedef struct {
    SCALAR log_p;      /* of the label */
    SCALAR log_sum;    /* log of the sum of the weights */
    SCALAR mean_log_p; /* over the classes that are not masked; only where the table asks for it */
    SCALAR loss, d_log_p, d_log_sum, d_mean_log_p;
} class_row;

/* One element of a pair loss with the probabilities p and q. In: these and log(q / p); where p
 * or q is 0, log_ratio may be anything. Out: its part of the loss, and p and q times the
 * derivative of the whole loss by them. Adding c q to by_q, or c p to by_p, changes nothing: the
 * softmax gradient subtracts the row's mean. Where the table says so, by_q sums to 0 over a row. */
typedef struct {
    V p, q, log_ratio;
    V loss, by_p, by_q;
} pair_element;

/* One element of an element loss: logit x, target t; the loss and its derivatives. */
typedef struct {
    V x, t;
    V loss, by_x, by_t;
} loss_element;

/* c tanh(x / c), with -inf left as it is: a masked class stays masked. tanh |y| = -e / (2 + e),
 * e = e^(-2|y|) - 1. */
INLINE V capped(V x, V softcap) {
    V e = v_expm1(v_set(-2) * v_abs(x) / softcap), t = -e / (v_set(2) + e) * softcap;
    return v_select(v_equal(x, v_set(-INFINITY)), x, v_select(v_less(x, v_set(0)), -t, t));
}

/* softmax: w(x) = e^x, shifted */
INLINE V FORMULA(softmax_weight)(V x) { return v_decay(x); }
INLINE V FORMULA(softmax_log_weight)(V x) { return x; }
INLINE V FORMULA(softmax_slope)(V x) {
    (void)x;
    return v_set(1);
}
