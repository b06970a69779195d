/* Class losses: one label per row. A second walk writes the gradient. Build options, in addition to
 * those of statistics.cl:
 *
 *   SOFTCAP_OPTION  with PREPARE, which option is the softcap
 */
#include "statistics.cl"

KERNEL row_loss(ARRAY(const STORED(IN0), x), ARRAY(const int, labels),
                ARRAY(const REAL, class_weight), ARRAY(const REAL, dloss), ARRAY(const REAL, dlse),
                ARRAY(REAL, loss), ARRAY(REAL, lse), OUT0_ARGUMENT(dx) long length, OPTIONS) {
    GROUP_MEMORY
    const INDEX n = (INDEX)length;
    const long row = get_group_id(0);
    const global STORED(IN0) *x = ROW(x, row * length);
    const SCALAR option[4] = GIVEN_OPTIONS;
    const int label = *ROW(labels, row);
    const SCALAR given = dloss_data ? *ROW(dloss, row) : 1,
                 given_lse = dlse_data ? *ROW(dlse, row) : 0;
#ifdef WITH_CLASS_WEIGHT
    const global REAL *class_weight = ROW(class_weight, 0);
#endif
#ifdef OUT0
    global STORED(OUT0) *dx = ROW(dx, row * length);
    const int zero_gradient = label < 0 || (given == 0 && given_lse == 0);
    if (zero_gradient) PUT_ZEROS(OUT0, dx, n);
#endif
    if (label < 0) {
        if (LANE == 0) {
            *ROW(loss, row) = 0;
            if (lse_data) *ROW(lse, row) = 0;
        }
        return;
    }
    reading in = {1, 1, 0};
#ifdef PREPARE
    in.softcap = (REAL)option[SOFTCAP_OPTION];
#endif
    /* Read before another work-item may write dx, which may be x. */
    V raw = v_set(CAT(load1_, IN0)(x + label)), at_label = PREPARED(raw, in);
    statistics s = statistics_of_0(x, n CLASS_WEIGHT_ARGUMENT, in GROUP_ARGUMENT);
    SCALAR log_total = log(s.total);
    class_row r = {0};
    r.log_p = ((SCALAR)OF_FAMILY(_log_weight)(at_label).s0 - (SCALAR)s.shift) - log_total;
    r.log_sum = log_total + (SCALAR)s.shift;
    /* What multiplies -log_sum in the label's term and in the mean. */
    SCALAR of_label = 1, of_mean = 1;
#ifdef WITH_CLASS_WEIGHT
    of_label = class_weight[label];
    r.log_p = of_label > 0 ? of_label * r.log_p : 0; /* also if it is -inf */
#endif
#ifdef WITH_MEAN
#ifdef WITH_CLASS_WEIGHT
    of_mean = s.sum_class_weight / s.count;
#endif
    r.mean_log_p = (s.sum_x / s.count - of_mean * (SCALAR)s.shift) - of_mean * log_total;
#endif
    LOSS(&r, option);
    r.d_log_p *= of_label;
    if (LANE == 0) {
        *ROW(loss, row) = (REAL)r.loss;
        if (lse_data) *ROW(lse, row) = (REAL)r.log_sum;
    }
#ifdef OUT0
    if (zero_gradient) return;
    const V by_p =
        v_set((given * (r.d_log_sum - r.d_log_p - of_mean * r.d_mean_log_p) + given_lse) / s.total);
    const REAL by_label = (REAL)(given * r.d_log_p);
#ifdef WITH_MEAN
    const V by_mean = v_set(given * r.d_mean_log_p / s.count);
#endif
    EACH_BLOCK(begin, n) {
        V raws[BLOCK];
        EACH_VECTOR(b, i, begin, n) raws[b] = FETCH(IN0)(x, i, n, LOWEST);
        EACH_VECTOR(b, i, begin, n) {
            V z = PREPARED(raws[b], in), g = weight_of(z, s.shift, 1) * by_p;
#ifdef WITH_MEAN
#ifdef WITH_CLASS_WEIGHT
            V by_class = by_mean * fetch_real(class_weight, i, n, 0);
#else
            V by_class = by_mean;
#endif
            g += v_select(v_equal(z, LOWEST), v_set(0), by_class);
#endif
            if (label >= i && label - i < WIDTH) {
                REAL a[WIDTH];
                VSTORE(g, 0, a);
                a[label - i] += by_label;
                g = VLOAD(0, a);
            }
            if (SLOPED) g *= OF_FAMILY(_slope)(z);
            PUT(OUT0)(CAPPED_GRADIENT(g, z, in), dx, i, n);
        }
    }
#endif
}
