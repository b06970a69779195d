/* Routing of mixtures of experts. A token visits the K experts with its largest logits or scores; a
 * softmax or sigmoids, computed in float64, weight the visits. Logits that are not finite affect
 * their own token only. */
#ifndef PYLOSS_ROUTING_TPL_H
#define PYLOSS_ROUTING_TPL_H
#include "../kernel.h"
#include "../pieces.h"
#include "../simd/vec.h"

/* chosen[n,:] = the experts of the K largest logits[n,:], by ascending number. Of equal logits the
 * first wins; NaN counts as -inf. With fewer than K experts the rest are -1. */
static void top_experts_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const pl_call *c = context;
    const top_experts_args args = top_experts_args_of(c);
    int64_t experts = PL_DIM(c, 'E'), k = PL_DIM(c, 'K');
    for (int64_t n = begin; n < end; n++) {
        const float *x = args.logits + n * experts;
        int32_t *chosen = args.chosen + n * k;
        /* Each pass finds the next logit in descending order. Experts up to the last one found
         * are chosen. */
        float last = INFINITY;
        int64_t last_at = -1, count = 0;
        for (int64_t i = 0; i < k && i < experts; i++) {
            float best = -INFINITY;
            int64_t best_at = -1;
            for (int64_t e = 0; e < experts; e++) {
                float v = x[e] == x[e] ? x[e] : -INFINITY;
                if ((v < last || (v == last && e > last_at)) && (best_at < 0 || v > best))
                    best = v, best_at = e;
            }
            last = best;
            last_at = best_at;
        }
        for (int64_t e = 0; e < experts && count < k; e++) {
            float v = x[e] == x[e] ? x[e] : -INFINITY;
            if (v > last || (v == last && e <= last_at)) chosen[count++] = (int32_t)e;
        }
        for (; count < k; count++) chosen[count] = -1;
    }
}
pl_status KERNEL(top_experts)(const pl_call *c) {
    in_pieces(PL_DIM(c, 'N'), PL_DIM(c, 'E') * PL_DIM(c, 'K'), top_experts_piece, c);
    return PL_OK;
}

/* A counting sort. Only the sizes of `logits` are read. */
pl_status KERNEL(sort_visits)(const pl_call *c) {
    const sort_visits_args args = sort_visits_args_of(c);
    int64_t experts = PL_DIM(c, 'E'), k = PL_DIM(c, 'K'), count = PL_DIM(c, 'N') * k;
    int32_t *end = args.offsets + 1; /* of an expert's visits that are placed */
    memset(args.offsets, 0, sizeof(int32_t) * (size_t)(experts + 1));
    for (int64_t i = 0; i < count; i++)
        if (args.chosen[i] + 1 < experts) end[args.chosen[i] + 1]++;
    for (int64_t e = 1; e < experts; e++) end[e] += end[e - 1];
    for (int64_t i = 0; i < count; i++) {
        int32_t visit = end[args.chosen[i]]++;
        args.visits[i] = visit;
        args.tokens[visit] = (int32_t)(i / k);
    }
    return PL_OK;
}

/* e^(x[i] - top) of DLANES elements from i on; 0 past n. */
INLINE vd router_powers(const float *x, int64_t i, int64_t n, double top) {
    double part[DLANES];
    for (int64_t l = 0; l < DLANES; l++) part[l] = i + l < n ? x[i + l] : -INFINITY;
    return vd_exp(vd_load(part) - top);
}

INLINE vd router_sigmoid(const float *x, int64_t i, int64_t n) {
    double part[DLANES];
    for (int64_t l = 0; l < DLANES; l++) part[l] = i + l < n ? -x[i + l] : 0;
    return 1 / (1 + vd_exp(vd_load(part)));
}

/* scores = sigmoid(logits) + bias, by which experts are chosen. */
static void sigmoid_scores_piece(const void *context, int64_t begin, int64_t end,
                                 int worker UNUSED) {
    const pl_call *c = context;
    const sigmoid_scores_args args = sigmoid_scores_args_of(c);
    int64_t experts = PL_DIM(c, 'E');
    for (int64_t n = begin; n < end; n++)
        for (int64_t e = 0; e < experts; e += DLANES) {
            vd v = router_sigmoid(args.logits + n * experts, e, experts);
            for (int64_t l = 0; l < DLANES && e + l < experts; l++)
                args.scores[n * experts + e + l] =
                    (float)(v[l] + (args.bias ? args.bias[e + l] : 0));
        }
}
pl_status KERNEL(sigmoid_scores)(const pl_call *c) {
    in_pieces(PL_DIM(c, 'N'), 16 * PL_DIM(c, 'E'), sigmoid_scores_piece, c);
    return PL_OK;
}

/* How a token's visits are weighted. */
typedef struct {
    int normalize, sigmoid;
    double factor;
} router_rule;

/* The shares of a token: `own[i]` / total of its chosen experts. In a softmax that of expert e is
 * e^(logit - top) / total; a sigmoid's total is 1, or with `normalize` the sum of the chosen. */
typedef struct {
    double top, total;
} router_share;
#define ROUTER_EPS 1e-6

static router_share router_share_of(const float *x, int64_t experts, const int32_t *chosen,
                                    int64_t k, router_rule rule, double *own) {
    router_share share = {-INFINITY, 0};
    for (int64_t e = 0; e < experts && !rule.sigmoid; e++)
        if (x[e] > share.top || x[e] != x[e]) share.top = x[e];
    for (int64_t i = 0; i < k; i++) {
        float mine = x[chosen[i]];
        own[i] =
            rule.sigmoid ? router_sigmoid(&mine, 0, 1)[0] : vd_exp(vd_set1(mine - share.top))[0];
        if (rule.normalize) share.total += own[i];
    }
    if (rule.sigmoid) share.total = rule.normalize ? share.total + ROUTER_EPS : 1;
    for (int64_t e = 0; e < experts && !rule.normalize && !rule.sigmoid; e += DLANES) {
        vd v = router_powers(x, e, experts, share.top);
        share.total += vd_sum(v);
    }
    return share;
}

typedef struct {
    const pl_call *call;
    double *own; /* [workers, K] */
} router_job;

static pl_status run_router(const pl_call *c, pl_range_fn piece) {
    router_job job = {c,
                      pl_acquire(sizeof(double) * (size_t)(pl_num_threads() * PL_DIM(c, 'K') + 1))};
    if (!job.own) return PL_NO_MEMORY;
    in_pieces(PL_DIM(c, 'N'), 16 * PL_DIM(c, 'E'), piece, &job);
    pl_release(job.own);
    return PL_OK;
}

/* weights[visits[n,i]] = factor times the share of expert chosen[n,i]: in the softmax over all
 * logits[n,:], or with `normalize` over the logits of the chosen experts; or its sigmoid. */
static void visit_weights_piece(const void *context, int64_t begin, int64_t end, int worker) {
    const router_job *job = context;
    const pl_call *c = job->call;
    const visit_weights_args args = visit_weights_args_of(c);
    const router_rule rule = {args.normalize != 0, args.sigmoid != 0, args.factor};
    int64_t experts = PL_DIM(c, 'E'), k = PL_DIM(c, 'K');
    double *own = job->own + worker * k;
    for (int64_t n = begin; n < end; n++) {
        const int32_t *chosen = args.chosen + n * k, *visits = args.visits + n * k;
        const float *x = args.logits + n * experts;
        router_share share = router_share_of(x, experts, chosen, k, rule, own);
        for (int64_t i = 0; i < k; i++)
            args.weights[visits[i]] = (float)(rule.factor * own[i] / share.total);
    }
}
pl_status KERNEL(visit_weights)(const pl_call *c) { return run_router(c, visit_weights_piece); }

/* The gradient of the logits. w is an expert's weight, s its sigmoid, d the gradient of w, and m the
 * sum of d times the shares of the token's visits. In a softmax a chosen expert gets w (d - m),
 * another one -w m, or 0 with `normalize`; a sigmoid's gets w (d - m) (1 - s), without `normalize`
 * w d (1 - s). */
static void visit_weights_grad_piece(const void *context, int64_t begin, int64_t end, int worker) {
    const router_job *job = context;
    const pl_call *c = job->call;
    const visit_weights_grad_args args = visit_weights_grad_args_of(c);
    const router_rule rule = {args.normalize != 0, args.sigmoid != 0, args.factor};
    int64_t experts = PL_DIM(c, 'E'), k = PL_DIM(c, 'K');
    const float *slope = args.dweights;
    double *own = job->own + worker * k;
    for (int64_t n = begin; n < end; n++) {
        const int32_t *chosen = args.chosen + n * k, *visits = args.visits + n * k;
        const float *x = args.logits + n * experts;
        float *dx = args.dlogits + n * experts;
        router_share share = router_share_of(x, experts, chosen, k, rule, own);
        double mean = 0;
        for (int64_t i = 0; i < k && (rule.normalize || !rule.sigmoid); i++)
            mean += own[i] / share.total * slope[visits[i]];
        for (int64_t e = 0; e < experts; e += DLANES) {
            vd v = rule.normalize || rule.sigmoid ? vd_set1(0)
                                                  : router_powers(x, e, experts, share.top) /
                                                        share.total * (-mean * rule.factor);
            for (int64_t l = 0; l < DLANES && e + l < experts; l++) dx[e + l] = (float)v[l];
        }
        for (int64_t i = 0; i < k; i++)
            dx[chosen[i]] = (float)(rule.factor * own[i] / share.total * (slope[visits[i]] - mean) *
                                    (rule.sigmoid ? 1 - own[i] : 1));
    }
}
pl_status KERNEL(visit_weights_grad)(const pl_call *c) {
    return run_router(c, visit_weights_grad_piece);
}

#endif
