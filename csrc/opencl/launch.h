/* Launches: turn an operation whose arrays are on a device into enqueued kernels. */
#ifndef PYLOSS_CL_LAUNCH_H
#define PYLOSS_CL_LAUNCH_H

#include "../pyloss.h"
#include "runtime.h"

/* ---- launch.c: the shape of kernels */

typedef struct {
    int group; /* work-items of a work-group */
    int width; /* elements of a vector */
    int block; /* vectors that a work-item takes at a time */
} pl_cl_shape;
/* Overrides the launchers' choice where it is not 0; for tests and benchmarks. */
extern pl_cl_shape pl_cl_forced_shape;
/* Makes every device one without float64 arithmetic; for tests. */
extern int pl_cl_without_fp64;
/* Whether kernels may compute in float64. */
int pl_cl_fp64(const pl_cl_device *device);
/* Whether the device is a processor: a core runs one work-item with whole vector registers. */
int pl_cl_is_cpu(const pl_cl_device *device);

/* ---- launch.c: operations */

/* Where an array begins. */
typedef struct {
    pl_cl_buffer *buffer; /* NULL: the argument is absent */
    size_t offset;        /* bytes */
} pl_cl_place;

/* A checked operation of ops.def whose arrays are on a device. The call holds scalars, shapes, and
 * the values of index arrays on the host. A weight's pointers are virtual addresses: pl_cl_place_of
 * finds their places. */
typedef struct {
    const char *name;
    pl_cl_device *device;
    const pl_call *call;
    pl_cl_place place[PL_MAX_ARGS];
    pl_cl_buffer **weight_buffers; /* the buffers that weights use, each once */
    int weight_buffer_count;
    pl_cl_error *error;
} pl_cl_operation;

/* Runs operation PL_OP_...: calls its launcher. */
int pl_cl_run(int op, const pl_cl_operation *operation);
/* The place of a virtual address. */
pl_cl_place pl_cl_place_of(const pl_cl_operation *operation, const void *address);
/* Device memory for the launcher, which must release it; without a buffer if that fails. */
pl_cl_place pl_cl_scratch(const pl_cl_operation *operation, size_t bytes);

/* The launcher of each operation, in launchers/. A launcher reads arguments by name, from the
 * generated args.h and places.h: scalars and values of index arrays from <operation>_args, places
 * of arrays from <operation>_places. Launchers are hidden, so that the linker reports a missing
 * one. */
#define PL_OP(name, spec) \
    __attribute__((visibility("hidden"))) int pl_cl_launch_##name(const pl_cl_operation *operation);
#include "../ops.def"

/* ---- launch.c: one launch */

/* A kernel's build options, and its arguments in their order. */
typedef struct {
    const pl_cl_operation *operation;
    const char *source;
    char options[512];
    int options_length, count;
    int misaligned; /* an array does not begin at a multiple of its element's size */
    struct {
        size_t size;
        union {
            cl_mem memory;
            int64_t i64;
            double f64;
            float f32;
        } value;
    } argument[64];
} pl_cl_launch;

/* A launch with the options that types.cl needs; `wide`: it computes in float64. */
pl_cl_launch pl_cl_begin(const pl_cl_operation *operation, const char *source, pl_cl_shape shape,
                         int wide);
void pl_cl_define(pl_cl_launch *l, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* Adds a buffer, and the offset in it in items of `item` bytes. */
void pl_cl_add_place(pl_cl_launch *l, pl_cl_place place, size_t item);
/* Adds several places of one item size, in their order. */
void pl_cl_add_each(pl_cl_launch *l, size_t item, size_t count, const pl_cl_place *places);
#define pl_cl_add_places(l, item, ...) \
    pl_cl_add_each(l, item, sizeof((pl_cl_place[]){__VA_ARGS__}) / sizeof(pl_cl_place), \
                   (pl_cl_place[]){__VA_ARGS__})
/* Requires that a place is a multiple of `item` bytes. */
void pl_cl_align(pl_cl_launch *l, pl_cl_place place, size_t item);
void pl_cl_add_i64(pl_cl_launch *l, int64_t value);
void pl_cl_add_f32(pl_cl_launch *l, double value);
/* Adds a SCALAR of types.cl: a double where the device has them, else a float. */
void pl_cl_add_scalar(pl_cl_launch *l, double value);

/* Enqueues a kernel over `groups` work-groups of `group` work-items. A group larger than the kernel
 * allows fails and sets *too_large, unless that is NULL. */
int pl_cl_enqueue(pl_cl_launch *l, const char *kernel, size_t groups, size_t group, int *too_large);

/* ---- launchers/: functions that several families of launchers use */

/* Sets n floats to 0. */
int pl_cl_zero(const pl_cl_operation *operation, pl_cl_place to, int64_t n);

/* Adds a weight as quant.cl takes it: the options of its format, and its arguments. Its codes are
 * at `codes`. */
void pl_cl_add_weight(pl_cl_launch *l, const pl_weight *w, pl_cl_place codes);

/* C (+)= bias + b_scale A B + branch_scale H U, as in kernels/matmul/. The low-rank branch H U has
 * H [m, rank] and U [rank, n], float32; rank 0: there is none. */
typedef struct {
    int64_t m, n, k;
    pl_cl_place a;
    int64_t a_row_step, a_k_step; /* elements from one row of A to the next, and along k */
    pl_weight b;                  /* [k, n], or [n, k] if b_transposed */
    pl_cl_place b_codes;
    int b_transposed;
    pl_cl_place b_row_factors, bias, c;
    double b_scale;
    int accumulate;
    int64_t rank;
    pl_cl_place branch_h, branch_u;
    int branch_u_transposed; /* U is [n, rank] */
    double branch_scale;
} pl_cl_gemm;
int pl_cl_gemm_run(const pl_cl_operation *operation, const pl_cl_gemm *g);

/* The texts of the .cl files in programs/ with their includes in place, as csrc/generate.py writes
 * them. */
extern const char pl_cl_source_elements[], pl_cl_source_maps[], pl_cl_source_axes[],
    pl_cl_source_layers[], pl_cl_source_delta[], pl_cl_source_matmul[], pl_cl_source_stored[],
    pl_cl_source_attention[], pl_cl_source_rowloss_class[], pl_cl_source_rowloss_pair[],
    pl_cl_source_rowloss_cosine[], pl_cl_source_rowloss_sparse[], pl_cl_source_rowloss_element[],
    pl_cl_source_rowloss_map[], pl_cl_source_rowloss_argmax[];

#endif
