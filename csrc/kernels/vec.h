/* The vector type of the instruction set being compiled, and the few primitives that GNU vector operators do not give.
 *
 * PL_BYTES (16, 32 or 64) is set by isa_*.c. vf holds LANES floats, vi as many int32; vd holds DLANES doubles, vl as many
 * int64. Comparisons give -1 or 0 in each lane. All loads and stores may be unaligned.
 */
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
#define UNUSED __attribute__((unused))

typedef float vf __attribute__((vector_size(PL_BYTES)));
typedef int32_t vi __attribute__((vector_size(PL_BYTES)));
typedef double vd __attribute__((vector_size(PL_BYTES)));
typedef int64_t vl __attribute__((vector_size(PL_BYTES)));
typedef uint16_t vh __attribute__((vector_size(PL_BYTES / 2))); /* LANES 16-bit values */
typedef uint8_t vq __attribute__((vector_size(PL_BYTES / 4)));  /* LANES bytes */

INLINE vf vf_set1(float a) { return a - (vf){0}; }
INLINE vd vd_set1(double a) { return a - (vd){0}; }
INLINE vi vi_set1(int32_t a) { return a + (vi){0}; }

INLINE vf vf_load(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE void vf_store(float *p, vf v) { memcpy(p, &v, sizeof v); }
INLINE vd vd_load(const double *p) {
    vd v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE void vd_store(double *p, vd v) { memcpy(p, &v, sizeof v); }

/* The first n lanes; the others are `fill`. 0 <= n <= LANES. */
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

/* mask ? a : b, lane by lane. */
INLINE vf vf_select(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
INLINE vd vd_select(vl mask, vd a, vd b) { return (vd)((mask & (vl)a) | (~mask & (vl)b)); }

/* The larger and the smaller; b where either is NaN. */
INLINE vf vf_max(vf a, vf b) {
#if PL_BYTES == 64
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif PL_BYTES == 32
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
    return (vf)_mm_max_ps((__m128)a, (__m128)b);
#else
    return vf_select(a > b, a, b);
#endif
}
INLINE vf vf_min(vf a, vf b) {
#if PL_BYTES == 64
    return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif PL_BYTES == 32
    return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
    return (vf)_mm_min_ps((__m128)a, (__m128)b);
#else
    return vf_select(a < b, a, b);
#endif
}
INLINE vd vd_max(vd a, vd b) { return vd_select(a > b, a, b); }
INLINE vd vd_min(vd a, vd b) { return vd_select(a < b, a, b); }

INLINE vf vf_sqrt(vf a) {
#if PL_BYTES == 64
    return (vf)_mm512_sqrt_ps((__m512)a);
#elif PL_BYTES == 32
    return (vf)_mm256_sqrt_ps((__m256)a);
#elif defined(__x86_64__)
    return (vf)_mm_sqrt_ps((__m128)a);
#else
    for (int i = 0; i < LANES; i++) a[i] = sqrtf(a[i]);
    return a;
#endif
}

INLINE float vf_sum(vf v) {
    float s = 0;
    for (int h = LANES / 2; h; h /= 2)
        for (int i = 0; i < h; i++) v[i] += v[i + h];
    s = v[0];
    return s;
}
INLINE double vd_sum(vd v) {
    for (int h = DLANES / 2; h; h /= 2)
        for (int i = 0; i < h; i++) v[i] += v[i + h];
    return v[0];
}
INLINE float vf_hmax(vf v) {
    float m = v[0];
    for (int i = 1; i < LANES; i++) m = v[i] > m ? v[i] : m;
    return m;
}
INLINE double vd_hmax(vd v) {
    double m = v[0];
    for (int i = 1; i < DLANES; i++) m = v[i] > m ? v[i] : m;
    return m;
}

/* e^x within 1.5 ulp; 0 at -inf, inf above 88.7, NaN at NaN. Range reduction by ln 2 in two parts and a degree-6 polynomial
 * on [-ln2/2, ln2/2]; the power of two is applied in two halves so that subnormal results are right. */
INLINE vf vf_exp(vf x) {
    vf c = vf_min(vf_set1(89.0f), vf_max(vf_set1(-104.0f), x)); /* in this order a NaN stays one */
    vf magic = vf_set1(12582912.0f);                            /* 1.5 * 2^23: adding it rounds to an integer in the low bits */
    vf shifted = c * 1.44269504088896341f + magic;
    vf k = shifted - magic;
    vf r = c - k * 0.693359375f;
    r = r + k * 2.12194440e-4f;
    vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
#if PL_BYTES == 64
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)k);
#else
    vi n = (vi)shifted - (vi)magic, half = n >> 1;
    return p * (vf)((half + 127) << 23) * (vf)((n - half + 127) << 23);
#endif
}

/* e^x in float64 within 1 ulp or so; the same scheme with the Taylor polynomial of degree 13. */
INLINE vd vd_exp(vd x) {
    vd c = vd_min(vd_set1(710.0), vd_max(vd_set1(-746.0), x));
    vd magic = vd_set1(6755399441055744.0); /* 1.5 * 2^52 */
    vd shifted = c * 1.4426950408889634074 + magic;
    vd k = shifted - magic;
    vd r = c - k * 6.93147180369123816490e-01;
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
    p = p * (r * r) + r + 1.0;
#if PL_BYTES == 64
    return (vd)_mm512_scalef_pd((__m512d)p, (__m512d)k);
#else
    vl n = (vl)shifted - (vl)magic, half = n >> 1;
    return p * (vd)((half + 1023) << 52) * (vd)((n - half + 1023) << 52);
#endif
}

/* LANES unsigned bytes, signed bytes, or 16-bit values as int32. GCC 12 converts such vectors lane by lane if left to itself. */
INLINE vi vi_from_u8(const uint8_t *p) {
#if PL_BYTES == 64
    return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
#elif PL_BYTES == 32
    return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
#elif defined(__x86_64__)
    int32_t bytes;
    memcpy(&bytes, p, sizeof bytes);
    const __m128i zero = _mm_setzero_si128();
    return (vi)_mm_unpacklo_epi16(_mm_unpacklo_epi8(_mm_cvtsi32_si128(bytes), zero), zero);
#else
    vq bytes;
    memcpy(&bytes, p, sizeof bytes);
    return __builtin_convertvector(bytes, vi);
#endif
}
INLINE vi vi_from_i8(const uint8_t *p) {
#if PL_BYTES == 64
    return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p));
#elif PL_BYTES == 32
    return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p));
#else
    return (vi_from_u8(p) << 24) >> 24;
#endif
}
INLINE vi vi_from_u16(const uint8_t *p) {
#if PL_BYTES == 64
    return (vi)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
#elif PL_BYTES == 32
    return (vi)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
#elif defined(__x86_64__)
    return (vi)_mm_unpacklo_epi16(_mm_loadl_epi64((const __m128i *)p), _mm_setzero_si128());
#else
    vh halves;
    memcpy(&halves, p, sizeof halves);
    return __builtin_convertvector(halves, vi);
#endif
}

/* LANES stored values as floats. */
INLINE vf vf_from_bf16(const uint8_t *p) { return (vf)(vi_from_u16(p) << 16); }

INLINE float f32_from_f16(uint16_t h) {
#if PL_BYTES >= 32
    return _cvtsh_ss(h);
#else
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = (uint32_t)(h & 0x7fff) << 13, bits;
    float f;
    if (rest >= 0x0f800000) bits = sign | (rest + 0x70000000); /* inf and NaN */
    else {
        /* Subnormals come right by multiplying with 2^112 instead of moving the exponent. */
        memcpy(&f, &rest, 4);
        f *= 0x1p112f;
        memcpy(&bits, &f, 4);
        bits |= sign;
    }
    memcpy(&f, &bits, 4);
    return f;
#endif
}

INLINE vf vf_from_f16(const uint8_t *p) {
#if PL_BYTES == 64
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif PL_BYTES == 32
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#elif defined(__aarch64__)
    float16x4_t h;
    memcpy(&h, p, sizeof h);
    return (vf)vcvt_f32_f16(h);
#else
    vf v;
    uint16_t h[LANES];
    memcpy(h, p, sizeof h);
    for (int i = 0; i < LANES; i++) v[i] = f32_from_f16(h[i]);
    return v;
#endif
}

INLINE vf vf_from_i8(const uint8_t *p) { return __builtin_convertvector(vi_from_i8(p), vf); }

/* The low and the high nibbles of LANES bytes. */
INLINE void vf_from_nibbles(const uint8_t *p, vf *low, vf *high) {
    vi wide = vi_from_u8(p);
    *low = __builtin_convertvector(wide & 15, vf);
    *high = __builtin_convertvector(wide >> 4, vf);
}
