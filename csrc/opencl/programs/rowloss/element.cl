/* Losses of single elements: all rows as one, a vector for each work-item. The build options are
 * those of rows.cl. */
#include "rows.cl"

/* `length` is the number of elements. */
KERNEL row_loss(ARRAY(const STORED(IN0), x), ARRAY(const STORED(IN1), t),
                LOSS_ARGUMENTS OUT0_ARGUMENT(dx) OUT1_ARGUMENT(dt) long length, OPTIONS) {
    const SCALAR option[4] = GIVEN_OPTIONS;
    const long i = get_global_id(0) * WIDTH, n = length;
    if (i >= n) return;
    loss_element e;
    e.x = FETCH(IN0)(ROW(x, 0), i, n, 0);
    e.t = FETCH(IN1)(ROW(t, 0), i, n, 0);
    LOSS(&e, option);
    V given = v_set(1);
    if (dloss_data) given = fetch_real(ROW(dloss, 0), i, n, 0);
    put_real(e.loss, ROW(loss, 0), i, n);
#ifdef OUT0
    PUT(OUT0)(v_select(v_equal(given, v_set(0)), v_set(0), e.by_x * given), ROW(dx, 0), i, n);
#endif
#ifdef OUT1
    PUT(OUT1)(v_select(v_equal(given, v_set(0)), v_set(0), e.by_t * given), ROW(dt, 0), i, n);
#endif
}
