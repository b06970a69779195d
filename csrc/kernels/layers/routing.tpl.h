/* Routing of mixtures of experts. A token visits the K experts with its largest logits; a softmax,
 * computed in float64, weights the visits. Logits that are not finite affect their own token
 * only. */
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

/* e^(x[i] - top) of DLANES elements from i on; 0 past n. */
INLINE vd router_powers(const float *x, int64_t i, int64_t n, double top) {
    double part[DLANES];
    for (int64_t l = 0; l < DLANES; l++) part[l] = i + l < n ? x[i + l] : -INFINITY;
    return vd_exp(vd_load(part) - top);
}

/* The softmax of a token: an expert's share is e^(logit - top) / total. */
typedef struct {
    double top, total;
} router_share;

static router_share router_share_of(const float *x, int64_t experts, const int32_t *chosen,
                                    int64_t k, int normalize, double *powers) {
    router_share share = {-INFINITY, 0};
    for (int64_t e = 0; e < experts; e++)
        if (x[e] > share.top || x[e] != x[e]) share.top = x[e];
    for (int64_t i = 0; i < k; i++) {
        float own = x[chosen[i]];
        powers[i] = vd_exp(vd_set1(own - share.top))[0];
        if (normalize) share.total += powers[i];
    }
    for (int64_t e = 0; e < experts && !normalize; e += DLANES) {
        vd v = router_powers(x, e, experts, share.top);
        share.total += vd_sum(v);
    }
    return share;
}

typedef struct {
    const pl_call *call;
    double *powers; /* [workers, K] */
} router_job;

static pl_status run_router(const pl_call *c, pl_range_fn piece) {
    router_job job = {c,
                      pl_acquire(sizeof(double) * (size_t)(pl_num_threads() * PL_DIM(c, 'K') + 1))};
    if (!job.powers) return PL_NO_MEMORY;
    in_pieces(PL_DIM(c, 'N'), 16 * PL_DIM(c, 'E'), piece, &job);
    pl_release(job.powers);
    return PL_OK;
}

/* weights[visits[n,i]] = the share of expert chosen[n,i] in the softmax over all logits[n,:], or
 * with `normalize` over the logits of the chosen experts. */
static void visit_weights_piece(const void *context, int64_t begin, int64_t end, int worker) {
    const router_job *job = context;
    const pl_call *c = job->call;
    const visit_weights_args args = visit_weights_args_of(c);
    int64_t experts = PL_DIM(c, 'E'), k = PL_DIM(c, 'K');
    double *powers = job->powers + worker * k;
    for (int64_t n = begin; n < end; n++) {
        const int32_t *chosen = args.chosen + n * k, *visits = args.visits + n * k;
        const float *x = args.logits + n * experts;
        router_share share = router_share_of(x, experts, chosen, k, args.normalize != 0, powers);
        for (int64_t i = 0; i < k; i++) args.weights[visits[i]] = (float)(powers[i] / share.total);
    }
}
pl_status KERNEL(visit_weights)(const pl_call *c) { return run_router(c, visit_weights_piece); }

/* The gradient of the logits. w is an expert's share, d the gradient of its weight, and m the sum
 * of w d over the token's visits. A chosen expert gets w (d - m), another one -w m, or 0 with
 * `normalize`. */
static void visit_weights_grad_piece(const void *context, int64_t begin, int64_t end, int worker) {
    const router_job *job = context;
    const pl_call *c = job->call;
    const visit_weights_grad_args args = visit_weights_grad_args_of(c);
    int64_t experts = PL_DIM(c, 'E'), k = PL_DIM(c, 'K');
    int normalize = args.normalize != 0;
    const float *slope = args.dweights;
    double *powers = job->powers + worker * k;
    for (int64_t n = begin; n < end; n++) {
        const int32_t *chosen = args.chosen + n * k, *visits = args.visits + n * k;
        const float *x = args.logits + n * experts;
        float *dx = args.dlogits + n * experts;
        router_share share = router_share_of(x, experts, chosen, k, normalize, powers);
        double mean = 0;
        for (int64_t i = 0; i < k; i++) mean += powers[i] / share.total * slope[visits[i]];
        for (int64_t e = 0; e < experts; e += DLANES) {
            vd v = normalize ? vd_set1(0)
                             : router_powers(x, e, experts, share.top) / share.total * -mean;
            for (int64_t l = 0; l < DLANES && e + l < experts; l++) dx[e + l] = (float)v[l];
        }
        for (int64_t i = 0; i < k; i++)
            dx[chosen[i]] = (float)(powers[i] / share.total * (slope[visits[i]] - mean));
    }
}
pl_status KERNEL(visit_weights_grad)(const pl_call *c) {
    return run_router(c, visit_weights_grad_piece);
}

#endif
