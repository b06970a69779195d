/* The gradient of the gated delta rule: its chunks from the last to the first. */
#ifndef PYLOSS_DELTA_RULE_GRAD_TPL_H
#define PYLOSS_DELTA_RULE_GRAD_TPL_H
#include "delta_rule.tpl.h"

/* What a worker has beside the chunk. A sequence goes forward once more: the states between
 * chunks, and U and e^G K S of all rows, are kept until it has gone back. */
typedef struct {
    const delta_job *job;
    float *d_o, *du, *dseen;        /* [rows, E] */
    float *dk, *dq, *dlater;        /* [rows, D], of keys and queries of length 1 */
    float *state_t, *slope_t, *u_t; /* transposed: [E, D], [E, D], [E, rows] */
    float *slope;                   /* [D, E], of the state after, then before the chunk */
    float *by_p, *by_n;             /* [rows, rows] */
    float *states, *u, *seen;       /* of the whole sequence */
} delta_slopes;

static int64_t delta_slopes_size(const delta_inputs *in, int64_t longest) {
    const int64_t chunks = (longest + CHUNK - 1) / CHUNK;
    return delta_chunk_size(in) + (3 * in->estep + 3 * in->dstep + 2 * CHUNK_STEP) * CHUNK +
           in->e * (2 * in->dstep + CHUNK_STEP) + (chunks + 1) * in->d * in->estep +
           2 * chunks * CHUNK * in->estep;
}

typedef struct {
    delta_job job;
    int64_t longest;
    const float *d_o, *dlast;
    float *dq, *dk, *dv, *dg, *dbeta, *dstate;
} delta_grad_job;

/* Gradients of a chunk's row of keys or queries: from those of length 1 to the caller's. */
INLINE void delta_put_key(const delta_inputs *in, const float *x, const float *slope, float inverse,
                          int add, float *to) {
    const int64_t d = in->d;
    const float along = in->eps < 0 ? 0 : delta_dot(x, slope, whole_vectors(d));
    for (int64_t j = 0; j < d; j += LANES) {
        const int64_t n = at_most(d - j, LANES);
        const vf one = inverse * (vf_load(slope + j) - along * vf_load(x + j));
        vf_store_part(to + j, add ? vf_load_part(to + j, n, 0) + one : one, n);
    }
}

/* One chunk, back. `w->slope` is the gradient of the state after it, and becomes that of the state
 * before it. */
static void delta_back(delta_chunk *c, delta_slopes *w, const delta_grad_job *job, const float *s,
                       int add) {
    const delta_inputs *in = c->in;
    const int64_t d = in->d, e = in->e, ds = in->dstep, es = in->estep, rows = c->rows;
    const int64_t dv = whole_vectors(d), ev = whole_vectors(e);
    const int64_t at = c->row * in->heads + c->head;
    double gate[CHUNK]; /* of G */
    float dbeta[CHUNK];
    delta_copy(job->d_o + at * e, in->heads * e, rows, e, 1, w->d_o, es);
    delta_transpose(s, es, d, e, w->state_t, ds);
    delta_transpose(w->slope, es, d, e, w->slope_t, ds);
    delta_transpose(c->u, es, rows, e, w->u_t, CHUNK_STEP);

    /* U, the system that it solves, and what that reads */
    delta_by_upper(c, c->p, w->d_o, e, es, 0, w->du);
    delta_product(c, c->later_k, ds, d, w->slope, es, e, 1, w->du, es);
    if (in->delta) delta_solve(c, 1, w->du);
    for (int64_t i = 0; i < rows; i++) {
        const float *du = w->du + i * es, *seen = c->seen + i * es;
        const float *v = in->v + (at + i * in->heads) * e;
        float *dvalue = job->dv + (at + i * in->heads) * e, *dseen = w->dseen + i * es;
        const vf beta = vf_set1(c->beta[i]), since = vf_set1(-c->since[i]);
        vf by_beta = vf_set1(0), by_gate = vf_set1(0);
        for (int64_t j = 0; j < e; j += LANES) {
            const int64_t n = at_most(e - j, LANES);
            const vf du_j = vf_load(du + j), one = beta * du_j, value = vf_load_part(v + j, n, 0);
            vf_store_part(dvalue + j, one, n);
            if (!in->delta) {
                by_beta += du_j * value;
                continue;
            }
            const vf known = vf_load(seen + j);
            by_beta += du_j * (value - known);
            by_gate += one * known;
            vf_store(dseen + j, since * one);
        }
        dbeta[i] = vf_sum(by_beta);
        gate[i] = -(double)vf_sum(by_gate);
    }

    /* products with the state, and with the gradient of the next one */
    delta_product(c, w->d_o, es, e, w->state_t, ds, d, 0, w->dq, ds);
    if (in->delta) delta_product(c, w->dseen, es, e, w->state_t, ds, d, 0, w->dk, ds);
    delta_product(c, c->u, es, e, w->slope_t, ds, d, 0, w->dlater, ds);
    double last = 0; /* of G of the last row, from the decays until there */
    for (int64_t i = 0; i < rows; i++) {
        float *dq = w->dq + i * ds, *dlater = w->dlater + i * ds;
        gate[i] += (double)delta_dot(c->earlier_q + i * ds, dq, dv);
        delta_scale(c->since[i] * in->scale, dq, dv, 0, dq);
        const double later = (double)delta_dot(c->later_k + i * ds, dlater, dv);
        gate[i] -= later;
        last += later;
        delta_scale(c->until[i], dlater, dv, in->delta, w->dk + i * ds);
    }
    float kept = 0;
    for (int64_t i = 0; i < d; i++) kept += delta_dot(s + i * es, w->slope + i * es, ev);
    gate[rows - 1] += last + (double)c->since[rows - 1] * (double)kept;

    /* products within the chunk */
    delta_lower(w->d_o, es, w->u_t, rows, e, w->by_p);
    if (in->delta) delta_lower(w->du, es, w->u_t, rows, e, w->by_n);
    double above[CHUNK] = {0};
    for (int64_t i = 0; i < rows; i++) {
        float *by_p = w->by_p + i * CHUNK_STEP, *by_n = w->by_n + i * CHUNK_STEP;
        const float *p = c->p + i * CHUNK_STEP, *n = c->n + i * CHUNK_STEP;
        const float *decay = c->decay + i * CHUNK_STEP, *kk = c->kk + i * CHUNK_STEP;
        float by_kk = 0;
        double sum = 0;
        for (int64_t j = 0; j < i; j++) {
            double one = (double)(by_p[j] * p[j]);
            if (in->delta) {
                one += (double)(by_n[j] * n[j]);
                by_kk += by_n[j] * kk[j];
            }
            sum += one;
            above[j] += one;
        }
        gate[i] += sum;
        dbeta[i] -= by_kk;
        for (int64_t j = 0; j < CHUNK; j++) by_p[j] = j <= i ? in->scale * decay[j] * by_p[j] : 0;
        for (int64_t j = 0; in->delta && j < CHUNK; j++)
            by_n[j] = j < i ? -c->beta[i] * decay[j] * by_n[j] : 0;
    }
    delta_by_lower(c, w->by_p, c->k, d, ds, 1, w->dq);
    delta_by_upper(c, w->by_p, c->q, d, ds, 1, w->dk);
    if (in->delta) {
        delta_by_lower(c, w->by_n, c->k, d, ds, 1, w->dk);
        delta_by_upper(c, w->by_n, c->k, d, ds, 1, w->dk);
    }

    double sum = 0;
    for (int64_t i = rows - 1; i >= 0; i--) {
        sum += gate[i] - above[i];
        job->dg[at + i * in->heads] = (float)sum;
        job->dbeta[at + i * in->heads] = dbeta[i];
        const int64_t key = delta_key_at(c, c->row + i);
        delta_put_key(in, c->k + i * ds, w->dk + i * ds, c->k_length[i], add, job->dk + key);
        delta_put_key(in, c->q + i * ds, w->dq + i * ds, c->q_length[i], add, job->dq + key);
    }
    delta_into_state(c, c->earlier_q, w->d_o, c->since[rows - 1], w->slope);
    if (in->delta) delta_into_state(c, c->k, w->dseen, 1, w->slope);
}

/* One value head of a sequence; with `add` its group's gradients of keys and queries have been
 * begun by another. */
static void delta_grad_one(const delta_grad_job *job, int64_t s, int64_t head, int add,
                           float *memory) {
    const delta_inputs *in = &job->job.in;
    const int64_t begin = in->offsets[s], end = in->offsets[s + 1];
    const int64_t chunks = (job->longest + CHUNK - 1) / CHUNK, size = in->d * in->estep;
    const int64_t given = (s * in->heads + head) * in->d * in->e;
    delta_chunk c = delta_chunk_at(in, &memory);
    delta_slopes w;
    c.head = head;
    w.d_o = delta_take(&memory, CHUNK, in->estep), w.du = delta_take(&memory, CHUNK, in->estep);
    w.dseen = delta_take(&memory, CHUNK, in->estep);
    w.dk = delta_take(&memory, CHUNK, in->dstep), w.dq = delta_take(&memory, CHUNK, in->dstep);
    w.dlater = delta_take(&memory, CHUNK, in->dstep);
    w.state_t = delta_take(&memory, in->e, in->dstep);
    w.slope_t = delta_take(&memory, in->e, in->dstep);
    w.u_t = delta_take(&memory, in->e, CHUNK_STEP);
    w.slope = delta_take(&memory, in->d, in->estep);
    w.by_p = delta_take(&memory, CHUNK, CHUNK_STEP);
    w.by_n = delta_take(&memory, CHUNK, CHUNK_STEP);
    w.states = delta_take(&memory, chunks * in->d, in->estep);
    w.u = delta_take(&memory, chunks * CHUNK, in->estep);
    w.seen = delta_take(&memory, chunks * CHUNK, in->estep);

    if (in->state) delta_copy(in->state + given, in->e, in->d, in->e, 1, c.state, in->estep);
    else memset(c.state, 0, (size_t)size * sizeof *c.state);
    for (int64_t row = begin; row < end; row += CHUNK) {
        memcpy(w.states + (row - begin) / CHUNK * size, c.state, (size_t)size * sizeof *c.state);
        c.u = w.u + (row - begin) * in->estep, c.seen = w.seen + (row - begin) * in->estep;
        delta_begin(&c, row, at_most(end - row, CHUNK));
        delta_update(&c, c.state);
        if (row + CHUNK < end) delta_advance(&c, c.state);
    }
    if (job->dlast) delta_copy(job->dlast + given, in->e, in->d, in->e, 1, w.slope, in->estep);
    else memset(w.slope, 0, (size_t)size * sizeof *w.slope);
    for (int64_t row = begin + (end - begin - 1) / CHUNK * CHUNK; row >= begin && begin < end;
         row -= CHUNK) {
        c.u = w.u + (row - begin) * in->estep, c.seen = w.seen + (row - begin) * in->estep;
        if (row + CHUNK < end) delta_begin(&c, row, CHUNK); /* the last one is still there */
        delta_back(&c, &w, job, w.states + (row - begin) / CHUNK * size, add);
    }
    if (job->dstate) delta_put(w.slope, in->estep, in->d, in->e, job->dstate + given, in->e);
}
static void delta_grad_piece(const void *context, int64_t begin, int64_t end, int worker) {
    const delta_grad_job *job = context;
    const delta_inputs *in = &job->job.in;
    const int64_t each = in->heads / at_least(in->k_heads, 1);
    for (int64_t i = begin; i < end; i++)
        for (int64_t h = 0; h < each; h++)
            delta_grad_one(job, i / in->k_heads, i % in->k_heads * each + h, h > 0,
                           job->job.scratch + worker * job->job.size);
}
pl_status KERNEL(delta_rule_grad)(const pl_call *c) {
    const delta_rule_grad_args args = delta_rule_grad_args_of(c);
    delta_grad_job job = {.job = {.in = DELTA_INPUTS(c, args, args.state)},
                          .d_o = args.d_o,
                          .dlast = args.dlast,
                          .dq = args.dq,
                          .dk = args.dk,
                          .dv = args.dv,
                          .dg = args.dg,
                          .dbeta = args.dbeta,
                          .dstate = args.dstate};
    const delta_inputs *in = &job.job.in;
    for (int64_t s = 0; s < in->sequences; s++)
        job.longest = at_least(job.longest, in->offsets[s + 1] - in->offsets[s]);
    const size_t keys = (size_t)(PL_DIM(c, 'N') * in->k_heads * in->d) * sizeof(float);
    if (!in->heads) memset(args.dq, 0, keys), memset(args.dk, 0, keys);
    job.job.size = round_up(delta_slopes_size(in, job.longest), 16);
    const size_t bytes = (size_t)(job.job.size * pl_num_threads() + 1) * sizeof(float);
    job.job.scratch = pl_acquire(bytes);
    if (!job.job.scratch) return PL_NO_MEMORY;
    pl_parallel(in->sequences * in->k_heads, 1, delta_grad_piece, &job);
    pl_release(job.job.scratch);
    return PL_OK;
}

#undef DELTA_INPUTS
#endif
