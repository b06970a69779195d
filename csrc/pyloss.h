/* The C contract of pyloss: argument values, weight formats, the kernel table, and what the core
 * offers to kernels.
 *
 * A kernel is `pl_status name(const pl_call *call)`. Its arguments were checked against the
 * specification in ops.def before the call (type, rank, matching dimensions, index ranges,
 * overlap), so a kernel trusts them; it never touches Python, and it may fail only for want of
 * memory. Results do not depend on the number of threads. */
#ifndef PYLOSS_H
#define PYLOSS_H

#include <stddef.h>
#include <stdint.h>

typedef enum { PL_OK = 0, PL_NO_MEMORY = 1 } pl_status;

/* How a stored matrix is laid out: the lines of formats.def, by number. */
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
/* Whether the scales lie beside the codes. */
static inline int pl_has_groups(int format) {
    return pl_formats[format].kind == PL_KIND_AFFINE || pl_has_table(format);
}
/* Bits of a code, where codes are alone in their block. */
static inline int pl_code_bits(int format) {
    return 8 * pl_formats[format].bytes / pl_formats[format].elements;
}

/* The scales beside the codes of a matrix. Every `size` elements, counted through all rows from
 * `first` on, share one scale (and one offset): `size` is a power of two and at least 32,
 * `first` a multiple of 32. The arrays may lie at any address. */
typedef struct {
    int64_t size, first;
    const uint8_t *scales,
        *offsets;         /* affine: w = scale code + offset; by table: w = scale table[code] */
    int scale_format;     /* of floats; meaningless with a map */
    const uint8_t *table; /* 16 floats, or NULL */
    /* By table, scales that are themselves quantized: scale i is map[scales[i]] nested[i /
     * nested_size] + nested_offset. */
    const uint8_t *map, *nested; /* 256 floats, and floats; NULL without */
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

/* Which row of the stored matrix holds row `row`. */
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

/* Element types of arrays that are read and written as they are. */
typedef enum { PL_F32, PL_F64, PL_F16, PL_BF16 } pl_float;

/* Rows of floats, contiguous within a row. Row i begins at data + (i / inner) * outer_stride +
 * (i % inner) * inner_stride, in bytes: every slice along the leading axes of an array of at
 * most three dimensions is one. */
typedef struct {
    char *data; /* NULL for an optional argument that is absent */
    int64_t inner, outer_stride, inner_stride;
    pl_float type;
} pl_rows;

static inline char *pl_row(const pl_rows *r, int64_t i) {
    return r->data + i / r->inner * r->outer_stride + i % r->inner * r->inner_stride;
}

enum { PL_MAX_ARGS = 20, PL_MAX_OPTIONS = 4 /* of a loss */ };

typedef union {
    const void *in;
    void *out;
    int64_t i;
    double f;
    pl_weight w;
    const pl_weight *stack; /* as many as its first dimension; of one format, shape and row order */
    pl_rows rows;
} pl_value;

/* One call: arguments in the order of the specification, and the dimensions its letters were
 * bound to. */
typedef struct {
    pl_value arg[PL_MAX_ARGS];
    int count; /* of arguments */
    int wide;  /* a `float` argument is float64: arithmetic and `acc` arguments are too */
    int64_t dim[26];
    void *indices; /* what index arrays hold, the call's own copy */
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
    pl_kernel kernel[PL_OP_COUNT];
} pl_table;

extern const pl_table pl_table_baseline;
#ifdef PL_X86
extern const pl_table pl_table_avx2;
extern const pl_table pl_table_avx512;
#endif

/* core/cpu.c: the tables this processor and operating system can run, best last; NULL past the
 * end. */
const pl_table *pl_table_at(int index);
/* Processors this process may use: affinity and cgroup quota. */
int pl_cpu_count(void);
/* Whether the processor has the dot products of bfloat16 pairs that come with AVX-512
 * (avx512_bf16). */
int pl_has_bf16_dots(void);

/* core/precision.c: how dense layers multiply, for the whole process. With PL_BFLOAT16 their
 * inputs and weights are rounded to bfloat16 and the products summed in float32;
 * PL_BFLOAT16_EMULATED never uses the instructions made for that. */
typedef enum { PL_FLOAT32, PL_BFLOAT16, PL_BFLOAT16_EMULATED } pl_precision;
extern const char *const pl_precision_names[]; /* NULL past the end */
pl_precision pl_matmul_precision(void);
void pl_set_matmul_precision(pl_precision precision);

/* core/threads.c. Runs fn over [0, n) in pieces of at most grain items, on any thread, in any
 * order; `worker` is below pl_num_threads() and no two pieces run on one worker at once. Runs
 * inline when nested, when n <= grain, or when another thread is using the pool. */
typedef void (*pl_range_fn)(const void *context, int64_t begin, int64_t end, int worker);
void pl_parallel(int64_t n, int64_t grain, pl_range_fn fn, const void *context);
int pl_num_threads(void);
void pl_set_num_threads(int n);
/* Around a kernel call: keeps pl_num_threads() the same for this thread, whatever another one
 * sets meanwhile. */
void pl_enter_call(void);
void pl_leave_call(void);

/* core/buffers.c. 64-byte aligned memory that is kept for reuse when released, so that a
 * training step touches the same pages again. NULL when there is no memory. */
void *pl_acquire(size_t bytes);
void pl_release(void *buffer);
typedef struct {
    size_t in_use, cached, peak;
} pl_buffer_stats;
void pl_buffers_stats(pl_buffer_stats *out);
/* Gives all cached buffers back to the system. */
void pl_buffers_trim(void);

#endif
