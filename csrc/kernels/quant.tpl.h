/* Decodes stored weights to float32, up to 32 elements of a row at a time.
 *
 * GGUF's formats are ggml's blocks of 32 or 256 elements. Their products of a scale and a code are
 * exact in float32, so that fused and separate additions give the same bits. */
#ifndef PYLOSS_QUANT_TPL_H
#define PYLOSS_QUANT_TPL_H
#include "../pyloss.h"
#include "simd/narrow.h"
#include "simd/vec.h"

INLINE float f16_at(const uint8_t *p) { return f32_from_f16((uint16_t)(p[0] | p[1] << 8)); }
INLINE vf vf_from_codes(vi codes) { return __builtin_convertvector(codes, vf); }

INLINE float float_at(const uint8_t *p, int format, int64_t i) {
    float value;
    if (format == PL_W_F32) {
        memcpy(&value, p + 4 * i, 4);
        return value;
    }
    if (format == PL_W_F16) return f16_at(p + 2 * i);
    uint32_t bits = (uint32_t)p[2 * i] << 16 | (uint32_t)p[2 * i + 1] << 24;
    memcpy(&value, &bits, 4);
    return value;
}

/* The decoders of formats.def: decode_<decoder>(format, w, row, begin, n, out) expands elements
 * [begin, begin + n) of stored row `row`. begin is a multiple of 32; n is 32, or for floats any
 * n <= 32. `format` is a constant. */

/* Whole vectors first: a memcpy whose length is not a constant would be a call. */
INLINE void decode_floats(const int format, const pl_weight *w, int64_t row, int64_t begin,
                          int64_t n, float *out) {
    const uint8_t *p = w->data + row * w->row_bytes + pl_block_bytes(format) * begin;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        if (format == PL_W_F32) vf_store(out + i, vf_load((const float *)p + i));
        else
            vf_store(out + i,
                     format == PL_W_BF16 ? vf_from_bf16(p + 2 * i) : vf_from_f16(p + 2 * i));
    }
    for (; i < n; i++) out[i] = float_at(p, format, i);
}

/* The block that holds element `begin` of a row. */
INLINE const uint8_t *block_at(const int format, const pl_weight *w, int64_t row, int64_t begin) {
    return w->data + row * w->row_bytes +
           begin / pl_block_elements(format) * pl_block_bytes(format);
}

/* Blocks of 32 elements: a scale, an offset in Q4_1 and Q5_1, the fifth bits in Q5_0 and Q5_1, then
 * the codes. The low nibbles are elements 0..15, the high nibbles 16..31. */
INLINE void decode_block(const int format, const pl_weight *w, int64_t row, int64_t begin,
                         int64_t n UNUSED, float *out) {
    const uint8_t *p = block_at(format, w, row, begin);
    vf d = vf_set1(f16_at(p));
    if (format == PL_W_Q8_0) {
        for (int i = 0; i < 32; i += LANES) vf_store(out + i, vf_from_i8(p + 2 + i) * d);
        return;
    }
    const int five = format == PL_W_Q5_0 || format == PL_W_Q5_1,
              given = format == PL_W_Q4_1 || format == PL_W_Q5_1;
    vf offset = given ? vf_set1(f16_at(p + 2)) : d * (five ? -16.0f : -8.0f);
    const uint8_t *fifth = p + (given ? 4 : 2), *codes = fifth + (five ? 4 : 0);
    uint32_t bits;
    memcpy(&bits, fifth, 4);
    for (int i = 0; i < 16; i += LANES) {
        vi both = vi_from_u8(codes + i), low = both & 15, high = both >> 4;
        if (five) {
            vi bit;
            for (int l = 0; l < LANES; l++) bit[l] = 1 << l;
            low |= (((int32_t)(bits >> i & 0xffff) & bit) == bit) & 16;
            high |= (((int32_t)(bits >> (16 + i)) & bit) == bit) & 16;
        }
        vf_store(out + i, vf_from_codes(low) * d + offset);
        vf_store(out + 16 + i, vf_from_codes(high) * d + offset);
    }
}

/* One of the eight runs of 32 elements in a block of Q4_K or Q5_K. Its scale and offset are 6-bit
 * integers times the block's two float16 factors. */
INLINE void decode_k_offset(const int format, const pl_weight *w, int64_t row, int64_t begin,
                            int64_t n UNUSED, float *out) {
    const uint8_t *p = block_at(format, w, row, begin);
    const int run = (int)(begin / 32 % 8);
    const uint8_t *s = p + 4, *fifth = p + 16,
                  *codes = p + (format == PL_W_Q5_K ? 48 : 16) + run / 2 * 32;
    int scale = run < 4 ? s[run] & 63 : (s[run + 4] & 15) | s[run - 4] >> 6 << 4;
    int offset = run < 4 ? s[run + 4] & 63 : s[run + 4] >> 4 | s[run] >> 6 << 4;
    vf d = vf_set1(f16_at(p) * (float)scale), m = vf_set1(f16_at(p + 2) * (float)offset);
    for (int i = 0; i < 32; i += LANES) {
        vi q = vi_from_u8(codes + i) >> (run & 1) * 4 & 15;
        if (format == PL_W_Q5_K) q |= (vi_from_u8(fifth + i) >> run & 1) << 4;
        vf_store(out + i, vf_from_codes(q) * d - m);
    }
}

/* One of the eight runs of 32 elements in a block of Q2_K, Q3_K or Q6_K. 16 elements share a
 * scale. */
INLINE void decode_k_sixteens(const int format, const pl_weight *w, int64_t row, int64_t begin,
                              int64_t n UNUSED, float *out) {
    const uint8_t *p = block_at(format, w, row, begin);
    const int run = (int)(begin / 32 % 8);
    const int half = run / 4, part = run % 4;
    const float d = f16_at(p + (format == PL_W_Q2_K ? 80 : format == PL_W_Q3_K ? 108 : 208));
    for (int i = 0; i < 32; i += LANES) {
        const int group = 2 * run + i / 16;
        int scale;
        float offset = 0;
        vi q;
        if (format == PL_W_Q2_K) {
            scale = p[group] & 15;
            offset = f16_at(p + 82) * (float)(p[group] >> 4);
            q = vi_from_u8(p + 16 + 32 * half + i) >> 2 * part & 3;
        } else if (format == PL_W_Q3_K) {
            const uint8_t *s = p + 96;
            scale = ((s[group % 8] >> (group < 8 ? 0 : 4) & 15) |
                     (s[8 + group % 4] >> group / 4 * 2 & 3) << 4) -
                    32;
            q = (vi_from_u8(p + 32 + 32 * half + i) >> 2 * part & 3) - 4 +
                ((vi_from_u8(p + i) >> run & 1) << 2);
        } else {
            scale = (int8_t)p[192 + group];
            q = vi_from_u8(p + 64 * half + 32 * (part & 1) + i) >> part / 2 * 4 & 15;
            q = (q | (vi_from_u8(p + 128 + 32 * half + i) >> 2 * part & 3) << 4) - 32;
        }
        vf_store(out + i, vf_from_codes(q) * (d * (float)scale) - offset);
    }
}

/* Blocks of IQ4_NL and MXFP4, and one of the eight runs of 32 elements in a block of IQ4_XS: codes
 * of 4 bits are places in a table. MXFP4's scale is a power of two, 2^(p[0] - 128), since its table
 * has twice the values of E2M1 (OCP Microscaling Formats 1.0, section 5.3.3). */
INLINE void decode_codebook(const int format, const pl_weight *w, int64_t row, int64_t begin,
                            int64_t n UNUSED, float *out) {
    static const float iq4[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                  1,    13,   25,  38,  53,  69,  89,  113},
                       e2m1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    const uint8_t *p = block_at(format, w, row, begin), *codes = p + 2;
    float scale;
    if (format == PL_W_MXFP4) {
        const uint32_t bits = p[0] < 2 ? 0x00200000u << p[0] : (uint32_t)(p[0] - 1) << 23;
        memcpy(&scale, &bits, sizeof scale);
        codes = p + 1;
    } else {
        scale = f16_at(p);
    }
    if (format == PL_W_IQ4_XS) {
        const int run = (int)(begin / 32 % 8), high = p[2] | p[3] << 8;
        scale *=
            (float)(((p[4 + run / 2] >> (run & 1) * 4 & 15) | (high >> 2 * run & 3) << 4) - 32);
        codes = p + 8 + 16 * run;
    }
    const uint8_t *table = (const uint8_t *)(format == PL_W_MXFP4 ? e2m1 : iq4);
    for (int i = 0; i < 16; i += LANES) {
        const vi both = vi_from_u8(codes + i);
        vf_store(out + i, vf_lookup16(table, both & 15) * scale);
        vf_store(out + 16 + i, vf_lookup16(table, both >> 4) * scale);
    }
}

/* The index of an element's group in the matrix; the size of a group is a power of two. */
INLINE int64_t group_of(const pl_weight *w, int64_t row, int64_t begin) {
    return (w->groups.first + row * w->cols + begin) >>
           __builtin_ctzll((unsigned long long)w->groups.size);
}

INLINE void decode_table(const int format, const pl_weight *w, int64_t row, int64_t begin,
                         int64_t n UNUSED, float *out) {
    const pl_groups *g = &w->groups;
    const int64_t group = group_of(w, row, begin);
    vi codes[32 / LANES];
    float scale;
    if (g->map) {
        float outer = float_at(g->nested, PL_W_F32,
                               group >> __builtin_ctzll((unsigned long long)g->nested_size));
        /* volatile: the product is rounded before the offset is added, as in bitsandbytes. The
         * compiler would fuse them. */
        volatile float product = float_at(g->map, PL_W_F32, g->scales[group]) * outer;
        scale = product + g->nested_offset;
    } else {
        scale = float_at(g->scales, g->scale_format, group);
    }
    vi_from_codes(block_at(format, w, row, begin), pl_code_bits(format), 1, codes);
    for (int l = 0; l < 32 / LANES; l++)
        vf_store(out + l * LANES, vf_lookup16(g->table, codes[l]) * scale);
}

INLINE void decode_affine(const int format, const pl_weight *w, int64_t row, int64_t begin,
                          int64_t n UNUSED, float *out) {
    const pl_groups *g = &w->groups;
    const int64_t group = group_of(w, row, begin);
    vi codes[32 / LANES];
    float scale = float_at(g->scales, g->scale_format, group),
          offset = float_at(g->offsets, g->scale_format, group);
    vi_from_codes(block_at(format, w, row, begin), pl_code_bits(format), 0, codes);
    for (int l = 0; l < 32 / LANES; l++)
        vf_store(out + l * LANES, vf_from_codes(codes[l]) * scale + offset);
}

/* Each format's decoder: run_<name> of one run of 32 elements, inlined where the format is a
 * constant, and decoders[format], which expands elements [begin, begin + n) of a stored row, n a
 * multiple of 32, or for floats any number. */
typedef void (*run_decoder)(const pl_weight *w, int64_t row, int64_t begin, float *out);
typedef void (*decoder)(const pl_weight *w, int64_t row, int64_t begin, int64_t n, float *out);
#define PL_FORMAT(name, elements, bytes, decoder, kind) \
    INLINE void run_##name(const pl_weight *w, int64_t row, int64_t begin, float *out) { \
        decode_##decoder(PL_W_##name, w, row, begin, 32, out); \
    } \
    static void decode_##name(const pl_weight *w, int64_t row, int64_t begin, int64_t n, \
                              float *out) { \
        for (; n >= 32; n -= 32, begin += 32, out += 32) run_##name(w, row, begin, out); \
        if (PL_KIND_##kind == PL_KIND_FLOATS && n > 0) \
            decode_##decoder(PL_W_##name, w, row, begin, n, out); \
    }
#include "../formats.def"
static const decoder decoders[PL_W_COUNT] = {
#define PL_FORMAT(name, elements, bytes, decoder, kind) decode_##name,
#include "../formats.def"
};

/* Decodes a whole row. */
INLINE void decode_row(const pl_weight *w, int64_t row, float *out) {
    decoders[w->format](w, pl_stored_row(w, row), 0, w->cols, out);
}

#endif
