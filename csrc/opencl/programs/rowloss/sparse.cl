/* Losses against a teacher that is known at `count` classes of a row; all others are one more
 * class, the rest. Build options, in addition to those of statistics.cl:
 *
 *   RENORMALIZE  whether the known classes are all there are: the teacher has no rest
 *   CROSS        whether the loss takes the student's log-probability for the log of the ratio
 *   REVERSE      whether the student is p and the teacher q
 */
#include "statistics.cl"

/* The loss with the student as q, or as p if REVERSE; `by` is the student's derivative. */
INLINE V student_element(V student, V teacher, V log_ratio, const SCALAR *option, V *by) {
    pair_element e;
    e.q = REVERSE ? teacher : student;
    e.p = REVERSE ? student : teacher;
    e.log_ratio = REVERSE ? -log_ratio : log_ratio;
    LOSS(&e, option);
    *by = REVERSE ? e.by_p : e.by_q;
    return e.loss;
}

/* WIDTH entries from j on: the capped logits and the probabilities of the student, the teacher's
 * probabilities, their part of the loss, and the student's derivatives. */
typedef struct {
    V x, student, teacher, loss, by;
} entries;

KERNEL row_loss(ARRAY(const STORED(IN0), q), ARRAY(const int, ids), ARRAY(const REAL, logp),
                ARRAY(const REAL, shares), ARRAY(const REAL, left), ARRAY(const int, labels),
                LOSS_ARGUMENTS OUT0_ARGUMENT(dq) long length, long count, SCALAR scale_q,
                SCALAR softcap_q, SCALAR scale_p, OPTIONS) {
    GROUP_MEMORY
    const INDEX n = (INDEX)length;
    const long row = get_group_id(0);
    const global STORED(IN0) *x = ROW(q, row * length);
    const global int *id_of = ROW(ids, row * count);
    const global REAL *logp_of = ROW(logp, row * count);
    const SCALAR option[4] = GIVEN_OPTIONS;
    const int counted = !labels_data || *ROW(labels, row) >= 0;
    const SCALAR given = !counted ? 0 : dloss_data ? *ROW(dloss, row) : 1;
#ifdef OUT0
    global STORED(OUT0) *dq = ROW(dq, row * length);
    if (given == 0) PUT_ZEROS(OUT0, dq, n);
#endif
    if (!counted) {
        if (LANE == 0) *ROW(loss, row) = 0;
        return;
    }
#ifdef PREPARE
    const reading in = {1, (REAL)scale_q, (REAL)softcap_q};
#else
    const reading in = {(REAL)scale_q, 1, 0};
#endif
    const REAL by_p = (REAL)scale_p;
    statistics s = statistics_of_0(x, n, in GROUP_ARGUMENT);
    const V over = v_set(1 / s.total), log_total = v_set(log(s.total));
    V log_sum = v_set(0);
#if RENORMALIZE
    SCALAR high = LOWEST;
    for (long j = LANE; j < count; j += GROUP)
        if (id_of[j] >= 0 && !(logp_of[j] <= high)) high = logp_of[j];
    high = group_max(high);
    exact powers = {0, 0};
    for (long j = LANE; j < count; j += GROUP)
        if (id_of[j] >= 0) add_to(&powers, exp((logp_of[j] - high) * scale_p));
    log_sum = v_set(log(group_sum(value_of(powers))) + high * scale_p);
#endif
#define EACH_ENTRIES(j) for (long j = LANE * WIDTH; j < count; j += GROUP * WIDTH)
#define TAKE_ENTRIES(e, j) \
    entries e; \
    do { \
        REAL z[WIDTH], l[WIDTH], share[WIDTH]; \
        for (int b = 0; b < WIDTH; b++) { \
            const int id = j + b < count ? id_of[j + b] : -1; \
            z[b] = id < 0 ? LOWEST : CAT(load1_, IN0)(x + id); \
            l[b] = id < 0 ? LOWEST : logp_of[j + b]; \
            share[b] = id < 0 || !shares_data ? 0 : *ROW(shares, row * count + j + b); \
        } \
        e.x = PREPARED(VLOAD(0, z), in); \
        V logp = VLOAD(0, l) * by_p - log_sum; \
        V log_q = (e.x - s.shift) * in.scale - log_total; \
        e.student = weight_of(e.x, s.shift, in.scale) * over; \
        e.teacher = shares_data ? VLOAD(0, share) : v_exp(logp); \
        e.loss = student_element(e.student, e.teacher, CROSS ? log_q : log_q - logp, option, \
                                 &e.by); \
    } while (0)
    exact of_loss = {0, 0}, of_student = {0, 0}, of_teacher = {0, 0}, of_by = {0, 0};
    SCALAR known = 0;
    EACH_ENTRIES(j) {
        TAKE_ENTRIES(e, j);
        add_to(&of_loss, sum_of(e.loss));
        add_to(&of_by, sum_of(e.by));
        add_to(&of_student, sum_of(e.student));
        add_to(&of_teacher, sum_of(e.teacher));
        for (int b = 0; b < WIDTH && j + b < count; b++) known += id_of[j + b] >= 0;
    }
    known = group_sum(known);
    SCALAR student = 1 - group_sum(value_of(of_student));
    SCALAR teacher = 1 - group_sum(value_of(of_teacher));
    /* A small difference of large sums has few digits: it is taken of exact sums. */
    if (student < (SCALAR)0.25) {
        exact rest = {0, 0};
        EACH_BLOCK(begin, n)
            EACH_VECTOR(b, i, begin, n) {
                REAL a[WIDTH];
                VSTORE(weight_of(PREPARED(FETCH(IN0)(x, i, n, LOWEST), in), s.shift, in.scale), 0,
                       a);
                for (int c = 0; c < WIDTH; c++) add_to(&rest, a[c]);
            }
        EACH_ENTRIES(j) {
            TAKE_ENTRIES(e, j);
            REAL a[WIDTH];
            VSTORE(weight_of(e.x, s.shift, in.scale), 0, a);
            for (int c = 0; c < WIDTH; c++) add_to(&rest, -a[c]);
        }
        const exact all = group_exact(rest);
        student = fmax(value_of(all), (SCALAR)0) / s.total;
    }
    if (RENORMALIZE || shares_data || known >= length) teacher = 0;
    else if (left_data) teacher = *ROW(left, row);
    else if (teacher < (sizeof(REAL) == 4 ? (SCALAR)1e-6 : (SCALAR)1e-15)) teacher = 0;
    V by_rest;
    const V of_rest = student_element(v_set(student), v_set(teacher),
                                      v_set(log(student) - (CROSS ? 0 : log(teacher))), option,
                                      &by_rest);
    REAL first[WIDTH], first_by[WIDTH];
    VSTORE(of_rest, 0, first);
    VSTORE(by_rest, 0, first_by);
    SCALAR all = group_sum(value_of(of_loss)) + first[0];
    const SCALAR sum = group_sum(value_of(of_by)) + first_by[0];
    if (LANE == 0) *ROW(loss, row) = all < 0 && !shares_data ? 0 : (REAL)all;
#ifdef OUT0
    if (given == 0) return;
    const REAL factor = (REAL)(given * scale_q);
    const V per_prob = v_set((student > 0 ? first_by[0] / student : 0) - sum) * factor * over;
    EACH_BLOCK(begin, n)
        EACH_VECTOR(b, i, begin, n) {
            V z = PREPARED(FETCH(IN0)(x, i, n, LOWEST), in);
            V g = weight_of(z, s.shift, in.scale) * per_prob;
            PUT(OUT0)(CAPPED_GRADIENT(g, z, in), dq, i, n);
        }
    barrier(CLK_GLOBAL_MEM_FENCE);
    EACH_ENTRIES(j) {
        TAKE_ENTRIES(e, j);
        V g = (e.by - e.student * (REAL)sum) * factor;
        REAL a[WIDTH];
        VSTORE(CAPPED_GRADIENT(g, e.x, in), 0, a);
        for (int b = 0; b < WIDTH && j + b < count; b++)
            if (id_of[j + b] >= 0) CAT(store1_, OUT0)(a[b], dq + id_of[j + b]);
    }
#endif
}
