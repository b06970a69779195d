/* Cosine distance of two rows: 1 - x y / (|x| |y|); 1, with gradient 0, where a row is 0. Classes
 * that either row masks are left out. The build options are those of statistics.cl. */
#include "statistics.cl"

KERNEL row_loss(ARRAY(const STORED(IN0), q), ARRAY(const STORED(IN1), p), ARRAY(const int, labels),
                LOSS_ARGUMENTS OUT0_ARGUMENT(dq) OUT1_ARGUMENT(dp) long length, SCALAR scale_q,
                SCALAR softcap_q, SCALAR scale_p, SCALAR softcap_p) {
    GROUP_MEMORY
    const INDEX n = (INDEX)length;
    const long row = get_group_id(0);
    const global STORED(IN0) *xq = ROW(q, row * length);
    const global STORED(IN1) *xp = ROW(p, row * length);
    const int counted = !labels_data || *ROW(labels, row) >= 0;
    const SCALAR given = !counted ? 0 : dloss_data ? *ROW(dloss, row) : 1;
    /* A scale without a cap changes no angle. */
    const reading in_q = {1, softcap_q > 0 ? (REAL)scale_q : 1, (REAL)softcap_q},
                  in_p = {1, softcap_p > 0 ? (REAL)scale_p : 1, (REAL)softcap_p};
#define TAKE_BOTH(x, y, i) \
    V x = PREPARED(FETCH(IN0)(xq, i, n, 0), in_q), y = PREPARED(FETCH(IN1)(xp, i, n, 0), in_p); \
    const V raw_##x = x, raw_##y = y; \
    x = v_select(v_equal(raw_##x, v_set(LOWEST)), v_set(0), \
                 v_select(v_equal(raw_##y, v_set(LOWEST)), v_set(0), raw_##x)); \
    y = v_select(v_equal(raw_##x, v_set(LOWEST)), v_set(0), \
                 v_select(v_equal(raw_##y, v_set(LOWEST)), v_set(0), raw_##y))
    exact of_xy = {0, 0}, of_xx = {0, 0}, of_yy = {0, 0};
    EACH_BLOCK(begin, n) {
        V xy = v_set(0), xx = v_set(0), yy = v_set(0);
        EACH_VECTOR(b, i, begin, n) {
            TAKE_BOTH(x, y, i);
            xy += x * y;
            xx += x * x;
            yy += y * y;
        }
        add_to(&of_xy, sum_of(xy));
        add_to(&of_xx, sum_of(xx));
        add_to(&of_yy, sum_of(yy));
    }
    const SCALAR xy = group_sum(value_of(of_xy)), xx = group_sum(value_of(of_xx)),
                 yy = group_sum(value_of(of_yy));
    const int zero = !counted || xx == 0 || yy == 0;
    const SCALAR norms = zero ? 1 : sqrt(xx) * sqrt(yy), cosine = zero ? 0 : xy / norms,
                 distance = 1 - cosine;
    if (LANE == 0) *ROW(loss, row) = (REAL)(!counted ? 0 : distance < 0 ? 0 : distance);
#if defined(OUT0) || defined(OUT1)
    const int none = zero || given == 0;
    const REAL scaled_q = (REAL)(given * in_q.factor), scaled_p = (REAL)(given * in_p.factor);
    const V own_q = v_set(none ? 0 : scaled_q * cosine / xx),
            own_p = v_set(none ? 0 : scaled_p * cosine / yy),
            other_q = v_set(-scaled_q / norms), other_p = v_set(-scaled_p / norms);
    EACH_BLOCK(begin, n)
        EACH_VECTOR(b, i, begin, n) {
            TAKE_BOTH(x, y, i);
            const V g = CAPPED_GRADIENT(x * own_q + y * other_q, raw_x, in_q),
                    h = CAPPED_GRADIENT(y * own_p + x * other_p, raw_y, in_p);
#ifdef OUT0
            PUT(OUT0)(none ? v_set(0) : g, ROW(dq, row * length), i, n);
#endif
#ifdef OUT1
            PUT(OUT1)(none ? v_set(0) : h, ROW(dp, row * length), i, n);
#endif
        }
#endif
}
