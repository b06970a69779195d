/* The row drivers for one computed type; included by rowloss.tpl.h for each.
 *
 * A row is walked in blocks that stay in the first-level cache. The first walk takes the statistics of its weights and keeps them
 * in scratch, so that each is computed once; the next ones scale what was kept. Rows in other types than the computed one are
 * converted block by block. Sums run in single vectors within a block only, in float64 from block to block, so that the longest
 * rows keep their digits.
 */
#define REAL TYPED(real)
#define V TYPED(vector)
#define WIDTH TYPED(WIDTH)

/* ---- rows in memory */

static const int TYPED(native) = sizeof(REAL) == 4 ? PL_F32 : PL_F64;

/* n 16-bit floats as the computed type. */
INLINE void TYPED(widen)(const uint16_t *p, int64_t n, int bf16, REAL *to) {
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

/* Elements [begin, begin + n) of a stored row: where they lie if they are of the computed type, else converted into `buffer`. */
static const REAL *TYPED(fetch)(const pl_rows *rows, int64_t i, int64_t begin, int64_t n,
                                REAL *buffer) {
    const char *row = pl_row(rows, i);
    if ((int)rows->type == TYPED(native)) return (const REAL *)row + begin;
    if (rows->type == PL_BF16) TYPED(widen)((const uint16_t *)row + begin, n, 1, buffer);
    else if (rows->type == PL_F16) TYPED(widen)((const uint16_t *)row + begin, n, 0, buffer);
    else
        for (int64_t j = 0; j < n; j++) buffer[j] = (REAL)((const float *)row)[begin + j];
    return buffer;
}

/* Where n elements of a stored row are to be computed: in place, or in `buffer`, from where `put` converts them. */
INLINE REAL *TYPED(target)(const pl_rows *rows, int64_t i, int64_t begin, REAL *buffer) {
    return (int)rows->type == TYPED(native) ? (REAL *)pl_row(rows, i) + begin : buffer;
}
INLINE void TYPED(narrow)(const REAL *values, int64_t n, REAL factor, int bf16, uint16_t *to) {
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
/* Converts `values`, times `factor`, into a row of another type. */
static void TYPED(put)(const pl_rows *rows, int64_t i, int64_t begin, int64_t n, const REAL *values,
                       REAL factor) {
    if ((int)rows->type == TYPED(native)) return;
    char *row = pl_row(rows, i);
    if (rows->type == PL_F32) {
        for (int64_t j = 0; j < n; j++) ((float *)row)[begin + j] = (float)(values[j] * factor);
        return;
    }
    if (rows->type == PL_BF16) TYPED(narrow)(values, n, factor, 1, (uint16_t *)row + begin);
    else TYPED(narrow)(values, n, factor, 0, (uint16_t *)row + begin);
}

static void TYPED(put_zeros)(const pl_rows *rows, int64_t i, int64_t n) {
    memset(pl_row(rows, i), 0, (size_t)(n * float_bytes[rows->type]));
}

/* The vector at p, of which n elements are to be used; and its storing. */
INLINE V TYPED(load)(const REAL *p, int64_t n, REAL fill) {
    return n >= WIDTH ? VEC(load)(p) : VEC(load_part)(p, n, fill);
}
INLINE void TYPED(store)(REAL *p, V v, int64_t n) {
    if (n >= WIDTH) VEC(store)(p, v);
    else VEC(store_part)(p, v, n);
}

/* ---- formulas, and the weight families as the driver takes them */

#include "../../losses/formulas.h"
#include "../../losses.def"

typedef struct {
    V (*weight)(V x);
    V (*slope)(V x); /* NULL where it is 1 */
    V (*log_weight)(V x);
    int shifted;
} TYPED(family);

#define FAMILY(name) \
    ((TYPED(family)){TYPED(name##_weight), name##_is_sloped ? TYPED(name##_slope) : NULL, \
                     TYPED(name##_log_weight), name##_is_shifted})

/* ---- statistics of a row of weights */

/* The sum of the weights w(scale x) is total * e^(scale shift); shift is 0 if the family is not shifted. */
typedef struct {
    REAL shift;
    double total;
    double sum_x; /* of the logits that are not -inf, and their number */
    int64_t count;
    REAL *kept;        /* the weights, [n], or NULL where they are not needed again */
    REAL *block_shift; /* what is kept of each block is relative to, [blocks] */
} TYPED(row_statistics);

/* What makes probabilities (times `by`) of the weights that were kept of the block that begins at `begin`. */
INLINE V TYPED(block_factor)(const TYPED(row_statistics) *row, int64_t begin, REAL scale,
                             double by) {
    REAL shift = row->block_shift[begin / ROW_BLOCK];
    double relative =
        shift == row->shift ? 1 : exp(((double)shift - (double)row->shift) * (double)scale);
    return VEC(set1)((REAL)(relative * by / row->total));
}

#include "write.tpl.h"

INLINE REAL TYPED(block_max)(const REAL *x, int64_t n) {
    REAL lowest = (REAL)-INFINITY;
    V a = VEC(set1)(lowest), b = a, c = a, d = a;
    int64_t i = 0;
    for (; i + 4 * WIDTH <= n; i += 4 * WIDTH) {
        a = VEC(max)(VEC(load)(x + i), a);
        b = VEC(max)(VEC(load)(x + i + WIDTH), b);
        c = VEC(max)(VEC(load)(x + i + 2 * WIDTH), c);
        d = VEC(max)(VEC(load)(x + i + 3 * WIDTH), d);
    }
    for (; i < n; i += WIDTH) a = VEC(max)(TYPED(load)(x + i, n - i, lowest), a);
    return VEC(hmax)(VEC(max)(VEC(max)(a, b), VEC(max)(c, d)));
}

/* w(scale (x - shift)), and what of it is kept for the gradient: itself, or times the slope. */
INLINE V TYPED(weigh)(TYPED(family) f, V x, V shift, V scale, int with_slope, V *kept) {
    V w = f.weight(f.shifted ? (x - shift) * scale : x);
    *kept = with_slope && f.slope ? w * f.slope(x) : w;
    return w;
}

/* The sum of a block's weights. Meanwhile what lies at `next`, in elements of `bytes`, is fetched into the second-level cache
 * (the first has no room left), and `late` written. */
INLINE double TYPED(block_sum)(TYPED(family) f, const REAL *x, int64_t n, REAL shift, REAL scale,
                               int with_slope, REAL *kept, const char *next, int64_t bytes,
                               const TYPED(unwritten_part) *late) {
    V s = VEC(set1)(shift), by = VEC(set1)(scale), a = {0}, b = {0}, k;
    int64_t i = 0;
    for (; i + 2 * WIDTH <= n; i += 2 * WIDTH) {
        for (int64_t line = 0; line < 2 * WIDTH * bytes; line += 64)
            __builtin_prefetch(next + i * bytes + line, 0, 2);
        TYPED(write_two)(late, i);
        a += TYPED(weigh)(f, VEC(load)(x + i), s, by, with_slope, &k);
        if (kept) VEC(store)(kept + i, k);
        b += TYPED(weigh)(f, VEC(load)(x + i + WIDTH), s, by, with_slope, &k);
        if (kept) VEC(store)(kept + i + WIDTH, k);
    }
    double sum = (double)VEC(sum)(a + b);
    for (; i < n; i += WIDTH) {
        int64_t m = n - i < WIDTH ? n - i : WIDTH;
        V w = TYPED(weigh)(f, TYPED(load)(x + i, m, 0), s, by, with_slope, &k);
        for (int64_t j = 0; j < m; j++) sum += (double)w[j];
        if (kept) TYPED(store)(kept + i, k, m);
    }
    return sum;
}

/* Adds a block's logits to the statistics, those that are not masked. */
INLINE void TYPED(block_mean)(const REAL *x, int64_t n, TYPED(row_statistics) *row) {
    V masked = VEC(set1)((REAL)-INFINITY), zero = {0}, one = VEC(set1)(1), sum = {0}, count = {0};
    for (int64_t i = 0; i < n; i += WIDTH) {
        V v = TYPED(load)(x + i, n - i, (REAL)-INFINITY);
        sum += VEC(select)(VEC(equal)(v, masked), zero, v);
        count += VEC(select)(VEC(equal)(v, masked), zero, one);
    }
    row->sum_x += (double)VEC(sum)(sum);
    row->count += (int64_t)VEC(sum)(count);
}

INLINE void TYPED(cap_block)(const REAL *x, int64_t n, REAL softcap, REAL *to) {
    for (int64_t i = 0; i < n; i += WIDTH)
        TYPED(store)(to + i, TYPED(capped)(TYPED(load)(x + i, n - i, 0), VEC(set1)(softcap)),
                     n - i);
}

/* How a row of logits is read: its storage, and what is done to each before anything else. */
typedef struct {
    const pl_rows *rows;
    REAL softcap, scale; /* no cap where softcap is 0 */
    int with_slope, with_mean;
} TYPED(reading);

/* One walk over row i; the total is taken anew relative to each larger maximum. `row` brings its arrays along. Meanwhile `late`,
 * which may be NULL, is written, or its half where this is one of two walks. */
INLINE void TYPED(take_statistics)(TYPED(family) f, TYPED(reading) how, int64_t i, int64_t n,
                                   TYPED(row_statistics) *row, const TYPED(unwritten) *late,
                                   int walk, int walks) {
    REAL buffer[ROW_BLOCK], shift = f.shifted ? (REAL)-INFINITY : 0;
    double total = 0;
    int64_t bytes = float_bytes[how.rows->type];
    row->sum_x = 0;
    row->count = 0;
    for (int64_t begin = 0; begin < n; begin += ROW_BLOCK) {
        int64_t m = n - begin < ROW_BLOCK ? n - begin : ROW_BLOCK;
        const REAL *x = TYPED(fetch)(how.rows, i, begin, m, buffer);
        if (how.softcap > 0) {
            TYPED(cap_block)(x, m, how.softcap, buffer);
            x = buffer;
        }
        REAL highest = f.shifted ? TYPED(block_max)(x, m) : 0;
        if (highest > shift) {
            /* e^-inf drops what only -inf logits left, but keeps a NaN. */
            total *= exp(((double)shift - (double)highest) * (double)how.scale);
            shift = highest;
        }
        row->block_shift[begin / ROW_BLOCK] = shift;
        TYPED(unwritten_part) part = {0};
        int write = late && late->out;
        if (write) {
            part = TYPED(begin_writing)(late, begin, m);
            TYPED(share_writing)(&part, walk, walks);
        }
        /* As long as all logits are -inf they add e^(-inf - 0) = 0. */
        total += TYPED(block_sum)(f, x, m, shift == (REAL)-INFINITY ? 0 : shift, how.scale,
                                  how.with_slope, row->kept ? row->kept + begin : NULL,
                                  pl_row(how.rows, i) + (begin + ROW_BLOCK) * bytes + AHEAD_BYTES,
                                  bytes, &part);
        if (write && walk == walks - 1) TYPED(end_writing)(late, &part, begin, m);
        if (how.with_mean) TYPED(block_mean)(x, m, row);
    }
    row->shift = shift;
    row->total = total;
}

/* A worker's scratch: `part` is one padded row with the shifts of its blocks behind it. */
INLINE REAL *TYPED(scratch)(const row_job *job, int worker, int part) {
    return (REAL *)(job->scratch + (size_t)worker * job->stride + (size_t)part * job->row);
}
INLINE TYPED(row_statistics) TYPED(statistics_in)(REAL *scratch, int64_t n) {
    return (TYPED(row_statistics)){.kept = scratch,
                                   .block_shift = scratch + (n + WIDTH - 1) / WIDTH * WIDTH};
}

#include "class.tpl.h"
#include "pair.tpl.h"
#include "element.tpl.h"
#include "map.tpl.h"

/* ---- the work of each line of the table */

#define PL_LOSS_TABLE
#define PL_CLASS_LOSS(name, family, options, mean_option, softcap_option) \
    static void TYPED(name##_rows)(const void *job, int64_t begin, int64_t end, int worker) { \
        const class_args args = name##_class_args(((const row_job *)job)->call); \
        TYPED(class_rows)(FAMILY(family), TYPED(name), name##_##mean_option, \
                          name##_##softcap_option, &args, job, begin, end, worker); \
    }
#define PL_PAIR_LOSS(name, options, q_sums_to_0) \
    static void TYPED(name##_rows)(const void *job, int64_t begin, int64_t end, int worker) { \
        const pair_args args = name##_pair_args(((const row_job *)job)->call); \
        TYPED(pair_rows)(TYPED(name), q_sums_to_0, &args, job, begin, end, worker); \
    }
#define PL_ELEMENT_LOSS(name, options) \
    static void TYPED(name##_rows)(const void *job, int64_t begin, int64_t end, \
                                   int worker UNUSED) { \
        const element_args args = name##_element_args(((const row_job *)job)->call); \
        TYPED(element_rows)(TYPED(name), &args, job, begin, end); \
    }
#define PL_ROW_MAP(name, family, logarithm) \
    static void TYPED(name##_rows)(const void *job, int64_t begin, int64_t end, int worker) { \
        const name##_args args = name##_args_of(((const row_job *)job)->call); \
        TYPED(map_rows)(FAMILY(family), logarithm, args.x, args.dy, args.y, args.dx, job, begin, \
                        end, worker); \
    }
#include "../../losses.def"

#undef FAMILY
#undef REAL
#undef V
#undef WIDTH
