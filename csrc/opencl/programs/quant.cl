/* Decodes stored weights to float32, eight elements of a row at a time, as kernels/quant.tpl.h
 * does. A program is built for one format; its build options define:
 *
 *   FORMAT_<name>                a GGUF format, or F32, BF16, F16
 *   BLOCK_ELEMENTS, BLOCK_BYTES  of the format
 *   GROUPED                      defined if the scales are stored apart from the codes; then either
 *   AFFINE                       the bits of a code, for mlx's formats, or
 *   NF4                          defined for NF4
 */
#ifndef PYLOSS_CL_QUANT
#define PYLOSS_CL_QUANT

#include "types.cl"

#pragma OPENCL FP_CONTRACT OFF

/* pl_weight and pl_groups of pyloss.h. `group_shift` and `nested_shift` are the logarithms of the
 * sizes of groups. */
typedef struct {
    const global uchar *data;
    long cols, head_dim, row_bytes;
#ifdef GROUPED
    const global uchar *scales, *offsets;
    const global float *map, *table, *nested;
    long first;
    int group_shift, nested_shift, scale_format;
    float nested_offset;
#endif
} weight;

#ifdef GROUPED
#define WEIGHT_PARAMETERS \
    ARRAY(const uchar, codes), long weight_cols, long weight_head_dim, ARRAY(const uchar, scales), \
        ARRAY(const uchar, offsets), ARRAY(const float, map), ARRAY(const float, table), \
        ARRAY(const float, nested_scales), long first, long group_shift, long nested_shift, \
        long scale_format, float nested_offset
#define GROUPS_OF_PARAMETERS \
    w.scales = ROW(scales, 0); \
    w.offsets = ROW(offsets, 0); \
    w.map = map_data ? ROW(map, 0) : 0; \
    w.table = ROW(table, 0); \
    w.nested = ROW(nested_scales, 0); \
    w.first = first; \
    w.group_shift = (int)group_shift; \
    w.nested_shift = (int)nested_shift; \
    w.scale_format = (int)scale_format; \
    w.nested_offset = nested_offset;
#else
#define WEIGHT_PARAMETERS ARRAY(const uchar, codes), long weight_cols, long weight_head_dim
#define GROUPS_OF_PARAMETERS
#endif
/* Declares `w`, the weight of the parameters. */
#define TAKE_WEIGHT \
    weight w; \
    w.data = ROW(codes, 0); \
    w.cols = weight_cols; \
    w.head_dim = weight_head_dim; \
    w.row_bytes = weight_cols / BLOCK_ELEMENTS * BLOCK_BYTES; \
    GROUPS_OF_PARAMETERS

/* The row of the stored matrix that holds row `row`; see pyloss.h. */
INLINE long stored_row(const weight *w, long row) {
    if (w->head_dim > 0) {
        long j = row % w->head_dim, half_dim = w->head_dim / 2;
        row = row - j + (j < half_dim ? 2 * j : 2 * (j - half_dim) + 1);
    }
    return row;
}

INLINE float half_at(const global uchar *p) { return vload_half(0, (const global half *)p); }
INLINE float8 bf16_run(const global uchar *p) {
    return as_float8(convert_uint8(vload8(0, (const global ushort *)p)) << 16);
}
INLINE int8 bytes_at(const global uchar *p) { return convert_int8(vload8(0, p)); }

/* Elements [i, i + 8) of a float32 row of n; 0 past its end. */
INLINE float8 float_run(const global float *row, long i, long n) {
    if (n - i >= 8) return vload8(0, row + i);
    float a[8];
    for (int j = 0; j < 8; j++) a[j] = j < n - i ? row[i + j] : 0.0f;
    return vload8(0, a);
}

#if defined(FORMAT_F32)
INLINE float8 decode(const weight *w, const global uchar *row, long at, long i) {
    return vload8(0, (const global float *)row + i);
}
INLINE float decode1(const global uchar *row, long i) { return ((const global float *)row)[i]; }
#elif defined(FORMAT_F16)
INLINE float8 decode(const weight *w, const global uchar *row, long at, long i) {
    return vload_half8(0, (const global half *)row + i);
}
INLINE float decode1(const global uchar *row, long i) { return half_at(row + 2 * i); }
#elif defined(FORMAT_BF16)
INLINE float8 decode(const weight *w, const global uchar *row, long at, long i) {
    return bf16_run(row + 2 * i);
}
INLINE float decode1(const global uchar *row, long i) {
    return as_float((uint)((const global ushort *)row)[i] << 16);
}

#elif defined(FORMAT_Q8_0)
INLINE float8 decode(const weight *w, const global uchar *row, long at, long i) {
    const global uchar *p = row + i / 32 * BLOCK_BYTES;
    return convert_float8(vload8(0, (const global char *)p + 2 + i % 32)) * half_at(p);
}

#elif defined(FORMAT_Q4_0) || defined(FORMAT_Q4_1) || defined(FORMAT_Q5_0) || defined(FORMAT_Q5_1)
INLINE float8 decode(const weight *w, const global uchar *row, long at, long i) {
    const global uchar *p = row + i / 32 * BLOCK_BYTES;
    const int e = (int)(i % 32);
    const float d = half_at(p);
#if defined(FORMAT_Q4_1) || defined(FORMAT_Q5_1)
    const float offset = half_at(p + 2);
    p += 4;
#elif defined(FORMAT_Q5_0)
    const float offset = d * -16.0f;
    p += 2;
#else
    const float offset = d * -8.0f;
    p += 2;
#endif
#if defined(FORMAT_Q5_0) || defined(FORMAT_Q5_1)
    const uint bits = (uint)p[0] | (uint)p[1] << 8 | (uint)p[2] << 16 | (uint)p[3] << 24;
    const int8 fifth = convert_int8((uint8)(bits >> e) >> (uint8)(0, 1, 2, 3, 4, 5, 6, 7) & 1u)
                       << 4;
    p += 4;
#else
    const int8 fifth = 0;
#endif
    const int8 code = (bytes_at(p + e % 16) >> (e < 16 ? 0 : 4) & 15) | fifth;
    return convert_float8(code) * d + offset;
}

#elif defined(FORMAT_Q4_K) || defined(FORMAT_Q5_K)
INLINE float8 decode(const weight *w, const global uchar *row, long at, long i) {
    const global uchar *p = row + i / 256 * BLOCK_BYTES, *s = p + 4;
    const int run = (int)(i / 32 % 8), e = (int)(i % 32);
    const int scale = run < 4 ? s[run] & 63 : (s[run + 4] & 15) | s[run - 4] >> 6 << 4;
    const int offset = run < 4 ? s[run + 4] & 63 : s[run + 4] >> 4 | s[run] >> 6 << 4;
    const float d = half_at(p) * (float)scale, m = half_at(p + 2) * (float)offset;
#ifdef FORMAT_Q5_K
    int8 q = bytes_at(p + 48 + run / 2 * 32 + e) >> (run & 1) * 4 & 15;
    q |= (bytes_at(p + 16 + e) >> run & 1) << 4;
#else
    const int8 q = bytes_at(p + 16 + run / 2 * 32 + e) >> (run & 1) * 4 & 15;
#endif
    return convert_float8(q) * d - m;
}

#elif defined(FORMAT_Q2_K) || defined(FORMAT_Q3_K) || defined(FORMAT_Q6_K)
INLINE float8 decode(const weight *w, const global uchar *row, long at, long i) {
    const global uchar *p = row + i / 256 * BLOCK_BYTES;
    const int run = (int)(i / 32 % 8), e = (int)(i % 32), upper = run / 4, part = run % 4,
              group = 2 * run + e / 16;
#if defined(FORMAT_Q2_K)
    const float d = half_at(p + 80) * (float)(p[group] & 15),
                offset = half_at(p + 82) * (float)(p[group] >> 4);
    const int8 q = bytes_at(p + 16 + 32 * upper + e) >> 2 * part & 3;
#elif defined(FORMAT_Q3_K)
    const global uchar *s = p + 96;
    const int scale = ((s[group % 8] >> (group < 8 ? 0 : 4) & 15) |
                       (s[8 + group % 4] >> group / 4 * 2 & 3) << 4) -
                      32;
    const float d = half_at(p + 108) * (float)scale, offset = 0;
    const int8 q = (bytes_at(p + 32 + 32 * upper + e) >> 2 * part & 3) - 4 +
                   ((bytes_at(p + e) >> run & 1) << 2);
#else
    const float d = half_at(p + 208) * (float)(char)p[192 + group], offset = 0;
    const int8 low = bytes_at(p + 64 * upper + 32 * (part & 1) + e) >> part / 2 * 4 & 15;
    const int8 q = (low | (bytes_at(p + 128 + 32 * upper + e) >> 2 * part & 3) << 4) - 32;
#endif
    return convert_float8(q) * d - offset;
}

#elif defined(FORMAT_IQ4_NL) || defined(FORMAT_IQ4_XS) || defined(FORMAT_MXFP4)
#ifdef FORMAT_MXFP4
constant float codebook[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
#else
constant float codebook[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                               1,    13,   25,  38,  53,  69,  89,  113};
#endif
INLINE float8 decode(const weight *w, const global uchar *row, long at, long i) {
    const global uchar *p = row + i / BLOCK_ELEMENTS * BLOCK_BYTES;
    const int e = (int)(i % 32);
#if defined(FORMAT_MXFP4)
    const float scale = as_float(p[0] < 2 ? 0x00200000u << p[0] : (uint)(p[0] - 1) << 23);
    p += 1;
#elif defined(FORMAT_IQ4_XS)
    const int run = (int)(i / 32 % 8), high = p[2] | p[3] << 8;
    const float scale =
        half_at(p) *
        (float)(((p[4 + run / 2] >> (run & 1) * 4 & 15) | (high >> 2 * run & 3) << 4) - 32);
    p += 8 + 16 * run;
#else
    const float scale = half_at(p);
    p += 2;
#endif
    float value[8];
    for (int j = 0; j < 8; j++) value[j] = codebook[p[e % 16 + j] >> (e < 16 ? 0 : 4) & 15];
    return vload8(0, value) * scale;
}

#elif defined(GROUPED)
INLINE float scale_at(const global uchar *p, int format, long i) {
    if (format == SCALE_F32) return ((const global float *)p)[i];
    if (format == SCALE_F16) return half_at(p + 2 * i);
    return as_float((uint)((const global ushort *)p)[i] << 16);
}
/* `at` is the number of the row's first element in the matrix. */
INLINE float8 decode(const weight *w, const global uchar *row, long at, long i) {
    const long group = (w->first + at + i) >> w->group_shift;
#ifdef NF4
    float scale;
    if (w->map) {
        const float product = w->map[w->scales[group]] * w->nested[group >> w->nested_shift];
        scale = product + w->nested_offset;
    } else {
        scale = scale_at(w->scales, w->scale_format, group);
    }
    const global uchar *p = row + i / 2;
    float value[8];
    for (int j = 0; j < 8; j += 2) {
        value[j] = w->table[p[j / 2] >> 4];
        value[j + 1] = w->table[p[j / 2] & 15];
    }
    return vload8(0, value) * scale;
#else
    const global uchar *p = row + i / 8 * AFFINE;
    ulong bits = 0;
    for (int j = 0; j < AFFINE; j++) bits |= (ulong)p[j] << 8 * j;
    const ulong8 shifted = (ulong8)(bits) >> (ulong8)(0, 1, 2, 3, 4, 5, 6, 7) * (ulong)AFFINE;
    const float8 q = convert_float8(convert_int8(shifted & (ulong)((1 << AFFINE) - 1)));
    return q * scale_at(w->scales, w->scale_format, group) +
           scale_at(w->offsets, w->scale_format, group);
#endif
}
#endif

/* Elements [i, i + 8) of stored row `row`, i a multiple of 8; 0 past the row's end. */
INLINE float8 weight_run(const weight *w, long row, long i) {
    if (i >= w->cols) return (float8)(0.0f);
    const global uchar *data = w->data + row * w->row_bytes;
#if BLOCK_ELEMENTS == 1
    if (w->cols - i < 8) {
        float a[8];
        for (int j = 0; j < 8; j++) a[j] = j < w->cols - i ? decode1(data, i + j) : 0.0f;
        return vload8(0, a);
    }
#endif
    return decode(w, data, row * w->cols, i);
}

#endif
