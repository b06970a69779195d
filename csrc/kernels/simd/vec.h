/* The vector types of the instruction set that is compiled, and the primitives that GNU vector
 * operators lack.
 *
 * isa_*.c defines PL_BYTES (16, 32 or 64). vf holds LANES floats, vi LANES int32, vd DLANES
 * doubles, vl DLANES int64. Loads and stores may be unaligned, unless they say otherwise. */
#ifndef PYLOSS_VEC_H
#define PYLOSS_VEC_H
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define LANES (PL_BYTES / 4)
#define DLANES (PL_BYTES / 8)
#define INLINE static inline __attribute__((always_inline, unused))
#define NOINLINE __attribute__((noinline))
#define UNUSED __attribute__((unused))

typedef float vf __attribute__((vector_size(PL_BYTES)));
typedef int32_t vi __attribute__((vector_size(PL_BYTES)));
typedef double vd __attribute__((vector_size(PL_BYTES)));
typedef int64_t vl __attribute__((vector_size(PL_BYTES)));

/* Intrinsics of the vector's width, and their types: X86(max_ps) is _mm512_max_ps if vectors have
 * 64 bytes. */
#if PL_BYTES == 64
#define X86(name) _mm512_##name
typedef __m512 x86_ps;
typedef __m512d x86_pd;
#elif PL_BYTES == 32
#define X86(name) _mm256_##name
typedef __m256 x86_ps;
typedef __m256d x86_pd;
#elif defined(__x86_64__)
#define X86(name) _mm_##name
typedef __m128 x86_ps;
#endif

INLINE vf vf_set1(float a) { return a - (vf){0}; }
INLINE vd vd_set1(double a) { return a - (vd){0}; }
INLINE vi vi_set1(int32_t a) { return a + (vi){0}; }

INLINE vf vf_load(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE void vf_store(float *p, vf v) { memcpy(p, &v, sizeof v); }
/* LANES bytes as integers. */
INLINE vi vi_load_bytes(const uint8_t *p) {
#if PL_BYTES == 64
    return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
#elif PL_BYTES == 32
    return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
#else
    vi v;
    for (int i = 0; i < LANES; i++) v[i] = p[i];
    return v;
#endif
}
INLINE vd vd_load(const double *p) {
    vd v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE void vd_store(double *p, vd v) { memcpy(p, &v, sizeof v); }

/* Four floats each of rows[0], rows[4], rows[8], ..., all from element `at` on, in one vector. */
INLINE vf vf_load_fours(const float *const *rows, int64_t at) {
#if PL_BYTES == 64
    __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(rows[0] + at));
    v = _mm512_insertf32x4(v, _mm_loadu_ps(rows[4] + at), 1);
    v = _mm512_insertf32x4(v, _mm_loadu_ps(rows[8] + at), 2);
    return (vf)_mm512_insertf32x4(v, _mm_loadu_ps(rows[12] + at), 3);
#elif PL_BYTES == 32
    return (vf)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(rows[0] + at)),
                                    _mm_loadu_ps(rows[4] + at), 1);
#else
    return vf_load(rows[0] + at);
#endif
}

/* Loads and stores of the first n lanes, 0 <= n <= LANES. A load sets the other lanes to `fill`. */
#if PL_BYTES == 64
INLINE vf vf_load_part(const float *p, int64_t n, float fill) {
    return (vf)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), (__mmask16)((1u << n) - 1), p);
}
INLINE void vf_store_part(float *p, vf v, int64_t n) {
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
}
INLINE vd vd_load_part(const double *p, int64_t n, double fill) {
    return (vd)_mm512_mask_loadu_pd(_mm512_set1_pd(fill), (__mmask8)((1u << n) - 1), p);
}
INLINE void vd_store_part(double *p, vd v, int64_t n) {
    _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), (__m512d)v);
}
#elif PL_BYTES == 32
INLINE __m256i first_floats(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
INLINE __m256i first_doubles(int64_t n) {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
INLINE vf vf_load_part(const float *p, int64_t n, float fill) {
    const __m256i mask = first_floats(n);
    return (vf)_mm256_blendv_ps(_mm256_set1_ps(fill), _mm256_maskload_ps(p, mask),
                                _mm256_castsi256_ps(mask));
}
INLINE void vf_store_part(float *p, vf v, int64_t n) {
    _mm256_maskstore_ps(p, first_floats(n), (__m256)v);
}
INLINE vd vd_load_part(const double *p, int64_t n, double fill) {
    const __m256i mask = first_doubles(n);
    return (vd)_mm256_blendv_pd(_mm256_set1_pd(fill), _mm256_maskload_pd(p, mask),
                                _mm256_castsi256_pd(mask));
}
INLINE void vd_store_part(double *p, vd v, int64_t n) {
    _mm256_maskstore_pd(p, first_doubles(n), (__m256d)v);
}
#else
INLINE vf vf_load_part(const float *p, int64_t n, float fill) {
    vf v = vf_set1(fill);
    memcpy(&v, p, (size_t)n * sizeof *p);
    return v;
}
INLINE void vf_store_part(float *p, vf v, int64_t n) { memcpy(p, &v, (size_t)n * sizeof *p); }
INLINE vd vd_load_part(const double *p, int64_t n, double fill) {
    vd v = vd_set1(fill);
    memcpy(&v, p, (size_t)n * sizeof *p);
    return v;
}
INLINE void vd_store_part(double *p, vd v, int64_t n) { memcpy(p, &v, (size_t)n * sizeof *p); }
#endif

/* Comparisons per lane, false if either is NaN; mask ? a : b. With AVX-512 they are intrinsics:
 * operators give vectors of -1 and 0, which GCC would convert to masks and back. */
#if PL_BYTES == 64
typedef __mmask16 vf_mask;
typedef __mmask8 vd_mask;
INLINE vf_mask vf_less(vf a, vf b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ); }
INLINE vf_mask vf_equal(vf a, vf b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_EQ_OQ); }
INLINE vf_mask vi_less(vi a, vi b) { return _mm512_cmplt_epi32_mask((__m512i)a, (__m512i)b); }
INLINE vf_mask vi_equal(vi a, vi b) { return _mm512_cmpeq_epi32_mask((__m512i)a, (__m512i)b); }
INLINE vf vf_select(vf_mask mask, vf a, vf b) {
    return (vf)_mm512_mask_mov_ps((__m512)b, mask, (__m512)a);
}
INLINE vd_mask vd_less(vd a, vd b) {
    return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_LT_OQ);
}
INLINE vd_mask vd_equal(vd a, vd b) {
    return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_EQ_OQ);
}
INLINE vd vd_select(vd_mask mask, vd a, vd b) {
    return (vd)_mm512_mask_mov_pd((__m512d)b, mask, (__m512d)a);
}
#else
typedef vi vf_mask;
typedef vl vd_mask;
INLINE vf_mask vf_less(vf a, vf b) { return a < b; }
INLINE vf_mask vf_equal(vf a, vf b) { return a == b; }
INLINE vf_mask vi_less(vi a, vi b) { return a < b; }
INLINE vf_mask vi_equal(vi a, vi b) { return a == b; }
INLINE vf vf_select(vf_mask mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
INLINE vd_mask vd_less(vd a, vd b) { return a < b; }
INLINE vd_mask vd_equal(vd a, vd b) { return a == b; }
INLINE vd vd_select(vd_mask mask, vd a, vd b) { return (vd)((mask & (vl)a) | (~mask & (vl)b)); }
#endif

/* Maximum and minimum; b if either is NaN. */
INLINE vf vf_max(vf a, vf b) {
#ifdef X86
    return (vf)X86(max_ps)((x86_ps)a, (x86_ps)b);
#else
    return vf_select(vf_less(b, a), a, b);
#endif
}
INLINE vf vf_min(vf a, vf b) {
#ifdef X86
    return (vf)X86(min_ps)((x86_ps)a, (x86_ps)b);
#else
    return vf_select(vf_less(a, b), a, b);
#endif
}
INLINE vd vd_max(vd a, vd b) { return vd_select(vd_less(b, a), a, b); }
INLINE vd vd_min(vd a, vd b) { return vd_select(vd_less(a, b), a, b); }

INLINE vf vf_abs(vf a) { return (vf)((vi)a & 0x7fffffff); }
INLINE vd vd_abs(vd a) { return (vd)((vl)a & INT64_MAX); }

INLINE vf vf_sqrt(vf a) {
#ifdef X86
    return (vf)X86(sqrt_ps)((x86_ps)a);
#else
    for (int i = 0; i < LANES; i++) a[i] = sqrtf(a[i]);
    return a;
#endif
}

/* The sum of the lanes, in a fixed order: halves are added to each other. */
INLINE float vf_sum(vf v) {
#if defined(__x86_64__)
#if PL_BYTES == 64
    __m256 half =
        _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
#elif PL_BYTES == 32
    __m256 half = (__m256)v;
#endif
#if PL_BYTES >= 32
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#else
    __m128 four = (__m128)v;
#endif
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
#else
    for (int h = LANES / 2; h; h /= 2)
        for (int i = 0; i < h; i++) v[i] += v[i + h];
    return v[0];
#endif
}
INLINE double vd_sum(vd v) {
    for (int h = DLANES / 2; h; h /= 2)
        for (int i = 0; i < h; i++) v[i] += v[i + h];
    return v[0];
}
INLINE float vf_hmax(vf v) {
#if PL_BYTES == 64
    return _mm512_reduce_max_ps((__m512)v);
#else
    float m = v[0];
    for (int i = 1; i < LANES; i++) m = v[i] > m ? v[i] : m;
    return m;
#endif
}
INLINE double vd_hmax(vd v) {
    double m = v[0];
    for (int i = 1; i < DLANES; i++) m = v[i] > m ? v[i] : m;
    return m;
}

/* k = x log2(e), rounded to a whole number: adding 1.5 * 2^23 (float64: 1.5 * 2^52) leaves the
 * rounded integer in the low bits. */
typedef struct {
    vf k;
    vi n; /* k as integers */
} vf_whole;
INLINE vf_whole vf_powers_of_two(vf x) {
    vf magic = vf_set1(12582912.0f), shifted = x * 1.44269504088896341f + magic;
    return (vf_whole){shifted - magic, (vi)shifted - (vi)magic};
}
typedef struct {
    vd k;
    vl n;
} vd_whole;
INLINE vd_whole vd_powers_of_two(vd x) {
    vd magic = vd_set1(6755399441055744.0), shifted = x * 1.4426950408889634074 + magic;
    return (vd_whole){shifted - magic, (vl)shifted - (vl)magic};
}

#define V vf
#define POLYNOMIAL(name) vf_##name
#include "../../polynomials.h"
#undef V
#undef POLYNOMIAL
/* vf_expm1_rest in float64: the Taylor polynomial of degree 13. */
INLINE vd vd_expm1_rest(vd x, vd k) {
    vd r = x - k * 6.93147180369123816490e-01;
    r = r - k * 1.90821492927058770002e-10;
    vd p = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    return p * (r * r) + r;
}

#if PL_BYTES == 64
/* e^x within 2 ulp for x from -104 to 89, NaN stays NaN; 0 outside the mask. */
INLINE vf vf_exp_where(vf x, vf_mask where) {
    /* x log2(e) = k + f with log2(e) in two parts, and a minimax polynomial of 2^f on [-1/2,
     * 1/2]. */
    vf k = (vf)_mm512_roundscale_ps((__m512)(x * 1.44269502f), 0);
    /* Explicitly fused: the product is used twice, so the compiler would round it. */
    vf f = (vf)_mm512_fmsub_ps((__m512)x, _mm512_set1_ps(1.44269502f), (__m512)k);
    f = f + x * 1.92596299e-8f;
    vf p = f * 1.32647273e-3f + 9.67151299e-3f;
    p = p * f + 5.55073358e-2f;
    p = p * f + 2.40222424e-1f;
    p = p * f + 6.93147004e-1f;
    p = p * f + 1.0f;
    return (vf)_mm512_maskz_scalef_ps(where, (__m512)p, (__m512)k);
}
#endif
/* e^x within 2 ulp for x from -104 to 89; NaN stays NaN. */
INLINE vf vf_exp_between(vf x) {
#if PL_BYTES == 64
    return vf_exp_where(x, (vf_mask)-1);
#else
    /* Two factors for the power of two, so that subnormal results are right. */
    vf_whole w = vf_powers_of_two(x);
    vf p = vf_expm1_rest(x, w.k) + 1.0f;
    vi half = w.n >> 1;
    return p * (vf)((half + 127) << 23) * (vf)((w.n - half + 127) << 23);
#endif
}
/* e^x; 0 at -inf, inf above 88.7. */
INLINE vf vf_exp(vf x) {
    /* In this order a NaN stays NaN. */
    return vf_exp_between(vf_min(vf_set1(89.0f), vf_max(vf_set1(-104.0f), x)));
}
/* e^x for x <= 0. A result that underflows to 0 would take some 60 times as long to compute as
 * others, and masked scores are -inf. */
INLINE vf vf_decay(vf x) {
#if PL_BYTES == 64
    return vf_exp_where(x, _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-104.0f), _CMP_NLE_UQ));
#else
    return vf_exp_between(vf_max(vf_set1(-104.0f), x));
#endif
}

/* e^x in float64, within about 1 ulp. */
INLINE vd vd_exp(vd x) {
    vd c = vd_min(vd_set1(710.0), vd_max(vd_set1(-746.0), x));
    vd_whole w = vd_powers_of_two(c);
    vd p = vd_expm1_rest(c, w.k) + 1.0;
#if PL_BYTES == 64
    return (vd)_mm512_scalef_pd((__m512d)p, (__m512d)w.k);
#else
    vl half = w.n >> 1;
    return p * (vd)((half + 1023) << 52) * (vd)((w.n - half + 1023) << 52);
#endif
}

INLINE vd vd_decay(vd x) { return vd_exp(x); }

/* e^x - 1 within 2 ulp, for x from -inf to 80. */
INLINE vf vf_expm1(vf x) {
    vf c = vf_max(vf_set1(-80.0f), x);
    vf_whole w = vf_powers_of_two(c);
    vf two_k = (vf)((w.n + 127) << 23);
    return two_k * vf_expm1_rest(c, w.k) + (two_k - 1.0f);
}
INLINE vd vd_expm1(vd x) {
    vd c = vd_max(vd_set1(-80.0), x);
    vd_whole w = vd_powers_of_two(c);
    vd two_k = (vd)((w.n + 1023) << 52);
    return two_k * vd_expm1_rest(c, w.k) + (two_k - 1.0);
}

/* 1 / x within 1 ulp for x >= 1; 0 at inf. */
INLINE vf vf_reciprocal(vf x) {
#if PL_BYTES == 64
    __m512 r = _mm512_rcp14_ps((__m512)x),
           error = _mm512_fnmadd_ps((__m512)x, r, _mm512_set1_ps(1));
    return (vf)_mm512_mask_fmadd_ps(r, _mm512_test_epi32_mask((__m512i)r, (__m512i)r), error, r);
#else
    return 1.0f / x;
#endif
}
INLINE vd vd_reciprocal(vd x) { return 1.0 / x; }

/* log(1 + x) within 2 ulp for x > -1; inf at inf. 1 + x = 2^k (1 + f) with 1 + f in
 * [sqrt(1/2), sqrt(2)], and log(1 + f) = 2 atanh(f / (2 + f)). If k is 0, f is x itself, so that
 * nothing is lost near 0. */
INLINE vf vf_log1p(vf x) {
    vf u = x + 1.0f;
    vi bits = (vi)u + (0x3f800000 - 0x3f3504f3), k = (bits >> 23) - 127;
    vf f = vf_select(vi_equal(k, vi_set1(0)), x, (vf)((bits & 0x7fffff) + 0x3f3504f3) - 1.0f);
    vf s = f / (f + 2.0f), z = s * s;
    vf y = s * (z * vf_atanh_rest(z)) + (s + s);
    y = y + __builtin_convertvector(k, vf) * 0.69314718f;
    return vf_select(vf_equal(u - u, vf_set1(0)), y, u);
}
INLINE vd vd_log1p(vd x) {
    const int64_t half = 0x3fe6a09e667f3bcd; /* sqrt(1/2) */
    vd u = x + 1.0;
    vl bits = (vl)u + (0x3ff0000000000000 - half), k = (bits >> 52) - 1023;
    vd f = vd_select(vd_equal(__builtin_convertvector(k, vd), vd_set1(0)), x,
                     (vd)((bits & 0xfffffffffffff) + half) - 1.0);
    vd s = f / (f + 2.0), z = s * s, p = vd_set1(2.0 / 25);
    for (int n = 23; n >= 3; n -= 2) p = p * z + 2.0 / n;
    vd y = s * (z * p) + (s + s);
    y = y + __builtin_convertvector(k, vd) * 0.693147180559945309417;
    return vd_select(vd_equal(u - u, vd_set1(0)), y, u);
}

/* log(x) within 2 ulp; -inf at 0, NaN below. Subnormal x are scaled first; the rest is vf_log1p. */
INLINE vf vf_log(vf x) {
    const vf_mask positive = vf_less(vf_set1(0), x), small = vf_less(x, vf_set1(FLT_MIN));
    vf finite = vf_select(positive, vf_min(vf_set1(FLT_MAX), x), vf_set1(1));
    vi bits = (vi)(finite * vf_select(small, vf_set1(0x1p23f), vf_set1(1)));
    bits += 0x3f800000 - 0x3f3504f3;
    vf k = __builtin_convertvector((bits >> 23) - 127, vf);
    k = k - vf_select(small, vf_set1(23), vf_set1(0));
    vf f = (vf)((bits & 0x7fffff) + 0x3f3504f3) - 1.0f;
    vf s = f / (f + 2.0f), z = s * s;
    vf y = s * (z * vf_atanh_rest(z)) + (s + s) + k * 0.69314718f;
    vf odd = vf_select(vf_less(x, vf_set1(0)), vf_set1(NAN), x);
    odd = vf_select(vf_equal(x, vf_set1(0)), vf_set1(-INFINITY), odd);
    return vf_select(positive, vf_select(vf_less(x, vf_set1(INFINITY)), y, x), odd);
}

INLINE vf vf_copysign(vf x, vf s) {
    return (vf)(((vi)x & 0x7fffffff) | ((vi)s & ~(vi_set1(0x7fffffff))));
}

/* log((x + d) / x) for x > 0, x + d > 0. The difference of the bits of x + d and x gives the k for
 * which y = 2^-k (x + d) is near x. The result is k ln 2 + 2 atanh((y - x) / (y + x)). If k is 0,
 * y - x is d itself, so that small d lose nothing. */
INLINE vf vf_log_grown(vf x, vf d) {
    vf y = x + d;
    vi k = ((vi)y - (vi)x + 0x4afb0d) >> 23;
    y = (vf)((vi)y - (k << 23));
    vf s = vf_select(vi_equal(k, vi_set1(0)), d, y - x) / (y + x), z = s * s;
    vf p = z * 0.3001085f + 0.39975782f;
    p = p * z + 0.66666751f;
    return __builtin_convertvector(k, vf) * 0.69314718f + (s * (z * p) + (s + s));
}
INLINE vd vd_log_grown(vd x, vd d) { return vd_log1p(d / x); }

/* a b + c, rounded once if the instruction set has FMA, else twice. The bits do not depend on what
 * the compiler fuses around a call. */
INLINE vf vf_fma(vf a, vf b, vf c) {
#if PL_BYTES >= 32
    return (vf)X86(fmadd_ps)((x86_ps)a, (x86_ps)b, (x86_ps)c);
#elif defined(__aarch64__)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}
INLINE float f_fma(float a, float b, float c) {
#if PL_BYTES >= 32 || defined(__aarch64__)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}
INLINE vd vd_fma(vd a, vd b, vd c) {
#if PL_BYTES >= 32
    return (vd)X86(fmadd_pd)((x86_pd)a, (x86_pd)b, (x86_pd)c);
#elif defined(__aarch64__)
    return (vd)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
    return a * b + c;
#endif
}

/* Stores that bypass the caches, for results larger than them; p is aligned to a vector. */
INLINE void vf_stream(float *p, vf v) {
#ifdef X86
    X86(stream_ps)(p, (x86_ps)v);
#else
    vf_store(p, v);
#endif
}
INLINE void vd_stream(double *p, vd v) { vf_stream((float *)p, (vf)v); }

#endif
