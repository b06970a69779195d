/* Rows in memory: reading and writing them as the computed type, in vectors or blocks. Rows of
 * another type than the computed one are converted block by block. */
#ifndef ROWLOSS_ROWS
#define ROWLOSS_ROWS
#include "../simd/narrow.h"
#include "../simd/vec.h"
#include "job.h"

/* n 16-bit floats as the computed type. */
INLINE void widen_halves(const uint16_t *p, int64_t n, int bf16, REAL *to) {
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) {
        vf v =
            bf16 ? vf_from_bf16((const uint8_t *)(p + j)) : vf_from_f16((const uint8_t *)(p + j));
        if (sizeof(REAL) == 4) memcpy(to + j, &v, sizeof v);
        else
            for (int l = 0; l < LANES; l++) to[j + l] = (REAL)v[l];
    }
    if (j == n) return;
    uint16_t part[LANES] = {0};
    memcpy(part, p + j, (size_t)(n - j) * 2);
    vf v = bf16 ? vf_from_bf16((const uint8_t *)part) : vf_from_f16((const uint8_t *)part);
    for (int64_t l = 0; l < n - j; l++) to[j + l] = (REAL)v[l];
}

/* Elements [begin, begin + n) of a stored row: where they lie if they are of the computed type,
 * else converted into `buffer`. */
static const REAL *fetch(const pl_rows *rows, int64_t i, int64_t begin, int64_t n, REAL *buffer) {
    const char *row = pl_row(rows, i);
    if ((int)rows->type == NATIVE) return (const REAL *)row + begin;
    if (rows->type == PL_BF16) widen_halves((const uint16_t *)row + begin, n, 1, buffer);
    else if (rows->type == PL_F16) widen_halves((const uint16_t *)row + begin, n, 0, buffer);
    else
        for (int64_t j = 0; j < n; j++) buffer[j] = (REAL)((const float *)row)[begin + j];
    return buffer;
}

/* Where elements of a stored row are to be computed: in place, or in `buffer`, from where `put`
 * converts them. */
INLINE REAL *target(const pl_rows *rows, int64_t i, int64_t begin, REAL *buffer) {
    return (int)rows->type == NATIVE ? (REAL *)pl_row(rows, i) + begin : buffer;
}
/* n values times `factor` as 16-bit floats. */
INLINE void narrow_to_halves(const REAL *values, int64_t n, REAL factor, int bf16, uint16_t *to) {
    int64_t j = 0;
    vf by = vf_set1((float)factor);
    if (sizeof(REAL) == 4 && bf16)
        for (; j + 2 * LANES <= n; j += 2 * LANES)
            vf_to_bf16_twice(to + j, vf_load((const float *)values + j) * by,
                             vf_load((const float *)values + j + LANES) * by);
    for (; j < n; j += LANES) {
        vf v = {0};
        int64_t m = n - j < LANES ? n - j : LANES;
        if (sizeof(REAL) == 4 && m == LANES) v = vf_load((const float *)values + j) * by;
        else
            for (int64_t l = 0; l < m; l++) v[l] = (float)(values[j + l] * factor);
        uint16_t part[LANES], *at = m < LANES ? part : to + j;
        if (bf16) vf_to_bf16(at, v);
        else vf_to_f16(at, v);
        if (m < LANES) memcpy(to + j, part, (size_t)m * 2);
    }
}
/* Converts `values`, times `factor`, into a row of another type than the computed one. */
static void put(const pl_rows *rows, int64_t i, int64_t begin, int64_t n, const REAL *values,
                REAL factor) {
    if ((int)rows->type == NATIVE) return;
    char *row = pl_row(rows, i);
    if (rows->type == PL_F32) {
        for (int64_t j = 0; j < n; j++) ((float *)row)[begin + j] = (float)(values[j] * factor);
        return;
    }
    if (rows->type == PL_BF16) narrow_to_halves(values, n, factor, 1, (uint16_t *)row + begin);
    else narrow_to_halves(values, n, factor, 0, (uint16_t *)row + begin);
}

static void put_zeros(const pl_rows *rows, int64_t i, int64_t n) {
    memset(pl_row(rows, i), 0, (size_t)(n * float_bytes[rows->type]));
}

/* The vector at p of a row that has n elements left; lanes past the end are `fill`. */
INLINE V load_lanes(const REAL *p, int64_t n, REAL fill) {
    return n >= WIDTH ? v_load(p) : VEC(load_part)(p, n, fill);
}
INLINE void store_lanes(REAL *p, V v, int64_t n) {
    if (n >= WIDTH) v_store(p, v);
    else VEC(store_part)(p, v, n);
}

INLINE REAL *scratch_part(const row_job *job, int worker, int part) {
    return (REAL *)(job->scratch + (size_t)worker * job->worker_bytes +
                    (size_t)part * job->part_bytes);
}

#endif
