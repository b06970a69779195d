/* The types and functions of the formulas of row losses. The headers of losses/ compile as C, once
 * for float32 and once for float64 vectors, and as OpenCL C. The including file defines:
 *
 *   FORMULA(name)  the name of a function for the computed type
 *   V              a vector of elements of a row, or one element
 *   SCALAR         one value, in the widest float type
 *   v_set(a) v_exp(x) v_expm1(x) v_log1p(x) v_abs(x)   on V
 *   v_max(a, b) v_min(a, b)    b if either is NaN
 *   v_decay(x) v_reciprocal(x)   e^x for x <= 0; 1/x for x >= 1
 *   v_log_grown(x, d)          log((x + d) / x) for x > 0, x + d > 0
 *   v_less(a, b) v_equal(a, b) v_select(mask, a, b)   masks, and mask ? a : b
 *   INLINE         the specifiers of a function
 *
 * A weight family turns logits into unnormalized probabilities w(x); the probabilities are
 * w(x) / sum w. families.def lists the families and their properties.
 *   V weight(V x)        w(x), and 0 at -inf: a masked class has no weight
 *   V log_weight(V x)    log w(x)
 *   V slope(V x)         w'(x) / w(x)
 *
 * A class loss is a function of its label's log-probability and of the row's statistics. A pair
 * loss is a sum over the elements of two rows of probabilities. An element loss is one value per
 * element. */
#include "../softcap.h"

/* One row of a class loss. In: log_p, log_sum, mean_log_p. Out: the loss and its derivatives by
 * these. */
typedef struct {
    SCALAR log_p;      /* log-probability of the label */
    SCALAR log_sum;    /* log of the sum of the weights */
    SCALAR mean_log_p; /* mean over the unmasked classes, if the loss's line asks for it */
    SCALAR loss, d_log_p, d_log_sum, d_mean_log_p;
} class_row;

/* One element of a pair loss. In: the probabilities p and q, and log_ratio = log(q / p), which is
 * undefined if p or q is 0. Out: the element's part of the loss, and by_p and by_q, the derivatives
 * of the row's loss by p and q, each times its probability. Adding c q to by_q, or c p to by_p,
 * changes nothing: the softmax gradient subtracts the row's mean. If the loss's line says so, by_q
 * sums to 0 over a row. */
typedef struct {
    V p, q, log_ratio;
    V loss, by_p, by_q;
} pair_element;

/* One element of an element loss. In: logit x, target t. Out: the loss and its derivatives. */
typedef struct {
    V x, t;
    V loss, by_x, by_t;
} loss_element;

/* The softmax family: w(x) = e^x. softmax_weight gets x minus the largest logit, which is <= 0. */
INLINE V FORMULA(softmax_weight)(V x) { return v_decay(x); }
INLINE V FORMULA(softmax_log_weight)(V x) { return x; }
INLINE V FORMULA(softmax_slope)(V x) {
    (void)x;
    return v_set(1);
}
