/* Probabilities of a row and their logarithms, and the gradient. The build options are those of
 * statistics.cl, and LOGARITHM: whether the result is the logarithm. */
#include "statistics.cl"

KERNEL row_loss(ARRAY(const STORED(IN0), x),
                IN1_ARGUMENT(dy) OUT0_ARGUMENT(y) OUT1_ARGUMENT(dx) long length) {
    GROUP_MEMORY
    const INDEX n = (INDEX)length;
    const long row = get_group_id(0);
    const global STORED(IN0) *x = ROW(x, row * length);
    const reading in = {1, 1, 0};
    statistics s = statistics_of_0(x, n, in GROUP_ARGUMENT);
    const V by_p = v_set(1 / s.total), shift = v_set(s.shift), log_total = v_set(log(s.total));
    exact dot = {0, 0};
    EACH_BLOCK(begin, n) {
        V sum = v_set(0);
        EACH_VECTOR(b, i, begin, n) {
            V v = FETCH(IN0)(x, i, n, LOWEST), prob = weight_of(v, s.shift, 1) * by_p;
#ifdef OUT0
            const V y = LOGARITHM ? (OF_FAMILY(_log_weight)(v) - shift) - log_total : prob;
            PUT(OUT0)(y, ROW(y, row * length), i, n);
#endif
#ifdef IN1
            V d = FETCH(IN1)(ROW(dy, row * length), i, n, 0);
            sum += LOGARITHM ? d : d * prob;
#endif
        }
        add_to(&dot, sum_of(sum));
    }
#ifdef OUT1
    const V all = v_set(group_sum(value_of(dot)));
    EACH_BLOCK(begin, n) {
        EACH_VECTOR(b, i, begin, n) {
            V v = FETCH(IN0)(x, i, n, LOWEST), prob = weight_of(v, s.shift, 1) * by_p, d = v_set(0);
#ifdef IN1
            d = FETCH(IN1)(ROW(dy, row * length), i, n, 0);
#endif
            V g = LOGARITHM ? d - prob * all : prob * (d - all);
            if (SLOPED) g *= OF_FAMILY(_slope)(v);
            PUT(OUT1)(g, ROW(dx, row * length), i, n);
        }
    }
#endif
}
