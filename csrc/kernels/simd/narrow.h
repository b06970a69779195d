/* Conversions between the vectors of vec.h and numbers of fewer than 32 bits: bytes, float16,
 * bfloat16, pairs of bfloat16, packed codes. quant.tpl.h knows the layouts of weight formats. */
#ifndef PYLOSS_NARROW_H
#define PYLOSS_NARROW_H
#include "vec.h"

typedef uint16_t vh __attribute__((vector_size(PL_BYTES / 2))); /* LANES 16-bit values */
typedef uint8_t vq __attribute__((vector_size(PL_BYTES / 4)));  /* LANES bytes */

/* LANES unsigned bytes, signed bytes, or 16-bit values as int32. Intrinsics, because GCC 12
 * converts such vectors lane by lane. */
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
        /* Multiplying by 2^112 converts subnormals too; adding to the exponent would not. */
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

INLINE uint16_t bf16_from_f32(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if (f != f) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
INLINE uint16_t f16_from_f32(float f) {
#if PL_BYTES >= 32
    return _cvtss_sh(f, 0);
#else
    uint32_t bits, sign;
    memcpy(&bits, &f, 4);
    sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (bits >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
    if (bits < 0x38800000) {
        /* Subnormal: adding 1/2 leaves the rounded result in the low bits of the significand. */
        memcpy(&f, &bits, 4);
        f += 0.5f;
        memcpy(&bits, &f, 4);
        return (uint16_t)(sign | (bits - 0x3f000000));
    }
    return (uint16_t)(sign | ((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13));
#endif
}

/* v rounded to bfloat16, in the upper half of each lane; the lower half is undefined. */
INLINE vi vi_rounded_to_bf16(vf v) {
    vi bits = (vi)v, nan = v != v;
    return (nan & (bits | 0x400000)) | (~nan & (bits + 0x7fff + (bits >> 16 & 1)));
}

/* LANES floats to 16 bits each, rounded to nearest even; NaN stays NaN. */
INLINE void vf_to_bf16(uint16_t *p, vf v) {
#if PL_BYTES == 64
    _mm256_storeu_si256((__m256i *)p,
                        _mm512_cvtepi32_epi16((__m512i)(vi_rounded_to_bf16(v) >> 16)));
#else
    for (int i = 0; i < LANES; i++) p[i] = bf16_from_f32(v[i]);
#endif
}
INLINE void vf_to_f16(uint16_t *p, vf v) {
#if PL_BYTES == 64
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)v, 0));
#elif PL_BYTES == 32
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph((__m256)v, 0));
#else
    for (int i = 0; i < LANES; i++) p[i] = f16_from_f32(v[i]);
#endif
}
#if PL_BYTES == 64
INLINE __m512i bf16_of_two(vf a, vf b) {
    const __m512i half = _mm512_set1_epi32(0x7fff), one = _mm512_set1_epi32(1),
                  odd = _mm512_set1_epi32(0x10000);
    const __m512i quiet = _mm512_set1_epi32(0x400000);
    __m512i x[2] = {(__m512i)a, (__m512i)b};
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        __m512i up = _mm512_add_epi32(x[i], half);
        up = _mm512_mask_add_epi32(up, _mm512_test_epi32_mask(x[i], odd), up, one);
        x[i] = _mm512_mask_or_epi32(
            up, _mm512_cmp_ps_mask((__m512)x[i], (__m512)x[i], _CMP_UNORD_Q), x[i], quiet);
    }
    static const uint16_t odd_words[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                           23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                           45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    return _mm512_permutex2var_epi16(x[0], _mm512_loadu_si512(odd_words), x[1]);
}
#endif
/* Two vectors to bfloat16, rounded as above. The `stream` form bypasses the caches; p is then
 * aligned to a vector. */
INLINE void vf_to_bf16_twice(uint16_t *p, vf a, vf b) {
#if PL_BYTES == 64
    _mm512_storeu_si512(p, bf16_of_two(a, b));
#else
    vf_to_bf16(p, a);
    vf_to_bf16(p + LANES, b);
#endif
}
INLINE void vf_stream_bf16_twice(uint16_t *p, vf a, vf b) {
#if PL_BYTES == 64
    _mm512_stream_si512((__m512i *)p, bf16_of_two(a, b));
#else
    vf_to_bf16_twice(p, a, b);
#endif
}

/* Pairs of bfloat16: a word holds two, the first in its upper half. `native`, a constant, selects
 * the processor's instructions for pairs. They need NATIVE_PAIRS_COMPILED and pl_has_bf16_dots().
 * Otherwise float32 arithmetic gives the same numbers, since it holds a product of two bfloat16
 * exactly. Only numbers below 2^-126 differ: the instructions take them as 0. */
#if defined(__AVX512BF16__) && PL_BYTES == 64
enum { NATIVE_PAIRS_COMPILED = 1 };
#else
enum { NATIVE_PAIRS_COMPILED = 0 };
#endif

/* Numbers below 2^-126 as 0 of their sign. */
INLINE vf vf_flush_subnormal(vf v) {
    return vf_select(vf_less(vf_abs(v), vf_set1(FLT_MIN)), (vf)((vi)v & INT32_MIN), v);
}

/* The pairs (a[i], b[i]), rounded to nearest even. */
INLINE vi vi_pair(vf a, vf b, const int native UNUSED) {
#if defined(__AVX512BF16__) && PL_BYTES == 64
    if (native) {
        static const uint16_t order[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                           21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                           11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        return (vi)_mm512_permutexvar_epi16(_mm512_loadu_si512(order),
                                            (__m512i)_mm512_cvtne2ps_pbh((__m512)a, (__m512)b));
    }
#endif
    return (vi_rounded_to_bf16(a) & -0x10000) | (vi_rounded_to_bf16(b) >> 16 & 0xffff);
}
/* a, then b, as LANES words of two bfloat16 each, in memory's order: the first one in the lower
 * half. */
INLINE vi vi_halves_in_order(vf a, vf b, const int native UNUSED) {
#if defined(__AVX512BF16__) && PL_BYTES == 64
    if (native) return (vi)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
#endif
    uint16_t both[2 * LANES];
    vf_to_bf16_twice(both, a, b);
    vi halves;
    memcpy(&halves, both, sizeof halves);
    return halves;
}
/* The pairs (a[0], a[1]), (a[2], a[3]), ..., then (b[0], b[1]), ... */
INLINE vi vi_pairs_in_order(vf a, vf b, const int native) {
    const vi halves = vi_halves_in_order(a, b, native);
#if PL_BYTES == 64
    return (vi)_mm512_rol_epi32((__m512i)halves, 16);
#else
    return halves << 16 | (halves >> 16 & 0xffff);
#endif
}
/* (sum + a.first b.first) + a.second b.second, each sum rounded to float32. */
INLINE vf vf_add_dots(vf sum, vi a, vi b, const int native UNUSED) {
#if defined(__AVX512BF16__) && PL_BYTES == 64
    if (native) return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
    sum += (vf)(a & -0x10000) * (vf)(b & -0x10000);
    sum += (vf)(a << 16) * (vf)(b << 16);
    return sum;
}

INLINE vf vf_from_i8(const uint8_t *p) { return __builtin_convertvector(vi_from_i8(p), vf); }

/* The low and the high nibbles of LANES bytes. */
INLINE void vf_from_nibbles(const uint8_t *p, vf *low, vf *high) {
    vi wide = vi_from_u8(p);
    *low = __builtin_convertvector(wide & 15, vf);
    *high = __builtin_convertvector(wide >> 4, vf);
}

/* Byte shuffles that move code i of a stream of b-bit codes into the low 16 bits of lane i. Offset
 * 0x80 gives 0. */
#define CODE_BYTES(b, i) \
    (i) * (b) / 8, (i) * (b) % 8 + (b) > 8 ? (i) * (b) / 8 + 1 : 0x80, 0x80, 0x80
#define CODE_LANES(b, i) \
    CODE_BYTES(b, i), CODE_BYTES(b, i + 1), CODE_BYTES(b, i + 2), CODE_BYTES(b, i + 3)
#define CODE_SHUFFLE(b) \
    { CODE_LANES(b, 0), CODE_LANES(b, 4), CODE_LANES(b, 8), CODE_LANES(b, 12) }
UNUSED static const uint8_t code_shuffle[9][64] = {{0},
                                                   CODE_SHUFFLE(1),
                                                   CODE_SHUFFLE(2),
                                                   CODE_SHUFFLE(3),
                                                   CODE_SHUFFLE(4),
                                                   CODE_SHUFFLE(5),
                                                   CODE_SHUFFLE(6),
                                                   CODE_SHUFFLE(7),
                                                   CODE_SHUFFLE(8)};
#undef CODE_BYTES
#undef CODE_LANES
#undef CODE_SHUFFLE

/* The first n <= 8 bytes at p as the low bytes of a word; n is a constant. */
INLINE uint64_t load_bytes(const uint8_t *p, const int n) {
    uint64_t low = 0, high = 0;
    const int half = n == 8 ? 8 : n >= 4 ? 4 : n >= 2 ? 2 : n;
    memcpy(&low, p, (size_t)half);
    if (n > half) memcpy(&high, p + half, (size_t)(n - half));
    return n > half ? low | high << (8 * half % 64) : low;
}

/* Expands the 32 codes of `bits` bits (a constant) at p. Each byte is filled from its lowest bit
 * on, or with `high_first` (4 bits only) from its high nibble. Reads 4 * bits bytes. */
INLINE void vi_from_codes(const uint8_t *p, const int bits, const int high_first,
                          vi out[32 / LANES]) {
    const int mask = (1 << bits) - 1;
#if PL_BYTES >= 32
    vi shift;
    for (int i = 0; i < LANES; i++) shift[i] = i * bits % 8 ^ (high_first ? 4 : 0);
    for (int l = 0; l < 32 / LANES; l++, p += LANES / 8 * bits) {
#if PL_BYTES == 64
        __m128i window = _mm_maskz_loadu_epi8((__mmask16)((1u << 2 * bits) - 1), p);
        __m512i spread = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(window),
                                             _mm512_loadu_si512(code_shuffle[bits]));
#else
        __m128i window = _mm_cvtsi64_si128((long long)load_bytes(p, bits));
        __m256i spread =
            _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(window),
                                _mm256_loadu_si256((const __m256i *)code_shuffle[bits]));
#endif
        out[l] = (vi)spread >> shift & mask;
    }
#else
    if (bits == 8) {
        for (int l = 0; l < 32 / LANES; l++) out[l] = vi_from_u8(p + l * LANES);
        return;
    }
    for (int i = 0; i < 32; i += 8, p += bits) {
        if (bits == 4) {
            vi both = vi_from_u8(p), low = both & 15, high = both >> 4;
            vi first = high_first ? high : low, second = high_first ? low : high;
            out[i / LANES] = (vi){first[0], second[0], first[1], second[1]};
            out[i / LANES + 1] = (vi){first[2], second[2], first[3], second[3]};
            continue;
        }
        uint64_t word = load_bytes(p, bits);
        for (int l = 0; l < 8; l += LANES) {
            vi codes = vi_set1(0);
            for (int j = 0; j < LANES; j++) codes[j] = (int)(word >> ((l + j) * bits)) & mask;
            out[(i + l) / LANES] = codes;
        }
    }
#endif
}

/* table[code] for codes below 16; the table of 16 floats may lie at any address. */
INLINE vf vf_lookup16(const uint8_t *table, vi code) {
#if PL_BYTES == 64
    return (vf)_mm512_permutexvar_ps((__m512i)code, _mm512_loadu_ps(table));
#elif PL_BYTES == 32
    __m256 low = _mm256_loadu_ps((const float *)table),
           high = _mm256_loadu_ps((const float *)(table + 32));
    return vf_select(vi_less(vi_set1(7), code), (vf)_mm256_permutevar8x32_ps(high, (__m256i)code),
                     (vf)_mm256_permutevar8x32_ps(low, (__m256i)code));
#else
    vf v;
    for (int i = 0; i < LANES; i++) memcpy((char *)&v + 4 * i, table + 4 * code[i], 4);
    return v;
#endif
}

#endif
