/* The C contract of pyloss: argument values, weight formats, the kernel table, and the core's
 * functions for kernels.
 *
 * A kernel is `pl_status name(const pl_call *call)`. Its arguments were checked against the
 * specification in ops.def before the call (type, rank, matching dimensions, index ranges,
 * overlap), so a kernel trusts them. It never touches Python, and it fails only if there is no
 * memory. Results do not depend on the number of threads. */
#ifndef PYLOSS_H
#define PYLOSS_H

#include <stddef.h>
#include <stdint.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error pyloss needs a little-endian processor: the weights in files are mapped as they stand
#endif
_Static_assert(sizeof(void *) == 8, "pyloss needs a 64-bit processor and compiler");

typedef enum { PL_OK = 0, PL_NO_MEMORY = 1 } pl_status;

/* The formats of stored matrices: the lines of formats.def, by number. */
typedef enum {
#define PL_FORMAT(name, elements, bytes, decoder, kind) PL_W_##name,
#include "formats.def"
    PL_W_COUNT
} pl_format;

typedef struct {
    const char *name;
    uint16_t elements, bytes; /* of one block; a row is a whole number of blocks */
    enum { PL_KIND_FLOATS, PL_KIND_BLOCKS, PL_KIND_AFFINE, PL_KIND_TABLE } kind;
} pl_format_layout;
static const pl_format_layout pl_formats[PL_W_COUNT] = {
#define PL_FORMAT(name, elements, bytes, decoder, kind) {#name, elements, bytes, PL_KIND_##kind},
#include "formats.def"
};
static inline int64_t pl_block_elements(int format) { return pl_formats[format].elements; }
static inline int64_t pl_block_bytes(int format) { return pl_formats[format].bytes; }
static inline int pl_is_floats(int format) { return pl_formats[format].kind == PL_KIND_FLOATS; }
static inline int pl_has_table(int format) { return pl_formats[format].kind == PL_KIND_TABLE; }
/* Whether the scales are stored apart from the codes. */
static inline int pl_has_groups(int format) {
    return pl_formats[format].kind == PL_KIND_AFFINE || pl_has_table(format);
}
/* Bits of a code, in formats whose blocks hold codes alone. */
static inline int pl_code_bits(int format) {
    return 8 * pl_formats[format].bytes / pl_formats[format].elements;
}

/* The scales of a matrix whose format stores them apart from the codes. Elements are counted
 * through all rows, from `first` on; every `size` of them share a scale and, in affine formats, an
 * offset. `size` is a power of two, at least 32; `first` is a multiple of 32. The arrays may lie at
 * any address. */
typedef struct {
    int64_t size, first;
    /* Affine formats: w = scale code + offset. Table formats: w = scale table[code]. */
    const uint8_t *scales, *offsets;
    int scale_format;     /* a float format; unused with a map */
    const uint8_t *table; /* 16 floats, or NULL */
    /* Scales of a table format may be quantized: scale i is
     * map[scales[i]] nested[i / nested_size] + nested_offset. */
    const uint8_t *map, *nested; /* 256 floats, and floats; NULL if scales are not quantized */
    int64_t nested_size;         /* a power of two */
    float nested_offset;
} pl_groups;

/* A matrix [rows, cols] in one of the formats. With head_dim > 0 each head of head_dim rows is
 * stored with rotary pairs interleaved (GGUF's llama order): row j < head_dim/2 of a head is
 * stored row 2j, row head_dim/2 + j is stored row 2j + 1. */
typedef struct {
    const uint8_t *data;
    int64_t rows, cols, head_dim, row_bytes;
    int format;
    pl_groups groups;
} pl_weight;

/* The row of the stored matrix that holds row `row`. */
static inline int64_t pl_stored_row(const pl_weight *w, int64_t row) {
    if (w->head_dim > 0) {
        int64_t j = row % w->head_dim, half = w->head_dim / 2;
        row = row - j + (j < half ? 2 * j : 2 * (j - half) + 1);
    }
    return row;
}
static inline const uint8_t *pl_weight_row(const pl_weight *w, int64_t row) {
    return w->data + pl_stored_row(w, row) * w->row_bytes;
}

/* Element types of `float` arguments. */
typedef enum { PL_F32, PL_F64, PL_F16, PL_BF16 } pl_float;

/* Rows of floats, contiguous within a row. Row i begins at data + (i / inner) * outer_stride +
 * (i % inner) * inner_stride, in bytes. This covers every slice along the leading axes of an array
 * of at most three dimensions. */
typedef struct {
    char *data; /* NULL for an optional argument that is absent */
    int64_t inner, outer_stride, inner_stride;
    pl_float type;
} pl_rows;

static inline char *pl_row(const pl_rows *r, int64_t i) {
    return r->data + i / r->inner * r->outer_stride + i % r->inner * r->inner_stride;
}

enum { PL_MAX_ARGS = 20, PL_MAX_OPTIONS = 4 /* of a loss */ };

/* Floats of an `act` argument, in one piece: float32 or bfloat16. */
typedef struct {
    void *data; /* NULL for an optional argument that is absent */
    int narrow; /* bfloat16 */
} pl_act;

typedef union {
    const void *in;
    void *out;
    pl_act act;
    int64_t i;
    double f;
    pl_weight w;
    const pl_weight *stack; /* one for each expert; all of one format, shape and row order */
    pl_rows rows;
} pl_value;

/* One call: arguments in the order of the specification, and the sizes that its letters stand
 * for. */
typedef struct {
    pl_value arg[PL_MAX_ARGS];
    int count;       /* of arguments */
    uint32_t narrow; /* bit i: argument i, `half` or `act`, is bfloat16 */
    int wide; /* a `float` argument is float64; so are then the arithmetic and `acc` arguments */
    int64_t dim[26];
    void *indices; /* the call's own copy of the index arrays */
} pl_call;

#define PL_DIM(call, letter) ((call)->dim[(letter) - 'A'])

typedef pl_status (*pl_kernel)(const pl_call *call);

/* The operations by number, in the order of ops.def. */
enum {
#define PL_OP(name, spec) PL_OP_##name,
#include "ops.def"
    PL_OP_COUNT
};

/* The kernels of one instruction set. */
typedef struct {
    const char *name;
    int bytes; /* of a vector */
    pl_kernel kernel[PL_OP_COUNT];
} pl_table;

extern const pl_table pl_table_baseline;
#ifdef PL_X86
extern const pl_table pl_table_avx2;
extern const pl_table pl_table_avx512;
#endif

/* core/os_*.c: how many processors this process may use, by its affinity and cgroup quota. */
int pl_cpu_count(void);
/* core/cpu.c: the tables that this processor and operating system can run, the fastest last; NULL
 * past the end. */
const pl_table *pl_table_at(int index);
/* Whether the processor has instructions for dots of bfloat16 pairs (avx512_bf16). */
int pl_has_bf16_dots(void);
/* The processor's instructions for dots of bytes in vectors of so many bytes, or NULL: avx512_vnni
 * (64), avx_vnni (32), arm64's dotprod (16). */
const char *pl_int8_dots(int bytes);
/* Why this process cannot use the tile unit (amx_tile, amx_bf16), or NULL. With `request` the
 * operating system is asked for the unit, which it gives to a process once and for all. */
const char *pl_amx_missing(int request);

/* encoders/: stored formats whose scales are searched for, from floats [rows, cols], cols whole
 * blocks. `importance`, of the columns, weighs squared errors; `like`, a matrix of that shape,
 * gives its scales; both may be NULL. Scales that float16 does not hold become infinite. */
int pl_encodes(int format);
void pl_encode(int format, const float *x, const float *importance, int64_t rows, int64_t cols,
               const uint8_t *like, uint8_t *out);

/* core/precision.c: how dense layers multiply, for the whole process. With PL_BFLOAT16 their
 * inputs and weights are rounded to bfloat16 and their products are summed in float32, one depth
 * after the other; PL_BFLOAT16_EMULATED does so without the processor's bfloat16 instructions.
 * PL_BFLOAT16_TILES sums in the order of the tile unit (matmul/amx.tpl.h) and uses it; it may be
 * set only where pl_amx_missing(1) is NULL. PL_BFLOAT16_TILES_EMULATED gives the same bits on any
 * processor. In both, attention's products are rounded, too (attention/amx.tpl.h).
 * With PL_INT8 forward products of quantized weights are integer dots (matmul/int8.tpl.h);
 * PL_INT8_EMULATED computes the same bits without the processor's instructions for them.
 * PL_INT8_TILES is PL_INT8 for few rows, and otherwise PL_BFLOAT16_TILES. */
typedef enum {
    PL_FLOAT32,
    PL_BFLOAT16,
    PL_BFLOAT16_EMULATED,
    PL_BFLOAT16_TILES,
    PL_BFLOAT16_TILES_EMULATED,
    PL_INT8,
    PL_INT8_EMULATED,
    PL_INT8_TILES
} pl_precision;
extern const char *const pl_precision_names[]; /* NULL past the end */
pl_precision pl_matmul_precision(void);
void pl_set_matmul_precision(pl_precision precision);
/* The precision of calls by this thread alone; -1: the process's. */
void pl_try_matmul_precision(int precision);

/* core/threads.c. Runs fn over [0, n) in pieces of at most grain items, on any thread, in any
 * order; `worker` is below pl_num_threads() and no two pieces run on one worker at once. Runs
 * inline when nested, when n <= grain, or when another thread is using the pool. */
typedef void (*pl_range_fn)(const void *context, int64_t begin, int64_t end, int worker);
void pl_parallel(int64_t n, int64_t grain, pl_range_fn fn, const void *context);
/* The same in pieces of one item. A worker runs neighbors one after the other, as far as threads
 * are equally fast, so that it may keep what they share. */
void pl_parallel_near(int64_t n, pl_range_fn fn, const void *context);
/* For pieces that depend on earlier ones of the same run: waits until *progress, which another
 * thread raises by pl_tell, is at least `least`. Pieces of one queue start in order, so that no two
 * wait for each other. */
void pl_wait_for(const int32_t *progress, int32_t least);
void pl_tell(int32_t *progress, int32_t value);
int pl_num_threads(void);
void pl_set_num_threads(int n);
/* Called around a kernel call: pl_num_threads() stays the same for this thread, even if another
 * thread sets it. */
void pl_enter_call(void);
void pl_leave_call(void);
/* How often this thread's latest call ran pieces on several threads, and the most pieces of such a
 * run. */
typedef struct {
    int64_t meetings, most;
} pl_pieces;
pl_pieces pl_latest_pieces(void);

/* core/os_*.c. A time that only grows, for differences. */
int64_t pl_nanoseconds(void);

/* core/buffers.c. 64-byte aligned memory. Released buffers are kept for reuse, so that training
 * steps touch the same pages. pl_acquire returns NULL if there is no memory. */
void *pl_acquire(size_t bytes);
void pl_release(void *buffer);
typedef struct {
    size_t in_use, cached, peak;
} pl_buffer_stats;
void pl_buffers_stats(pl_buffer_stats *out);
/* Returns all cached buffers to the system. */
void pl_buffers_trim(void);

#endif
