/* Elementwise operations, one vector per work-item: gates, sums, dropout, optimizer steps; and the
 * sum of squares. The formulas are those of kernels/layers/. */
#include "each.cl"

INLINE V sigmoid(V x) { return v_set(1) / (v_set(1) + v_exp(-x)); }

/* Activations of the form g sigmoid(z(g)): z, and g z'(g) for the gradient. */
typedef struct {
    V z, slope;
} activation;
INLINE activation silu(V g) {
    activation a;
    a.z = a.slope = g;
    return a;
}
/* GELU in its tanh form: 0.5 g (1 + tanh(u)) = g sigmoid(2 u), with
 * u = sqrt(2 / pi) (g + 0.044715 g^3). */
INLINE activation gelu_tanh(V g) {
    /* Beyond 16 the sigmoid is 0 or 1. A NaN stays NaN. */
    V near = v_select(v_less(g, v_set(-16)), v_set(-16), g);
    near = v_select(v_less(v_set(16), near), v_set(16), near);
    V k = 1.5957691216057308f * near, cube = 0.044715f * near * near;
    activation a;
    a.z = k * (1.0f + cube);
    a.slope = k * (1.0f + 3.0f * cube);
    return a;
}

#define GATED_UNIT(name, act) \
    KERNEL name##_forward(IN(gate), IN(up), OUT(y), long n) { \
        MINE; \
        V g = GET(gate); \
        PUT(y, g * sigmoid(act(g).z) * GET(up)); \
    } \
    KERNEL name##_grad(IN(dy), IN(gate), IN(up), OUT(dgate), OUT(dup), long n) { \
        MINE; \
        V d = GET(dy), g = GET(gate), u = GET(up); \
        activation a = act(g); \
        V s = sigmoid(a.z); \
        PUT(dgate, d * u * s * (1.0f + a.slope * (1.0f - s))); \
        PUT(dup, d * g * s); \
    }
GATED_UNIT(swiglu, silu)
GATED_UNIT(geglu, gelu_tanh)

KERNEL glu_forward(IN(gate), IN(up), OUT(y), long n) {
    MINE;
    PUT(y, sigmoid(GET(gate)) * GET(up));
}
KERNEL glu_grad(IN(dy), IN(gate), IN(up), OUT(dgate), OUT(dup), long n) {
    MINE;
    V d = GET(dy), s = sigmoid(GET(gate)), u = GET(up);
    PUT(dgate, d * u * s * (1.0f - s));
    PUT(dup, d * s);
}

KERNEL add(IN(a), IN(b), OUT(y), long n) {
    MINE;
    PUT(y, GET(a) + GET(b));
}
KERNEL ratio(IN(a), IN(b), OUT(y), long n) {
    MINE;
    const V b = GET(b);
    PUT(y, v_select(v_equal(b, v_set(0)), v_set(0), GET(a) / b));
}
KERNEL axpy(float alpha, IN(x), OUT(y), long n) {
    MINE;
    PUT(y, FMA(v_set(alpha), GET(x), GET(y)));
}
KERNEL scale(float alpha, IN(x), OUT(y), long n) {
    MINE;
    PUT(y, alpha * GET(x));
}
KERNEL zero(OUT(y), long n) {
    MINE;
    PUT(y, v_set(0));
}

/* Whether all elements have the same bits; for one work-group. */
KERNEL same_bits(IN(x), IN(y), ARRAY(uchar, same), long n) {
    GROUP_MEMORY
    int differ = 0;
    for (long i = LANE; i < n; i += GROUP) differ |= as_uint(*ROW(x, i)) != as_uint(*ROW(y, i));
    const int any_differs = group_max((SCALAR)differ) > 0;
    if (LANE == 0) *ROW(same, 0) = !any_differs;
}

/* ---- Dropout: each element's random word depends on the seed and its index alone */

INLINE VU mix_words(VU x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ x >> 16;
}
KERNEL dropout(IN(x), OUT(y), long key0, long key1, long key2, long drop_below, float factor,
               long n) {
    MINE;
    uint low[WIDTH];
    for (int l = 0; l < WIDTH; l++) low[l] = (uint)i + (uint)l;
    VU w = mix_words(VLOAD(0, low) ^ (uint)key0);
    w = mix_words((w ^ (uint)key1) + ((uint)(i >> 32) ^ (uint)key2));
    PUT(y, w >= (VU)((uint)drop_below) ? GET(x) * factor : v_set(0));
}

/* ---- Optimizers */

KERNEL adamw(IN(grad), OUT(param), OUT(m), OUT(v), float lr, float decay, float grad_scale,
             float beta1, float rest1, float beta2, float rest2, float eps, float inverse_bias1,
             float inverse_bias2, long n) {
    MINE;
    V g = GET(grad) * grad_scale, p = GET(param);
    V mean = beta1 * GET(m) + rest1 * g, square = beta2 * GET(v) + rest2 * (g * g);
    p -= decay * p;
    p -= lr * (mean * inverse_bias1) / (sqrt(square * inverse_bias2) + eps);
    PUT(param, p);
    PUT(m, mean);
    PUT(v, square);
}
KERNEL adam_atan2(IN(grad), OUT(param), OUT(m), OUT(v), float decay, float step, float grad_scale,
                  float beta1, float rest1, float beta2, float rest2, float scale_v, long n) {
    MINE;
    V g = GET(grad) * grad_scale, p = GET(param);
    V mean = beta1 * GET(m) + rest1 * g, square = beta2 * GET(v) + rest2 * (g * g);
    p -= decay * p;
    p -= step * atan2(mean, sqrt(square * scale_v));
    PUT(param, p);
    PUT(m, mean);
    PUT(v, square);
}
KERNEL sgd(IN(grad), OUT(param), OUT(buf), float lr, float momentum, float fresh,
           float weight_decay, long nesterov, float grad_scale, long n) {
    MINE;
    V p = GET(param), g = GET(grad) * grad_scale + weight_decay * p;
    if (buf_data) {
        V b = momentum * GET(buf) + fresh * g;
        PUT(buf, b);
        g = nesterov ? g + momentum * b : b;
    }
    PUT(param, p - lr * g);
}
KERNEL lion(IN(grad), OUT(param), OUT(m), float lr, float decay, float beta1, float rest1,
            float beta2, float rest2, float grad_scale, long n) {
    MINE;
    V g = GET(grad) * grad_scale, p = GET(param), old = GET(m), mixed = beta1 * old + rest1 * g;
    /* The sign of 0 is 0, of NaN NaN. */
    V sign_of = v_select(v_less(v_set(0), mixed), v_set(1),
                         v_select(v_less(mixed, v_set(0)), v_set(-1), mixed));
    PUT(param, p - decay * p - lr * sign_of);
    PUT(m, beta2 * old + rest2 * g);
}

/* ---- Sum of squares: one part per work-group, then the parts in order */

KERNEL squares_of_parts(IN(x), ARRAY(stored_wide, part), long n, long each) {
    GROUP_MEMORY
    const long begin = (long)get_group_id(0) * each, end = min(n, begin + each);
    exact sum = {0, 0};
    for (long i = begin + LANE * WIDTH; i < end; i += STEP)
        for (long j = i; j < min(end, i + WIDTH); j++) add_product(&sum, *ROW(x, j), *ROW(x, j));
    sum = group_exact(sum);
    if (LANE == 0) put_wide(sum, ROW(part, get_group_id(0)));
}
KERNEL sum_of_parts(ARRAY(const stored_wide, part), ARRAY(stored_wide, out), long parts) {
    if (LANE) return;
    exact sum = {0, 0};
    for (long j = 0; j < parts; j++) add_exact(&sum, take_wide(ROW(part, j)));
    put_wide(sum, ROW(out, 0));
}
