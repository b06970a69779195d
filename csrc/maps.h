/* The formulas of the elementwise maps of maps.def, for C and OpenCL C. V and the functions of
 * losses/formulas.h are defined, for float32, and besides
 *
 *   v_log(x)           of any x
 *   v_sqrt(x)
 *   v_copysign(x, s)   |x| with the sign of s
 *   v_residue(a, b, p) the rounding error a b - p of the product p; 0 if there is no FMA
 *
 * NaN, infinite and subnormal elements give what NumPy gives. */

/* 1 / (1 + e^-x) */
INLINE V FORMULA(logistic)(V x) { return v_set(1) / (v_set(1) + v_exp(-x)); }

/* The distribution function of the normal distribution and its density. The smaller tail is
 * e^(-x^2 / 2) G(|x|), with G a polynomial in t = 1 / (1 + 0.35 |x|), minimax up to 15. */
typedef struct {
    V below, density;
} FORMULA(normal);
INLINE FORMULA(normal) FORMULA(normal_at)(V x) {
    V a = v_min(v_set(15), v_abs(x)), t = v_set(1) / (a * 0.35f + 1.0f);
    V p = t * 0.00257634868f - 0.0426708665f;
    p = p * t + 0.17454723f;
    p = p * t - 0.294661043f;
    p = p * t + 0.189875985f;
    p = p * t - 0.0385872584f;
    p = p * t + 0.110479617f;
    p = p * t + 0.118855063f;
    p = p * t + 0.139968396f;
    p = p * t + 0.139616517f;
    V half_a = a * 0.5f, square = half_a * a;
    V e = v_decay(-square);
    e = e - e * v_residue(half_a, a, square);
    V tail = e * (p * t);
    FORMULA(normal) found;
    found.below = v_select(v_less(x, v_set(0)), tail, v_set(1) - tail);
    found.density = e * 0.398942280f;
    return found;
}

/* GELU in its tanh form: 0.5 x (1 + tanh(u)) = x logistic(2 u) with
 * u = sqrt(2 / pi) (x + 0.044715 x^3).
 * Beyond 16 the logistic is 0 or 1. */
typedef struct {
    V twice_u, slope; /* and x times its derivative */
} FORMULA(gelu_argument);
INLINE FORMULA(gelu_argument) FORMULA(gelu_argument_at)(V x) {
    V near = v_min(v_set(16), v_max(v_set(-16), x));
    V k = near * 1.5957691216057308f, cube = near * 0.044715f * near;
    FORMULA(gelu_argument) found;
    found.twice_u = k * (cube + 1.0f);
    found.slope = k * (cube * 3.0f + 1.0f);
    return found;
}

/* ---- y = f(x), and dx = dy f' by x or y */

INLINE V FORMULA(exp)(V x) { return v_exp(x); }
INLINE V FORMULA(exp_grad)(V dy, V y) { return dy * y; }

INLINE V FORMULA(expm1)(V x) {
    return v_select(v_less(v_set(80), x), v_exp(x), v_expm1(v_min(v_set(80), x)));
}
INLINE V FORMULA(expm1_grad)(V dy, V x) { return dy * v_exp(x); }

INLINE V FORMULA(log)(V x) { return v_log(x); }
INLINE V FORMULA(log_grad)(V dy, V x) { return dy / x; }

INLINE V FORMULA(log1p)(V x) {
    /* -1 gives -inf, less NaN: as 1 / 0 and 0 / 0. */
    V below = v_select(v_equal(x, v_set(-1)), v_set(-INFINITY), v_set(NAN));
    V y = v_log1p(v_select(v_less(v_set(-1), x), x, v_set(0)));
    V past = v_select(v_equal(x, x), below, x);
    return v_select(v_less(v_set(-1), x), y, past);
}
INLINE V FORMULA(log1p_grad)(V dy, V x) { return dy / (x + 1.0f); }

INLINE V FORMULA(sqrt)(V x) { return v_sqrt(x); }
INLINE V FORMULA(sqrt_grad)(V dy, V y) { return dy / (y + y); }

INLINE V FORMULA(square)(V x) { return x * x; }
INLINE V FORMULA(square_grad)(V dy, V x) { return dy * (x + x); }

INLINE V FORMULA(reciprocal)(V x) { return v_set(1) / x; }
INLINE V FORMULA(reciprocal_grad)(V dy, V y) { return -(dy * y * y); }

INLINE V FORMULA(absolute)(V x) { return v_abs(x); }
INLINE V FORMULA(absolute_grad)(V dy, V x) {
    /* The sign of 0 is 0, of NaN NaN. */
    V sign = v_select(v_less(v_abs(x), v_set(INFINITY)), v_set(0), x);
    sign = v_select(v_less(v_set(0), x), v_set(1), v_select(v_less(x, v_set(0)), v_set(-1), sign));
    return dy * sign;
}

INLINE V FORMULA(tanh)(V x) {
    V t = v_expm1(v_min(v_set(10), v_abs(x)) * -2.0f);
    return v_copysign(t / (t + 2.0f), x);
}
INLINE V FORMULA(tanh_grad)(V dy, V y) { return dy * (v_set(1) - y * y); }

INLINE V FORMULA(sigmoid)(V x) { return FORMULA(logistic)(x); }
INLINE V FORMULA(sigmoid_grad)(V dy, V y) { return dy * (y * (v_set(1) - y)); }

INLINE V FORMULA(silu)(V x) { return x / (v_set(1) + v_exp(-x)); }
INLINE V FORMULA(silu_grad)(V dy, V x) {
    V s = FORMULA(logistic)(x);
    return dy * (s * (v_set(1) + x * (v_set(1) - s)));
}

INLINE V FORMULA(gelu)(V x) { return x * FORMULA(normal_at)(x).below; }
INLINE V FORMULA(gelu_grad)(V dy, V x) {
    FORMULA(normal) n = FORMULA(normal_at)(x);
    return dy * (n.below + x * n.density);
}

INLINE V FORMULA(gelu_tanh)(V x) {
    return x * FORMULA(logistic)(FORMULA(gelu_argument_at)(x).twice_u);
}
INLINE V FORMULA(gelu_tanh_grad)(V dy, V x) {
    FORMULA(gelu_argument) a = FORMULA(gelu_argument_at)(x);
    V s = FORMULA(logistic)(a.twice_u);
    return dy * (s * (v_set(1) + a.slope * (v_set(1) - s)));
}

INLINE V FORMULA(relu)(V x) { return v_max(v_set(0), x); }
INLINE V FORMULA(relu_grad)(V dy, V y) { return v_select(v_less(v_set(0), y), dy, v_set(0)); }

/* ---- y = f(a, b) */

INLINE V FORMULA(add)(V a, V b) { return a + b; }
INLINE V FORMULA(subtract)(V a, V b) { return a - b; }
INLINE V FORMULA(multiply)(V a, V b) { return a * b; }
INLINE V FORMULA(divide)(V a, V b) { return a / b; }
/* NaN if either is. */
INLINE V FORMULA(maximum)(V a, V b) { return v_select(v_equal(a, a), v_max(a, b), a); }
INLINE V FORMULA(minimum)(V a, V b) { return v_select(v_equal(a, a), v_min(a, b), a); }
/* 1 where a > b, 1/2 where they are equal, else 0: what a has of the gradient of their maximum. */
INLINE V FORMULA(above)(V a, V b) {
    V shared = v_select(v_equal(a, b), v_set(0.5f), v_set(0));
    return v_select(v_less(b, a), v_set(1), shared);
}
