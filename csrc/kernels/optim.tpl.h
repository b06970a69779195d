/* Optimisers: one fused update in place over a flat parameter [N]. g stands for grad * grad_scale. */

typedef struct {
    float lr, decay, grad_scale;
    float beta1, rest1, beta2, rest2; /* rest = 1 - beta, rounded once */
    float eps, inverse_bias1, inverse_bias2;
} adamw_constants;

INLINE void adamw_lanes(vf *v, int64_t index UNUSED, const void *constants) {
    const adamw_constants *k = constants;
    vf g = v[0] * k->grad_scale, p = v[1];
    vf m = k->beta1 * v[2] + k->rest1 * g, s = k->beta2 * v[3] + k->rest2 * (g * g);
    p -= k->decay * p;
    p -= k->lr * (m * k->inverse_bias1) / (vf_sqrt(s * k->inverse_bias2) + k->eps);
    v[0] = p;
    v[1] = m;
    v[2] = s;
}

/* p -= lr wd p;  m = beta1 m + (1-beta1) g;  v = beta2 v + (1-beta2) g^2;  p -= lr (m / bias1) / (sqrt(v / bias2) + eps) */
static void adamw_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const pl_call *c = context;
    double lr = c->arg[1].f, beta1 = c->arg[2].f, beta2 = c->arg[3].f;
    adamw_constants k = {
        .lr = (float)lr,
        .decay = (float)(lr * c->arg[5].f),
        .grad_scale = (float)c->arg[8].f,
        .beta1 = (float)beta1,
        .rest1 = (float)(1 - beta1),
        .beta2 = (float)beta2,
        .rest2 = (float)(1 - beta2),
        .eps = (float)c->arg[4].f,
        .inverse_bias1 = (float)(1 / c->arg[6].f),
        .inverse_bias2 = (float)(1 / c->arg[7].f),
    };
    float *p = c->arg[9].out, *m = c->arg[10].out, *v = c->arg[11].out;
    map(adamw_lanes, 4, (const float *[]){c->arg[0].in, p, m, v}, 3, (float *[]){p, m, v}, begin, end, &k);
}
static pl_status adamw(const pl_call *c) {
    pl_parallel(PL_DIM(c, 'N'), PIECE, adamw_piece, c);
    return PL_OK;
}

typedef struct {
    float lr, weight_decay, momentum, fresh, grad_scale;
    int nesterov;
} sgd_constants;

INLINE void sgd_plain_lanes(vf *v, int64_t index UNUSED, const void *constants) {
    const sgd_constants *k = constants;
    v[0] = v[1] - k->lr * (v[0] * k->grad_scale + k->weight_decay * v[1]);
}
INLINE void sgd_momentum_lanes(vf *v, int64_t index UNUSED, const void *constants) {
    const sgd_constants *k = constants;
    vf g = v[0] * k->grad_scale + k->weight_decay * v[1], buf = k->momentum * v[2] + k->fresh * g;
    v[0] = v[1] - k->lr * (k->nesterov ? g + k->momentum * buf : buf);
    v[1] = buf;
}

/* g += wd p;  buf = momentum buf + (1-dampening) g;  p -= lr (g + momentum buf if nesterov, else buf); without buf p -= lr g */
static void sgd_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const pl_call *c = context;
    sgd_constants k = {
        .lr = (float)c->arg[1].f,
        .momentum = (float)c->arg[2].f,
        .fresh = (float)(1 - c->arg[3].f),
        .weight_decay = (float)c->arg[4].f,
        .nesterov = c->arg[5].i != 0,
        .grad_scale = (float)c->arg[6].f,
    };
    float *p = c->arg[7].out, *buf = c->arg[8].out;
    if (buf) map(sgd_momentum_lanes, 3, (const float *[]){c->arg[0].in, p, buf}, 2, (float *[]){p, buf}, begin, end, &k);
    else map(sgd_plain_lanes, 2, (const float *[]){c->arg[0].in, p}, 1, (float *[]){p}, begin, end, &k);
}
static pl_status sgd(const pl_call *c) {
    pl_parallel(PL_DIM(c, 'N'), PIECE, sgd_piece, c);
    return PL_OK;
}

typedef struct {
    float lr, decay, beta1, rest1, beta2, rest2, grad_scale;
} lion_constants;

INLINE void lion_lanes(vf *v, int64_t index UNUSED, const void *constants) {
    const lion_constants *k = constants;
    vf g = v[0] * k->grad_scale, p = v[1], m = v[2], mixed = k->beta1 * m + k->rest1 * g;
    /* 0 and NaN are their own signs. */
    vf sign = vf_select(vf_less(vf_set1(0), mixed), vf_set1(1), vf_select(vf_less(mixed, vf_set1(0)), vf_set1(-1), mixed));
    v[0] = p - k->decay * p - k->lr * sign;
    v[1] = k->beta2 * m + k->rest2 * g;
}

/* p -= lr wd p;  p -= lr sign(beta1 m + (1-beta1) g);  m = beta2 m + (1-beta2) g */
static void lion_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const pl_call *c = context;
    double lr = c->arg[1].f, beta1 = c->arg[2].f, beta2 = c->arg[3].f;
    lion_constants k = {
        .lr = (float)lr,
        .decay = (float)(lr * c->arg[4].f),
        .beta1 = (float)beta1,
        .rest1 = (float)(1 - beta1),
        .beta2 = (float)beta2,
        .rest2 = (float)(1 - beta2),
        .grad_scale = (float)c->arg[5].f,
    };
    float *p = c->arg[6].out, *m = c->arg[7].out;
    map(lion_lanes, 3, (const float *[]){c->arg[0].in, p, m}, 2, (float *[]){p, m}, begin, end, &k);
}
static pl_status lion(const pl_call *c) {
    pl_parallel(PL_DIM(c, 'N'), PIECE, lion_piece, c);
    return PL_OK;
}
