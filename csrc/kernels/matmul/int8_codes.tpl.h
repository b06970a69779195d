/* Expands quantized weights to bytes for products in int8, LANES rows of B ("columns") at a time.
 *
 * A run of 32 depths becomes eight vectors of words: a lane holds four depths of its column, as
 * unsigned codes. With the code that stands for 0 (int8_zero), w = scale (code - zero) + offset.
 * Memory is read 16 bytes of each column at a time and transposed, so that everything after that
 * is the same arithmetic in each lane, for all columns at once. */
#ifndef PYLOSS_INT8_CODES_TPL_H
#define PYLOSS_INT8_CODES_TPL_H
#include "../quant.tpl.h"
#include "../simd/bytes.h"

enum {
    RUNS = 8,        /* expanded together, at most: those of a block of a K-quant */
    INT8_VECTORS = 2 /* vectors of columns that lie side by side */
};

/* LANES rows of B. */
typedef struct {
    const pl_weight *w;
    int64_t stored[LANES]; /* their numbers among the stored rows */
    const uint8_t *row[LANES];
    const uint8_t *ahead; /* the bytes that are expanded next, as many as these have */
} int8_columns;

/* Where the expanded runs go: codes [run][8] and scales, offsets [run][2] of vectors, of which
 * every INT8_VECTORS-th is written. Formats whose scales hold for 32 depths use the first of the
 * two. */
typedef struct {
    vw *codes;
    vf *scales, *offsets;
} int8_panel;

/* Whether 16 depths share a scale, not 32; whether the format has offsets; whether its codes need
 * more than four bits; and the code of 0. */
INLINE int int8_halves(int format) {
    return format == PL_W_Q2_K || format == PL_W_Q3_K || format == PL_W_Q6_K;
}
INLINE int int8_offsets(int format) {
    return format == PL_W_Q4_1 || format == PL_W_Q5_1 || format == PL_W_Q2_K ||
           format == PL_W_Q4_K || format == PL_W_Q5_K || pl_formats[format].kind == PL_KIND_AFFINE;
}
INLINE int int8_wide(int format) {
    switch (format) {
    case PL_W_Q4_0:
    case PL_W_Q4_1:
    case PL_W_Q2_K:
    case PL_W_Q3_K:
    case PL_W_Q4_K:
    case PL_W_AFFINE2:
    case PL_W_AFFINE3:
    case PL_W_AFFINE4: return 0;
    default: return 1;
    }
}
INLINE int int8_zero(int format) {
    switch (format) {
    case PL_W_Q8_0:
    case PL_W_IQ4_NL:
    case PL_W_IQ4_XS: return 128;
    case PL_W_Q4_0: return 8;
    case PL_W_Q5_0: return 16;
    case PL_W_Q3_K: return 4;
    case PL_W_Q6_K: return 32;
    case PL_W_MXFP4: return 12;
    default: return 0;
    }
}

/* The depth, within its run, of byte i of a column's codes. Two affine formats leave theirs in an
 * order that takes the fewest steps. */
INLINE int int8_depth(int format, int i) {
    if (format == PL_W_AFFINE4) return i < 16 ? 2 * i : 2 * (i - 16) + 1;
    if (format == PL_W_AFFINE2) return i / 16 * 16 + i % 4 * 4 + i / 4 % 4;
    return i;
}

/* out[i], lane l: word i of the 16 bytes of column l at `at`. What the columns read is a stretch of
 * memory, if rows lie one after the other: as much of the next stretch is prefetched. */
INLINE void load_columns(const int8_columns *c, int64_t at, vw out[4]) {
#pragma GCC unroll 4
    for (int i = 0; i < 16 * LANES; i += 64) __builtin_prefetch(c->ahead + at * LANES + i);
    load_words(c->row, at, out);
}

/* Words of columns that are loaded one by one. The union spares a copy that makes them vectors. */
typedef union {
    uint32_t word[RUNS][LANES];
    vw vector[RUNS];
} int8_words;

/* word[i][l]: the one at `at` + i * stride of the bytes of column l, which a format has in each run
 * or block. */
INLINE void words_of_columns(const int8_columns *c, int64_t at, int64_t stride, int64_t n,
                             int8_words *out) {
    for (int l = 0; l < LANES; l++) {
        const uint8_t *p = c->row[l] + at;
        if (n == RUNS)
#pragma GCC unroll 8
            for (int64_t i = 0; i < RUNS; i++) out->word[i][l] = word_at(p + i * stride);
        else
            for (int64_t i = 0; i < n; i++) out->word[i][l] = word_at(p + i * stride);
    }
}
/* n words of each column that lie together. */
INLINE void words_in_order(const int8_columns *c, int64_t at, int n, vw *out) {
    const int fours = n / 4 * 4;
    for (int i = 0; i < fours; i += 4) load_columns(c, at + 4 * i, out + i);
    for (int i = fours; i < n; i++)
        for (int l = 0; l < LANES; l++) out[i][l] = word_at(c->row[l] + at + 4 * i);
}

INLINE void put_codes(const int8_panel *p, int64_t run, int step, vw codes) {
    p->codes[(8 * run + step) * INT8_VECTORS] = codes_shifted(codes);
}
INLINE void put_scale(const int8_panel *p, int64_t run, int half, vf scale) {
    p->scales[(2 * run + half) * INT8_VECTORS] = scale;
}
INLINE void put_offset(const int8_panel *p, int64_t run, int half, vf offset) {
    p->offsets[(2 * run + half) * INT8_VECTORS] = offset;
}

/* The four low bits of each word as bit `to` of its bytes. */
INLINE vw spread_bits(vw v, const int to) {
    v &= 15;
    return ((v | v << 7 | v << 14 | v << 21) & 0x01010101) << to;
}
/* Four codes of `bits` bits, of at most 6, from the low bits of a word to its bytes. */
INLINE vw spread_codes(vw v, const int bits) {
    const uint32_t two = (1u << 2 * bits) - 1, one = (1u << bits) - 1;
    v = (v & two) | (v & two << 2 * bits) << (16 - 2 * bits);
    return (v & one * 0x00010001u) | (v & (one << bits) * 0x00010001u) << (8 - bits);
}

/* The expanders of formats.def's decoders: expand_<decoder>(format, c, run, n, p) expands runs
 * [run, run + n) of the columns; run is a multiple of RUNS, and n <= RUNS. */

/* The words of four codes of a run from its 16 bytes of nibbles, and bits of `fifth` on top. */
INLINE void put_nibbles(const int8_panel *p, int64_t run, const vw *raw, const vw *fifth) {
#pragma GCC unroll 4
    for (int t = 0; t < 4; t++) {
        vw low = raw[t] & 0x0f0f0f0f, high = raw[t] >> 4 & 0x0f0f0f0f;
        if (fifth) {
            low |= spread_bits(*fifth >> 4 * t, 4);
            high |= spread_bits(*fifth >> (16 + 4 * t), 4);
        }
        put_codes(p, run, t, low);
        put_codes(p, run, t + 4, high);
    }
}

INLINE void expand_block(const int format, const int8_columns *c, int64_t run, int64_t n,
                         const int8_panel *p) {
    const int64_t bytes = pl_block_bytes(format);
    if (format == PL_W_Q4_1 ||
        format == PL_W_Q5_1) { /* whole words: scale and offset, bits, codes */
        const int words = (int)bytes / 4, five = words - 5;
        vw raw[6 * RUNS];
        words_in_order(c, run * bytes, words * (int)n, raw);
        for (int64_t i = 0; i < n; i++) {
            const vw *block = raw + words * i;
            put_scale(p, i, 0, vf_from_f16_words(block[0]));
            put_offset(p, i, 0, vf_from_f16_words(block[0] >> 16));
            put_nibbles(p, i, block + 1 + five, five ? block + 1 : NULL);
        }
        return;
    }
    const int five = format == PL_W_Q5_0;
    int8_words head, fifth;
    words_of_columns(c, run * bytes, bytes, n, &head);
    if (five) words_of_columns(c, run * bytes + 2, bytes, n, &fifth);
    for (int64_t i = 0; i < n; i++) {
        const int64_t at = (run + i) * bytes + 2 + 4 * five;
        put_scale(p, i, 0, vf_from_f16_words(head.vector[i]));
        vw raw[4];
        load_columns(c, at, raw);
        if (format != PL_W_Q8_0) {
            put_nibbles(p, i, raw, five ? fifth.vector + i : NULL);
            continue;
        }
#pragma GCC unroll 4
        for (int t = 0; t < 4; t++) put_codes(p, i, t, raw[t] ^ 0x80808080);
        load_columns(c, at + 16, raw);
#pragma GCC unroll 4
        for (int t = 0; t < 4; t++) put_codes(p, i, t + 4, raw[t] ^ 0x80808080);
    }
}

INLINE void expand_k_offset(const int format, const int8_columns *c, int64_t run, int64_t n UNUSED,
                            const int8_panel *p) {
    const int five = format == PL_W_Q5_K;
    const int64_t at = run / 8 * pl_block_bytes(format);
    vw head[4], fifth[8], raw[32];
    load_columns(c, at, head);
    words_in_order(c, at + (five ? 48 : 16), 32, raw);
    if (five) words_in_order(c, at + 16, 8, fifth);
    const vf d = vf_from_f16_words(head[0]), m = vf_from_f16_words(head[0] >> 16);
    for (int i = 0; i < 8; i++) {
        const int byte = i % 4 * 8;
        vw scale, offset;
        if (i < 4) {
            scale = head[1] >> byte & 63;
            offset = head[2] >> byte & 63;
        } else {
            scale = (head[3] >> byte & 15) | (head[1] >> byte & 0xc0) >> 2;
            offset = (head[3] >> (byte + 4) & 15) | (head[2] >> byte & 0xc0) >> 2;
        }
        put_scale(p, i, 0, d * vf_from_codes((vi)scale));
        put_offset(p, i, 0, -m * vf_from_codes((vi)offset));
        for (int t = 0; t < 8; t++) {
            vw codes = raw[i / 2 * 8 + t] >> i % 2 * 4 & 0x0f0f0f0f;
            if (five) codes |= (fifth[t] >> i & 0x01010101) << 4;
            put_codes(p, i, t, codes);
        }
    }
}

INLINE void expand_k_sixteens(const int format, const int8_columns *c, int64_t run,
                              int64_t n UNUSED, const int8_panel *p) {
    const int64_t at = run / 8 * pl_block_bytes(format);
    int8_words one;
    vw scales[4], raw[48];
    if (format == PL_W_Q2_K) {
        load_columns(c, at, scales);
        words_in_order(c, at + 16, 16, raw);
        words_of_columns(c, at + 80, 0, 1, &one);
    } else if (format == PL_W_Q3_K) {
        words_in_order(c, at, 24, raw); /* high bits, then low ones */
        load_columns(c, at + 92, scales);
        words_of_columns(c, at + 106, 0, 1, &one);
    } else {
        words_in_order(c, at, 48, raw); /* low nibbles, then high pairs of bits */
        load_columns(c, at + 192, scales);
        words_of_columns(c, at + 206, 0, 1, &one);
    }
    const vw factor = format == PL_W_Q2_K ? one.vector[0] : one.vector[0] >> 16;
    const vf d = vf_from_f16_words(factor);
    for (int i = 0; i < 8; i++) {
        const int half = i / 4, part = i % 4;
        for (int h = 0; h < 2; h++) {
            const int group = 2 * i + h, byte = group % 4 * 8;
            vi scale;
            if (format == PL_W_Q2_K) {
                scale = (vi)(scales[group / 4] >> byte & 15);
                const vf m = vf_from_f16_words(factor >> 16);
                put_offset(p, i, h, -m * vf_from_codes((vi)(scales[group / 4] >> (byte + 4) & 15)));
            } else if (format == PL_W_Q3_K) {
                const vw low = scales[1 + group % 8 / 4] >> (byte + group / 8 * 4) & 15,
                         high = scales[3] >> (byte + group / 4 * 2) & 3;
                scale = (vi)(low | high << 4) - 32;
            } else {
                scale = (vi)(scales[group / 4] << (24 - byte)) >> 24;
            }
            put_scale(p, i, h, d * vf_from_codes(scale));
        }
        for (int t = 0; t < 8; t++) {
            vw codes;
            if (format == PL_W_Q2_K) {
                codes = raw[8 * half + t] >> 2 * part & 0x03030303;
            } else if (format == PL_W_Q3_K) {
                codes = (raw[8 + 8 * half + t] >> 2 * part & 0x03030303) |
                        (raw[t] >> i & 0x01010101) << 2;
            } else {
                codes = (raw[16 * half + 8 * (part & 1) + t] >> part / 2 * 4 & 0x0f0f0f0f) |
                        (raw[32 + 8 * half + t] >> 2 * part & 0x03030303) << 4;
            }
            put_codes(p, i, t, codes);
        }
    }
}

INLINE void expand_codebook(const int format, const int8_columns *c, int64_t run, int64_t n,
                            const int8_panel *p) {
    /* The tables of decode_codebook, with the code of 0 added. */
    static const uint8_t iq4[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                    129, 141, 153, 166, 181, 197, 217, 241},
                         e2m1[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
    const int64_t bytes = pl_block_bytes(format);
    const int large = format == PL_W_IQ4_XS;
    const int64_t first = large ? run / 8 * bytes : run * bytes;
    int8_words head;
    if (large) words_in_order(c, first, 2, head.vector);
    else words_of_columns(c, first, bytes, n, &head);
    for (int64_t i = 0; i < n; i++) {
        vf scale;
        int64_t at = first + i * bytes + 2;
        if (format == PL_W_MXFP4) {
            const vw e = head.vector[i] & 255;
            const vi small = (vi)(vw_set1(0x00200000) << (e & 1)), normal = (vi)((e - 1) << 23);
            scale = vf_select(vi_less((vi)e, vi_set1(2)), (vf)small, (vf)normal);
            at = first + i * bytes + 1;
        } else if (large) {
            const vw low = head.vector[1] >> (uint32_t)(4 * i) & 15,
                     high = head.vector[0] >> (uint32_t)(16 + 2 * i) & 3;
            scale = vf_from_f16_words(head.vector[0]) * vf_from_codes((vi)(low | high << 4) - 32);
            at = first + 8 + 16 * i;
        } else {
            scale = vf_from_f16_words(head.vector[i]);
        }
        put_scale(p, i, 0, scale);
        vw raw[4];
        load_columns(c, at, raw);
#pragma GCC unroll 4
        for (int t = 0; t < 4; t++) {
            const uint8_t *table = format == PL_W_MXFP4 ? e2m1 : iq4;
            put_codes(p, i, t, vw_lookup_bytes(table, raw[t] & 0x0f0f0f0f));
            put_codes(p, i, t + 4, vw_lookup_bytes(table, raw[t] >> 4 & 0x0f0f0f0f));
        }
    }
}

/* Numbers of `size` bytes, a constant, of the groups of runs [run, run + n) as words: word[i]
 * has that of run i * `per`. */
INLINE void group_words(const int8_columns *c, const uint8_t *numbers, const int size, int64_t run,
                        int64_t n, int64_t per, int8_words *out) {
    const int shift = __builtin_ctzll((unsigned long long)c->w->groups.size);
    for (int l = 0; l < LANES; l++) {
        const int64_t first = c->w->groups.first + c->stored[l] * c->w->cols + 32 * run;
        const int64_t groups = (n + per - 1) / per;
#pragma GCC unroll 4
        for (int64_t i = 0; i < groups; i++) {
            const uint8_t *at = numbers + ((first + 32 * i * per) >> shift) * size;
            uint16_t half;
            memcpy(&half, at, sizeof half);
            out->word[i][l] = size == 4 ? word_at(at) : half;
        }
    }
}
INLINE void group_floats(const int8_columns *c, const uint8_t *floats, int64_t run, int64_t n,
                         int64_t per, vf *out) {
    int8_words words;
    const int format = c->w->groups.scale_format;
    if (format == PL_W_F32) group_words(c, floats, 4, run, n, per, &words);
    else group_words(c, floats, 2, run, n, per, &words);
    for (int64_t i = 0; i * per < n; i++)
        out[i] = format == PL_W_F16   ? vf_from_f16_words(words.vector[i])
                 : format == PL_W_F32 ? (vf)words.vector[i]
                                      : (vf)(words.vector[i] << 16);
}

INLINE void expand_affine(const int format, const int8_columns *c, int64_t run, int64_t n,
                          const int8_panel *p) {
    const int bits = pl_code_bits(format); /* and the words of a column's run */
    const pl_groups *g = &c->w->groups;
    /* How many runs certainly share a group: groups begin with rows, and `run` begins one. */
    const int whole = !((g->first | c->w->cols) & (g->size - 1));
    const int64_t per = whole ? (g->size < 32 * RUNS ? g->size / 32 : RUNS) : 1;
    vf scale[RUNS], offset[RUNS];
    group_floats(c, g->scales, run, n, per, scale);
    group_floats(c, g->offsets, run, n, per, offset);
    vw raw[8 * RUNS];
    words_in_order(c, 4 * bits * run, bits * (int)n, raw);
    for (int64_t i = 0; i < n; i++) {
        put_scale(p, i, 0, scale[i / per]);
        put_offset(p, i, 0, offset[i / per]);
        const vw *words = raw + bits * i;
#pragma GCC unroll 8
        for (int t = 0; t < 8; t++) {
            const int first = 4 * bits * t, word = first / 32, shift = first % 32;
            if (bits == 8) {
                put_codes(p, i, t, words[t]);
            } else if (bits == 4) {
                put_codes(p, i, t, words[t % 4] >> t / 4 * 4 & 0x0f0f0f0f);
            } else if (bits == 2) {
                put_codes(p, i, t, words[t / 4] >> t % 4 * 2 & 0x03030303);
            } else {
                vw v = words[word] >> shift;
                if (shift + 4 * bits > 32) v |= words[word + 1] << (32 - shift);
                put_codes(p, i, t, spread_codes(v, bits));
            }
        }
    }
}

/* Each format's expander; NULL for floats and tables of floats, which have no integer codes. */
typedef void (*int8_expander)(const int8_columns *c, int64_t run, int64_t n, const int8_panel *p);
INLINE void expand_floats(int format UNUSED, const int8_columns *c UNUSED, int64_t run UNUSED,
                          int64_t n UNUSED, const int8_panel *p UNUSED) {}
INLINE void expand_table(int format UNUSED, const int8_columns *c UNUSED, int64_t run UNUSED,
                         int64_t n UNUSED, const int8_panel *p UNUSED) {}
#define PL_FORMAT(name, elements, bytes, decoder, kind) \
    UNUSED static void expand_##name(const int8_columns *c, int64_t run, int64_t n, \
                                     const int8_panel *p) { \
        expand_##decoder(PL_W_##name, c, run, n, p); \
    }
#include "../../formats.def"
static const int8_expander int8_expanders[PL_W_COUNT] = {
#define PL_FORMAT(name, elements, bytes, decoder, kind) expand_##name,
#include "../../formats.def"
};

#endif
