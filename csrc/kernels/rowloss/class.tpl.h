/* Class losses: one label per row. */
#ifndef ROWLOSS_CLASS
#define ROWLOSS_CLASS
#include "gradient.tpl.h"
#include "job.h"
#include "rows.tpl.h"
#include "statistics.tpl.h"
#include "weights.tpl.h"

typedef void (*class_formula)(class_row *row, const double *option);

/* Writes the gradient slope (by_p p + [not masked] by_mean + [label] by_label) where it needs the
 * logits once more. `g` holds the probability and label terms; the mean and softcap terms are added
 * here. A block's logits are read before the block is written: the gradient may lie there. */
INLINE void write_class_row(row_reading in, const pending_gradient *g, double by_mean) {
    REAL gradient[ROW_BLOCK], logits[ROW_BLOCK];
    for (int64_t begin = 0; begin < g->n; begin += ROW_BLOCK) {
        int64_t m = g->n - begin < ROW_BLOCK ? g->n - begin : ROW_BLOCK;
        const REAL *x = fetch(in.rows, g->i, begin, m, logits);
        pending_block block = begin_block(g, begin, m);
        for (int64_t j = 0; j < m; j += WIDTH)
            store_lanes(gradient + j, gradient_at(&block, j, m - j), m - j);
        if (g->special_at >= begin && g->special_at < begin + m)
            gradient[g->special_at - begin] = g->special;
        V masked = v_set((REAL)-INFINITY), by = v_set((REAL)by_mean), zero = {0};
        for (int64_t j = 0; j < m; j += WIDTH) {
            V v = load_lanes(x + j, m - j, 0), d = load_lanes(gradient + j, m - j, 0);
            if (in.with_mean) {
                V w = by;
                if (in.class_weight) w *= load_lanes(in.class_weight + begin + j, m - j, 0);
                d += v_select(v_equal(v, masked), zero, w);
            }
            if (in.softcap > 0) d *= cap_slope(capped(v, v_set(in.softcap)), v_set(in.softcap));
            store_lanes(gradient + j, d, m - j);
        }
        REAL *to = target(g->out, g->i, begin, NULL);
        if ((int)g->out->type == NATIVE) memcpy(to, gradient, (size_t)m * sizeof *to);
        else put(g->out, g->i, begin, m, gradient, 1);
    }
}

/* Rows [begin, end) of a class loss. A row with label -1 gives 0 and gradient 0. The formula is one
 * of weighted log-probabilities: of the label's times its class weight, and of their weighted
 * mean. */
INLINE void class_rows(weight_family f, class_formula formula, int mean_option, int softcap_option,
                       const class_args *args, const row_job *job, int64_t begin, int64_t end,
                       int worker) {
    int64_t n = PL_DIM(job->call, 'V');
    const int32_t *labels = args->labels;
    const REAL *dloss = args->dloss, *dlse = args->dlse, *class_weight = args->class_weight;
    REAL *loss = args->loss, *lse = args->lse, at[1];
    const pl_rows *out = args->dlogits;
    const double *option = args->option;
    row_reading in = {.rows = args->logits,
                      .scale = 1,
                      .factor = 1,
                      .with_slope = 1,
                      .class_weight = class_weight};
    if (softcap_option >= 0) in.softcap = (REAL)option[softcap_option];
    in.prepare = in.softcap > 0;
    if (mean_option >= 0) in.with_mean = option[mean_option] > 0;
    /* A streamed gradient is pending in one buffer while the next row uses the other; the second
     * buffer exists only then. */
    row_statistics buffers[2] = {statistics_in(scratch_part(job, worker, 0), n),
                                 statistics_in(scratch_part(job, worker, 1), n)};
    pending_gradient pending = {0};
    int buffer = 0;
    for (int64_t i = begin; i < end; i++) {
        double given = dloss ? (double)dloss[i] : 1, given_lse = dlse ? (double)dlse[i] : 0;
        int zero_gradient = out->data && (labels[i] < 0 || (given == 0 && given_lse == 0)),
            gradient = out->data && !zero_gradient;
        if (labels[i] < 0) {
            loss[i] = 0;
            if (lse) lse[i] = 0;
            if (zero_gradient) put_zeros(out, i, n);
            continue;
        }
        REAL label = fetch(in.rows, i, labels[i], 1, at)[0];
        V at_label = v_set(label);
        if (in.softcap > 0) at_label = capped(at_label, v_set(in.softcap));
        /* Rows without mean and softcap are read by instances of their own. */
        row_statistics *row = &buffers[buffer], unkept = {.block_shift = row->block_shift};
        row_reading plain = {.rows = in.rows, .scale = 1, .with_slope = 1};
        int rereads_logits = in.softcap > 0 || in.with_mean;
        if (rereads_logits) {
            take_statistics(f, in, i, n, row, NULL, 0, 1);
        } else if (gradient) {
            take_statistics(f, plain, i, n, row, &pending, 0, 1);
            pending.out = NULL;
        } else {
            take_statistics(f, plain, i, n, &unkept, NULL, 0, 1);
            row = &unkept;
        }
        double log_total = log(row->total);
        class_row r = {.log_p =
                           ((double)f.log_weight(at_label)[0] - (double)row->shift) - log_total,
                       .log_sum = log_total + (double)row->shift};
        /* What multiplies -log_sum in the label's term and in the mean. */
        double of_label = 1, of_mean = 1, count = (double)row->count;
        if (class_weight) {
            of_label = (double)class_weight[labels[i]];
            if (in.with_mean) of_mean = row->sum_class_weight / count;
            r.log_p = of_label > 0 ? of_label * r.log_p : 0; /* also if it is -inf */
        }
        if (in.with_mean)
            r.mean_log_p =
                (row->sum_x / count - of_mean * (double)row->shift) - of_mean * log_total;
        formula(&r, option);
        r.d_log_p *= of_label;
        loss[i] = (REAL)r.loss;
        if (lse) lse[i] = (REAL)r.log_sum;
        /* Written only now: the gradient may lie where the logits do. */
        if (zero_gradient) put_zeros(out, i, n);
        if (!gradient) continue;
        double by_p = given * (r.d_log_sum - r.d_log_p - of_mean * r.d_mean_log_p) + given_lse;
        double by_mean = in.with_mean ? given * r.d_mean_log_p / count : 0;
        int64_t label_block = labels[i] / ROW_BLOCK * ROW_BLOCK;
        V prob = block_factor(row, label_block, in.scale, by_p);
        double by_label = given * r.d_log_p;
        pending =
            (pending_gradient){.out = out,
                               .i = i,
                               .n = n,
                               .weights = row,
                               .scale = in.scale,
                               .by_weights = by_p,
                               .special_at = labels[i],
                               .special = row->kept[labels[i]] * prob[0] +
                                          (REAL)by_label * (f.slope ? f.slope(v_set(label))[0] : 1),
                               .stream = job->stream};
        if (rereads_logits) {
            write_class_row(in, &pending, by_mean);
            pending.out = NULL;
        } else if (job->stream) buffer ^= 1;
        else write_gradient(&pending);
    }
    write_gradient(&pending);
}

#endif
