/* Integer dots of bytes, and bytes of several rows of memory as lanes of vectors: what products in
 * int8 need (matmul/int8.tpl.h). All results are exact. */
#ifndef PYLOSS_BYTES_H
#define PYLOSS_BYTES_H
#include "narrow.h"

typedef uint32_t vw __attribute__((vector_size(PL_BYTES))); /* LANES words, of four bytes each */
typedef int16_t vs __attribute__((vector_size(PL_BYTES)));

INLINE vw vw_set1(uint32_t a) { return a + (vw){0}; }
INLINE uint32_t word_at(const uint8_t *p) {
    uint32_t word;
    memcpy(&word, p, sizeof word);
    return word;
}

/* out[i], lane l: word i of the 16 bytes at rows[l] + at. */
INLINE void load_words(const uint8_t *const *rows, int64_t at, vw out[4]) {
#ifdef X86
#if PL_BYTES == 64
    __m512i v[4];
#elif PL_BYTES == 32
    __m256i v[4];
#else
    __m128i v[4];
#endif
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m128i four = _mm_loadu_si128((const __m128i *)(rows[i] + at));
#if PL_BYTES == 64
        v[i] = _mm512_castsi128_si512(four);
        v[i] = _mm512_inserti32x4(v[i], _mm_loadu_si128((const __m128i *)(rows[4 + i] + at)), 1);
        v[i] = _mm512_inserti32x4(v[i], _mm_loadu_si128((const __m128i *)(rows[8 + i] + at)), 2);
        v[i] = _mm512_inserti32x4(v[i], _mm_loadu_si128((const __m128i *)(rows[12 + i] + at)), 3);
#elif PL_BYTES == 32
        v[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(four),
                                       _mm_loadu_si128((const __m128i *)(rows[4 + i] + at)), 1);
#else
        v[i] = four;
#endif
    }
    /* 4 x 4 words are transposed in each quarter of the vectors. */
    const vl low = (vl)X86(unpacklo_epi32)(v[0], v[1]), high = (vl)X86(unpackhi_epi32)(v[0], v[1]),
             low2 = (vl)X86(unpacklo_epi32)(v[2], v[3]),
             high2 = (vl)X86(unpackhi_epi32)(v[2], v[3]);
    typedef __typeof__(v[0]) word_vector;
    out[0] = (vw)X86(unpacklo_epi64)((word_vector)low, (word_vector)low2);
    out[1] = (vw)X86(unpackhi_epi64)((word_vector)low, (word_vector)low2);
    out[2] = (vw)X86(unpacklo_epi64)((word_vector)high, (word_vector)high2);
    out[3] = (vw)X86(unpackhi_epi64)((word_vector)high, (word_vector)high2);
#else
    for (int i = 0; i < 4; i++)
        for (int l = 0; l < LANES; l++) out[i][l] = word_at(rows[l] + at + 4 * i);
#endif
}

/* Floats of the float16 in the low half of each word. */
INLINE vf vf_from_f16_words(vw words) {
#if PL_BYTES == 64
    return (vf)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)words));
#else
    uint16_t halves[LANES];
    for (int l = 0; l < LANES; l++) halves[l] = (uint16_t)words[l];
    return vf_from_f16((const uint8_t *)halves);
#endif
}

/* table[b] for each byte b < 16 of the words. */
INLINE vw vw_lookup_bytes(const uint8_t table[16], vw bytes) {
#if PL_BYTES == 64
    return (vw)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table)),
                                   (__m512i)bytes);
#elif PL_BYTES == 32
    return (vw)_mm256_shuffle_epi8(
        _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table)), (__m256i)bytes);
#elif defined(__aarch64__)
    return (vw)vqtbl1q_u8(vld1q_u8(table), (uint8x16_t)bytes);
#else
    uint8_t b[PL_BYTES];
    memcpy(b, &bytes, sizeof b);
    for (int i = 0; i < PL_BYTES; i++) b[i] = table[b[i]];
    memcpy(&bytes, b, sizeof b);
    return bytes;
#endif
}

/* Floats as the nearest integers, halves to even; the numbers are below 2^31. */
INLINE vi vi_nearest(vf v) {
#ifdef X86
    return (vi)X86(cvtps_epi32)((x86_ps)v);
#else
    return (vi)vcvtnq_s32_f32((float32x4_t)v);
#endif
}

/* LANES integers from -128 to 127 as bytes. */
INLINE void vi_store_bytes(int8_t *p, vi v) {
#if PL_BYTES == 64
    _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8((__m512i)v));
#else
    for (int l = 0; l < LANES; l++) p[l] = (int8_t)v[l];
#endif
}
INLINE int32_t vi_sum(vi v) {
#if PL_BYTES == 64
    return _mm512_reduce_add_epi32((__m512i)v);
#else
    int32_t sum = 0;
    for (int l = 0; l < LANES; l++) sum += v[l];
    return sum;
#endif
}
INLINE int32_t vi_hmax(vi v) {
#if PL_BYTES == 64
    return _mm512_reduce_max_epi32((__m512i)v);
#else
    int32_t most = v[0];
    for (int l = 1; l < LANES; l++) most = v[l] > most ? v[l] : most;
    return most;
#endif
}

/* a b + c rounded once, on every processor. */
INLINE vf vf_fma_once(vf a, vf b, vf c) {
#if PL_BYTES >= 32 || defined(__aarch64__)
    return vf_fma(a, b, c);
#else
    for (int l = 0; l < LANES; l++) c[l] = __builtin_fmaf(a[l], b[l], c[l]);
    return c;
#endif
}

/* Codes are kept minus this number: arm64's instruction for dots takes signed ones. */
#if defined(PL_DOTS) && defined(__aarch64__)
enum { CODE_SHIFT = 128 };
#else
enum { CODE_SHIFT = 0 };
#endif
INLINE vw codes_shifted(vw codes) { return codes ^ CODE_SHIFT * 0x01010101u; }

/* Sums of products in each lane: its four codes times its four signed bytes of x, for up to 8
 * steps, and `init`. PL_DOTS is defined where the file is compiled for the processor's dot
 * instructions (avx512_vnni, avx_vnni, dotprod). Without them pairs of products are added in 16 bits, which
 * hold 8 steps of codes below 16: `wide` codes are split into halves. */
typedef struct {
    vi low, high;
} byte_dots;

/* Has the sums computed here. Compilers put them off until their use, when the bytes and codes of
 * all steps no longer fit into registers. */
INLINE void dots_now(byte_dots *s, const int wide UNUSED) {
#ifdef __x86_64__
    __asm__ volatile("" : "+v"(s->low));
#if !defined(PL_DOTS) && PL_BYTES >= 32
    if (wide) __asm__ volatile("" : "+v"(s->high));
#endif
#else
    __asm__ volatile("" : "+w"(s->low));
#endif
}

#if defined(PL_DOTS)
INLINE byte_dots dots_begin(int32_t init) { return (byte_dots){.low = vi_set1(init)}; }
INLINE byte_dots dots_add(byte_dots s, vw codes, vi x, const int wide UNUSED) {
#ifdef __aarch64__
    s.low = (vi)vdotq_s32((int32x4_t)s.low, (int8x16_t)codes, (int8x16_t)x);
#elif PL_BYTES == 64
    s.low = (vi)_mm512_dpbusd_epi32((__m512i)s.low, (__m512i)codes, (__m512i)x);
#else
    s.low = (vi)_mm256_dpbusd_avx_epi32((__m256i)s.low, (__m256i)codes, (__m256i)x);
#endif
    return s;
}
INLINE vi dots_total(byte_dots s, int32_t init UNUSED, const int wide UNUSED) { return s.low; }
#elif PL_BYTES >= 32
#if PL_BYTES == 64
typedef __m512i x86_bytes;
#else
typedef __m256i x86_bytes;
#endif
INLINE byte_dots dots_begin(int32_t init UNUSED) { return (byte_dots){{0}, {0}}; }
INLINE vi pairs_of_bytes(vi sum, vw codes, vi x) {
    return (vi)((vs)sum + (vs)X86(maddubs_epi16)((x86_bytes)codes, (x86_bytes)x));
}
INLINE byte_dots dots_add(byte_dots s, vw codes, vi x, const int wide) {
    if (!wide) {
        s.low = pairs_of_bytes(s.low, codes, x);
        return s;
    }
    s.low = pairs_of_bytes(s.low, codes & 0x0f0f0f0f, x);
    s.high = pairs_of_bytes(s.high, codes >> 4 & 0x0f0f0f0f, x);
    return s;
}
INLINE vi dots_total(byte_dots s, int32_t init, const int wide) {
    const x86_bytes ones = (x86_bytes)vi_set1(0x00010001);
    const vi low = (vi)X86(madd_epi16)((x86_bytes)s.low, ones);
    if (!wide) return low + init;
    return low + ((vi)X86(madd_epi16)((x86_bytes)s.high, ones) << 4) + init;
}
#else
/* Products of a code and a byte of x fit into 16 bits. */
INLINE vi add_pairs(vi sum, vs products) {
    return sum + (((vi)products << 16) >> 16) + ((vi)products >> 16);
}
INLINE byte_dots dots_begin(int32_t init) { return (byte_dots){.low = vi_set1(init)}; }
INLINE byte_dots dots_add(byte_dots s, vw codes, vi x, const int wide UNUSED) {
    const vs even = (vs)(codes & 0x00ff00ff), odd = (vs)(codes >> 8 & 0x00ff00ff);
    s.low = add_pairs(s.low, even * (((vs)x << 8) >> 8));
    s.low = add_pairs(s.low, odd * ((vs)x >> 8));
    return s;
}
INLINE vi dots_total(byte_dots s, int32_t init UNUSED, const int wide UNUSED) { return s.low; }
#endif

#endif
