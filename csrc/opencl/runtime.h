/* What csrc/opencl offers to the binding and to its own kernels' launchers: the library, devices, buffers, programs.
 *
 * Nothing here knows Python. A function that can fail fills a pl_cl_error and returns nonzero (or NULL). All functions may be
 * called from any thread, without the GIL.
 */
#ifndef PYLOSS_CL_RUNTIME_H
#define PYLOSS_CL_RUNTIME_H

#include <pthread.h>

#include "../pyloss.h"
#include "cl.h"

/* What went wrong: text without the device's name, which the binding adds. */
typedef struct {
    enum { PL_CL_FAILED = 1, PL_CL_NO_MEMORY, PL_CL_FORKED, PL_CL_UNSUPPORTED } kind;
    char text[512];
    char *log; /* of a failed build, malloc'd; NULL otherwise */
} pl_cl_error;

typedef struct pl_cl_program pl_cl_program;
typedef struct pl_cl_buffer pl_cl_buffer;

/* A device as it was found when the library was opened. */
typedef struct {
    cl_platform_id platform;
    cl_device_id id;
    char name[128], platform_name[128], vendor[96], driver[96], version[160], platform_version[160];
    cl_bitfield kind; /* CL_DEVICE_TYPE_* */
    cl_ulong global_memory, max_allocation, local_memory;
    size_t max_group;
    cl_uint units, vector; /* vector: floats of the registers */
    int fp64, usable;      /* usable: available, with a compiler */
} pl_cl_info;

/* An opened device: one context and one in-order queue. Contexts of other libraries (pyopencl) are opened too, beside ours. */
typedef struct pl_cl_device {
    const pl_cl_info *info;
    int index; /* of info */
    cl_context context;
    cl_command_queue queue;
    int own; /* the context is ours, not pyopencl's */
    int wait; /* the queue's owner may run commands out of order: every call begins and ends with a wait */
    struct pl_cl_device *next;
    pthread_mutex_t launch;  /* held from the first clSetKernelArg to the enqueue */
    pl_cl_program *programs; /* under it */
    pthread_mutex_t memory;  /* for what follows */
    pl_cl_buffer *idle;      /* released buffers, the latest first */
    pl_cl_buffer *adopted;   /* over other libraries' memory, in use */
    size_t idle_bytes, used_bytes, peak_bytes;
} pl_cl_device;

/* Device memory, reference-counted; `address` is a number range that no other buffer has, for the check of overlaps. */
struct pl_cl_buffer {
    pl_cl_device *device;
    cl_mem memory;
    size_t bytes;
    uint64_t address;
    int references, foreign;
    unsigned writes; /* by kernels: what was copied to the host before is no longer the same */
    pl_cl_buffer *next;
};

/* ---- library.c */

/* Loads libOpenCL (or PYLOSS_OPENCL_LIBRARY) and lists its devices, once. A machine without either is no error: the count is
 * 0 and *reason says why. Fails only after fork. */
int pl_cl_open(int *count, const char **reason, pl_cl_error *error);
const pl_cl_info *pl_cl_info_at(int index);
/* Whether this process is the child of one that had opened the library: nothing of it may be touched. */
int pl_cl_forked(void);
const char *pl_cl_error_name(cl_int code);
/* Fills `error` for `operation` that returned `code`; always 1. */
int pl_cl_fail(pl_cl_error *error, const char *operation, cl_int code);
int pl_cl_refuse(pl_cl_error *error, int kind, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* ---- device.c */

/* The device in a context of ours; made at the first call. */
pl_cl_device *pl_cl_device_at(int index, pl_cl_error *error);
/* The same for a context and queue that another library made; `queue` may be NULL. */
pl_cl_device *pl_cl_device_of(cl_context context, cl_command_queue queue, pl_cl_error *error);
int pl_cl_finish(pl_cl_device *device, pl_cl_error *error);

pl_cl_buffer *pl_cl_buffer_new(pl_cl_device *device, size_t bytes, pl_cl_error *error);
/* Over another library's memory, which is kept alive; the same one for the same memory. */
pl_cl_buffer *pl_cl_buffer_of(pl_cl_device *device, cl_mem memory, size_t bytes,
                              pl_cl_error *error);
void pl_cl_buffer_release(pl_cl_buffer *buffer);
int pl_cl_write(pl_cl_buffer *to, size_t offset, const void *from, size_t bytes,
                pl_cl_error *error);
int pl_cl_read(const pl_cl_buffer *from, size_t offset, void *to, size_t bytes, pl_cl_error *error);
/* Zeros to so many bytes. */
int pl_cl_clear(pl_cl_buffer *to, size_t offset, size_t bytes, pl_cl_error *error);
/* Gives a device's kept buffers back. */
void pl_cl_free_idle(pl_cl_device *device);
/* The same for all devices. */
void pl_cl_trim(void);

/* ---- cache.c: compiled programs on disk. One thread at a time: device->launch is held. */

/* The binary kept under a name, malloc'd; NULL where there is none, or none that can be trusted. */
unsigned char *pl_cl_cache_read(const char *name, size_t *size);
void pl_cl_cache_write(const char *name, const unsigned char *binary, size_t size);
/* Why the cache cannot be used, once; NULL if it can, or if that has been said. */
const char *pl_cl_cache_complaint(void);
uint64_t pl_cl_hash(uint64_t h, const void *data, size_t bytes);

/* ---- program.c */

/* The kernel `name` of the program made of `source`, a constant, with build `options`: from memory, from the cache on disk, or
 * compiled. device->launch must be held: the kernel is for the holder alone. `*group` is its largest work-group. */
cl_kernel pl_cl_kernel(pl_cl_device *device, const char *name, const char *source,
                       const char *options, size_t *group, pl_cl_error *error);

/* ---- launch.c */

/* How row kernels are shaped: work-items of a group (0: by the row's length), elements of a vector, vectors at a time. */
typedef struct {
    int group, width, block;
} pl_cl_shape;
/* Overrides the choice by the kind of device, for tests and benchmarks; zeros leave it. */
extern pl_cl_shape pl_cl_forced_shape;
/* Whether kernels may compute in float64; tests pretend with pl_cl_without_fp64 that no device can. */
extern int pl_cl_without_fp64;
int pl_cl_fp64(const pl_cl_device *device);
/* Whether a core is one work-item with whole vector registers, and not a lane of many. */
int pl_cl_is_cpu(const pl_cl_device *device);

/* Where an array argument lies; no buffer where it is absent. */
typedef struct {
    pl_cl_buffer *buffer;
    size_t offset;
} pl_cl_place;

/* An operation of ops.def whose arguments, checked, live on a device. Index arrays have their values on the host, in `call`, too;
 * what a weight points to are numbers that stand for places, see pl_cl_place_of. */
typedef struct {
    pl_cl_device *device;
    const pl_call *call;
    pl_cl_place place[PL_MAX_ARGS];
    pl_cl_buffer **weight_buffers; /* of the arrays of weights, each once */
    int weight_buffer_count;
    pl_cl_error *error;
} pl_cl_operation;

/* The place that an address inside a weight stands for. */
pl_cl_place pl_cl_place_of(const pl_cl_operation *operation, const void *address);

/* One launch as it is put together: build options, and arguments in their order. */
typedef struct {
    const pl_cl_operation *operation;
    const char *source;
    char options[512];
    int used, count,
        misaligned; /* misaligned: an array that does not begin at one of its elements */
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

/* Begins with the options that types.cl needs. */
pl_cl_launch pl_cl_begin(const pl_cl_operation *operation, const char *source, pl_cl_shape shape,
                         int wide);
void pl_cl_define(pl_cl_launch *l, const char *format, ...) __attribute__((format(printf, 2, 3)));
void pl_cl_add_place(pl_cl_launch *l, pl_cl_place place,
                     size_t item); /* a buffer, and the offset in it in items */
/* The same for several, in their order. */
void pl_cl_add_each(pl_cl_launch *l, size_t item, size_t count, const pl_cl_place *places);
#define pl_cl_add_places(l, item, ...) \
    pl_cl_add_each(l, item, sizeof((pl_cl_place[]){__VA_ARGS__}) / sizeof(pl_cl_place), \
                   (pl_cl_place[]){__VA_ARGS__})
/* Notes that what lies there is read as elements of so many bytes. */
void pl_cl_align(pl_cl_launch *l, pl_cl_place place, size_t item);
void pl_cl_add_i64(pl_cl_launch *l, int64_t value);
void pl_cl_add_f32(pl_cl_launch *l, double value);
void pl_cl_add_scalar(pl_cl_launch *l, double value); /* in the device's most exact type */

/* Enqueues a kernel over `groups` work-groups of `group` work-items. A group that is too large for the kernel is refused with
 * *too_large set, if that is not NULL. */
int pl_cl_enqueue(pl_cl_launch *l, const char *kernel, size_t groups, size_t group, int *too_large);
/* Device memory for the time of an operation: no buffer where it fails. */
pl_cl_place pl_cl_scratch(const pl_cl_operation *operation, size_t bytes);

/* Runs the operation of this number (PL_OP_...). */
int pl_cl_run(int op, const pl_cl_operation *operation);

/* The launcher of each operation, in the file of its family: rowloss.c, elements.c, layers.c,
 * matmul.c, norms.c, attention.c. Launchers read arguments by name, from args.h and places.h, which
 * csrc/generate.py writes: scalars and the values of index arrays from <operation>_args, the places
 * of arrays from <operation>_places. They are hidden, so that the linker reports a missing one. */
#define PL_OP(name, spec) \
    __attribute__((visibility("hidden"))) int pl_cl_launch_##name(const pl_cl_operation *operation);
#include "../ops.def"

/* Zeros to n floats. */
int pl_cl_zero(const pl_cl_operation *operation, pl_cl_place to, int64_t n);

/* A weight as quant.cl takes it: the build options of its format, and its arguments, the codes being at `data`. */
void pl_cl_add_weight(pl_cl_launch *l, const pl_weight *w, pl_cl_place data);

/* C (+)= bias + A B + u_scale H U, as in kernels/matmul/; rank 0 leaves the last out. */
typedef struct {
    int64_t m, n, k;
    pl_cl_place a;
    int64_t a_row, a_k; /* the distances of A's elements along m and along k */
    pl_weight b;        /* [k, n], or [n, k] when b_transposed */
    pl_cl_place b_data; /* in place of b.data where B is no weight of the call */
    int b_transposed;
    pl_cl_place b_rows, bias, c;
    double b_scale;
    int accumulate;
    int64_t rank;
    pl_cl_place h, u; /* float32 [m, rank], and [rank, n] or [n, rank] when u_transposed */
    int u_transposed;
    double u_scale;
} pl_cl_gemm;
int pl_cl_gemm_run(const pl_cl_operation *operation, const pl_cl_gemm *g);

/* The texts of the .cl files with what they include, written by setup.py. */
extern const char pl_cl_source_rowloss[], pl_cl_source_elements[], pl_cl_source_layers[],
    pl_cl_source_matmul[], pl_cl_source_stored[], pl_cl_source_attention[];

#endif
