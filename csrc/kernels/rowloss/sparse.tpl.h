/* Sparse pair losses: a row of logits of the student, and a teacher known at K classes.
 *
 * All other classes form one more class, the rest, so a pair loss is computed over K + 1
 * probabilities. The gradient of the logits outside the K classes is a multiple of their
 * probabilities; the elements at the K classes are written last. */
#ifndef ROWLOSS_SPARSE
#define ROWLOSS_SPARSE
#include "gradient.tpl.h"
#include "job.h"
#include "pair.tpl.h"
#include "rows.tpl.h"
#include "statistics.tpl.h"
#include "weights.tpl.h"

/* A row's entries, [k]. `log_sum` is subtracted from scale * logp. */
typedef struct {
    const int32_t *ids;
    const REAL *logp, *shares; /* shares: NULL where the probabilities are e^logp */
    int64_t k;
    V scale, log_sum;
} sparse_teacher;

/* Sums over a row's entries: the student's weights, the teacher's probabilities, the loss, the
 * derivatives, and how many entries there are. */
typedef struct {
    double weights, teacher, loss, by;
    int64_t count;
} sparse_sums;

/* The loss with the student as q, or as p if `reverse`; `by` is the student's derivative. */
INLINE V student_element(pair_formula formula, const sparse_args *args, V student, V teacher,
                         V log_ratio, V *by) {
    int reverse = args->reverse;
    pair_element e = {.q = reverse ? teacher : student,
                      .p = reverse ? student : teacher,
                      .log_ratio = reverse ? -log_ratio : log_ratio};
    formula(&e, args->option);
    *by = reverse ? e.by_p : e.by_q;
    return e.loss;
}

/* log of the sum of e^(scale logp) over a row's entries. */
INLINE double sparse_log_sum(const sparse_teacher *t) {
    REAL lowest = (REAL)-INFINITY, highest = lowest;
    double sum = 0;
    for (int64_t j = 0; j < t->k; j++)
        if (t->ids[j] >= 0 && !(t->logp[j] <= highest)) highest = t->logp[j];
    for (int64_t at = 0; at < t->k; at += WIDTH) {
        REAL l[WIDTH];
        for (int64_t j = 0; j < WIDTH; j++)
            l[j] = at + j < t->k && t->ids[at + j] >= 0 ? t->logp[at + j] : lowest;
        sum += (double)v_sum(v_exp((v_load(l) - v_set(highest)) * t->scale));
    }
    return log(sum) + (double)highest * (double)t->scale[0];
}

/* The entries at a student's row. by[j] and prob[j], if wanted, are the derivative and the
 * probability, both times the slope of the cap. */
INLINE sparse_sums sparse_walk(pair_formula formula, const sparse_args *args, row_reading in,
                               int64_t i, const row_statistics *row, const sparse_teacher *t,
                               REAL *by, REAL *prob) {
    sparse_sums s = {0};
    V shift = v_set(row->shift), scale = v_set(in.scale), over = v_set((REAL)(1 / row->total)),
      log_total = v_set((REAL)log(row->total));
    REAL z[ENTRIES], w[ENTRIES], l[ENTRIES], share[ENTRIES], element[1];
    for (int64_t at = 0; at < t->k; at += ENTRIES) {
        int64_t m = t->k - at < ENTRIES ? t->k - at : ENTRIES, whole = (m + WIDTH - 1) / WIDTH;
        for (int64_t j = 0; j < whole * WIDTH; j++) {
            int32_t id = j < m ? t->ids[at + j] : -1;
            z[j] = w[j] = share[j] = 0;
            l[j] = (REAL)-INFINITY;
            if (id < 0) continue;
            z[j] = fetch(in.rows, i, id, 1, element)[0];
            w[j] = row->kept[id] * (REAL)relative_shift(row, id, in.scale);
            l[j] = t->logp[at + j];
            if (t->shares) share[j] = t->shares[at + j];
            s.weights += (double)w[j];
            s.count++;
        }
        for (int64_t j = 0; j < m; j += WIDTH) {
            V x = v_load(z + j), logp = v_load(l + j) * t->scale - t->log_sum, slope = v_set(1), d;
            if (in.prepare) x *= v_set(in.factor);
            if (in.softcap > 0)
                x = capped(x, v_set(in.softcap)), slope = cap_slope(x, v_set(in.softcap));
            V student = v_load(w + j) * over, teacher = t->shares ? v_load(share + j) : v_exp(logp);
            V log_ratio = (x - shift) * scale - log_total;
            if (!args->cross) log_ratio -= logp;
            s.loss +=
                (double)v_sum(student_element(formula, args, student, teacher, log_ratio, &d));
            s.by += (double)v_sum(d);
            s.teacher += (double)v_sum(teacher);
            if (!by) continue;
            store_lanes(by + at + j, d * slope, m - j);
            store_lanes(prob + at + j, student * slope, m - j);
        }
    }
    return s;
}

/* The sum of a row's weights without those of the entries, which become 0. */
static double rest_weights(const row_statistics *row, const sparse_teacher *t, int64_t n,
                           REAL scale) {
    double sum = 0;
    for (int64_t j = 0; j < t->k; j++)
        if (t->ids[j] >= 0) row->kept[t->ids[j]] = 0;
    for (int64_t begin = 0; begin < n; begin += ROW_BLOCK) {
        int64_t m = n - begin < ROW_BLOCK ? n - begin : ROW_BLOCK;
        V block = {0};
        for (int64_t j = 0; j < m; j += WIDTH) block += load_lanes(row->kept + begin + j, m - j, 0);
        sum += (double)v_sum(block) * relative_shift(row, begin, scale);
    }
    return sum;
}

/* The teacher's probability of the rest. One that is the rounding of the others counts as 0. */
INLINE double rest_of_teacher(const sparse_args *args, int64_t i, const sparse_sums *s, int64_t n) {
    if (args->renormalize || args->shares || s->count >= n) return 0;
    if (args->left) return (double)((const REAL *)args->left)[i];
    double left = 1 - s->teacher;
    return left < (sizeof(REAL) == 4 ? 1e-6 : 1e-15) ? 0 : left;
}

/* Rows [begin, end) of a sparse pair loss. */
INLINE void sparse_rows(pair_formula formula, const sparse_args *args, const row_job *job,
                        int64_t begin, int64_t end, int worker) {
    int64_t n = PL_DIM(job->call, 'V'), k = PL_DIM(job->call, 'K');
    const REAL *dloss = args->dloss;
    REAL *loss = args->loss;
    const pl_rows *out = args->dq;
    row_reading in = {.rows = args->q,
                      .scale = args->softcap_q > 0 ? 1 : (REAL)args->scale_q,
                      .prepare = args->softcap_q > 0,
                      .factor = (REAL)args->scale_q,
                      .softcap = (REAL)args->softcap_q};
    row_statistics row = statistics_in(scratch_part(job, worker, 0), n);
    REAL *by = scratch_part(job, worker, 1),
         *prob = scratch_part(job, worker, 1 + sparse_parts(job->call));
    for (int64_t i = begin; i < end; i++) {
        if (args->labels && args->labels[i] < 0) {
            loss[i] = 0;
            if (out->data) put_zeros(out, i, n);
            continue;
        }
        int gradient = out->data && !(dloss && dloss[i] == 0);
        pair_statistics(in, i, n, &row, NULL, 0);
        sparse_teacher t = {.ids = args->ids + i * k,
                            .logp = (const REAL *)args->logp + i * k,
                            .shares = args->shares ? (const REAL *)args->shares + i * k : NULL,
                            .k = k,
                            .scale = v_set((REAL)args->scale_p)};
        t.log_sum = v_set(args->renormalize ? (REAL)sparse_log_sum(&t) : 0);
        sparse_sums s = sparse_walk(formula, args, in, i, &row, &t, gradient ? by : NULL,
                                    gradient ? prob : NULL);
        /* A small difference of large sums has few digits. */
        double rest = row.total - s.weights;
        if (rest < row.total / 4) rest = rest_weights(&row, &t, n, in.scale);
        double student = rest / row.total, teacher = rest_of_teacher(args, i, &s, n);
        double log_ratio = log(student) - (args->cross ? 0 : log(teacher));
        V by_rest,
            of_rest = student_element(formula, args, v_set((REAL)student), v_set((REAL)teacher),
                                      v_set((REAL)log_ratio), &by_rest);
        double total = s.loss + (double)of_rest[0];
        /* Rounding may make a divergence negative; an estimate from samples may be negative. */
        loss[i] = (REAL)(total < 0 && !args->shares ? 0 : total);
        if (out->data && !gradient) put_zeros(out, i, n);
        if (!gradient) continue;
        double factor = (dloss ? (double)dloss[i] : 1) * args->scale_q;
        double sum = s.by + (double)by_rest[0],
               per_prob = student > 0 ? (double)by_rest[0] / student : 0;
        for (int64_t j = 0; j < k; j += WIDTH) {
            V d = load_lanes(by + j, k - j, 0) - load_lanes(prob + j, k - j, 0) * v_set((REAL)sum);
            store_lanes(by + j, d * v_set((REAL)factor), k - j);
        }
        REAL buffer[ROW_BLOCK];
        for (int64_t at = 0; in.softcap > 0 && at < n; at += ROW_BLOCK) {
            int64_t m = n - at < ROW_BLOCK ? n - at : ROW_BLOCK;
            const REAL *z = read_block(in, i, at, m, buffer);
            cap_gradient(z, m, in.softcap, row.kept + at, row.kept + at);
        }
        pending_gradient g = {.out = out,
                              .i = i,
                              .n = n,
                              .weights = &row,
                              .scale = in.scale,
                              .by_weights = factor * (per_prob - sum),
                              .special_at = -1,
                              .stream = job->stream};
        write_gradient(&g);
        for (int64_t j = 0; j < k; j++) {
            if (t.ids[j] < 0) continue;
            REAL *to = target(out, i, t.ids[j], by + j);
            if (to != by + j) *to = by[j];
            else put(out, i, t.ids[j], 1, to, 1);
        }
    }
}

#endif
