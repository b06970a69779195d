/* OpenCL at run time: the library, devices, their memory, compiled programs.
 *
 * Nothing here knows Python. A function that can fail fills a pl_cl_error and returns nonzero, or
 * NULL. All functions may be called from any thread, without the GIL, except where a lock is named.
 */
#ifndef PYLOSS_CL_RUNTIME_H
#define PYLOSS_CL_RUNTIME_H

#include <stddef.h>
#include <stdint.h>

#include "../core/os.h"
#include "cl.h"

typedef struct {
    enum { PL_CL_FAILED = 1, PL_CL_NO_MEMORY, PL_CL_FORKED, PL_CL_UNSUPPORTED } kind;
    char text[512]; /* without the device's name, which the binding adds */
    char *log;      /* of a failed build, malloc'd; NULL otherwise */
} pl_cl_error;

typedef struct pl_cl_program pl_cl_program;
typedef struct pl_cl_buffer pl_cl_buffer;

/* A device as it was listed when the library was opened. */
typedef struct {
    cl_platform_id platform;
    cl_device_id id;
    char name[128], platform_name[128], vendor[96], driver[96], version[160], platform_version[160];
    cl_bitfield kind; /* CL_DEVICE_TYPE_* */
    cl_ulong global_memory, max_allocation, local_memory;
    size_t max_group;
    cl_uint units;
    cl_uint vector;   /* floats of a vector register */
    int fp64, usable; /* usable: available, with a compiler */
    int remarks;      /* the compiler reports registers under NVIDIA's option -cl-nv-verbose */
} pl_cl_info;

/* An opened device: one context and one in-order queue, made by pyloss or by another library
 * (pyopencl). Each context and queue is a device of its own. */
typedef struct pl_cl_device {
    const pl_cl_info *info;
    int index; /* of info */
    cl_context context;
    cl_command_queue queue;
    int own;      /* pyloss made the context */
    int wait;     /* the queue may be out of order: every call waits before and after */
    int profiled; /* the queue keeps the times of commands */
    cl_ulong profiled_begin, profiled_end; /* of the commands that profile.c has read */
    struct pl_cl_device *next;
    pl_mutex launch;         /* held from the first clSetKernelArg to the enqueue */
    pl_cl_program *programs; /* guarded by `launch` */
    pl_mutex memory;         /* guards the members below */
    pl_cl_buffer *idle;      /* released buffers, the latest first */
    pl_cl_buffer *adopted;   /* buffers in use over other libraries' memory */
    size_t idle_bytes, used_bytes, peak_bytes;
} pl_cl_device;

/* Device memory, reference-counted. */
struct pl_cl_buffer {
    pl_cl_device *device;
    cl_mem memory;
    size_t bytes;
    uint64_t address; /* a virtual address, used for overlap checks */
    int references;
    int foreign;     /* another library's memory */
    unsigned writes; /* counts kernels and copies that wrote to it */
    pl_cl_buffer *next;
};

/* ---- library.c */

/* Loads libOpenCL (or PYLOSS_OPENCL_LIBRARY) and lists its devices, once. Without a library or a
 * device the count is 0 and *reason says why. Fails only after fork. */
int pl_cl_open(int *count, const char **reason, pl_cl_error *error);
const pl_cl_info *pl_cl_info_at(int index);
/* Whether this process was forked from one that had opened the library. It must not use the
 * library. */
int pl_cl_forked(void);
const char *pl_cl_error_name(cl_int code);
/* Fills `error` for an `operation` that returned `code`; always 1. */
int pl_cl_fail(pl_cl_error *error, const char *operation, cl_int code);
/* Fills `error`; always 1. */
int pl_cl_refuse(pl_cl_error *error, int kind, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* ---- device.c */

/* The device in pyloss's own context, which the first call makes. */
pl_cl_device *pl_cl_device_at(int index, pl_cl_error *error);
/* The device in another library's context and queue. */
pl_cl_device *pl_cl_device_of(cl_context context, cl_command_queue queue, pl_cl_error *error);
/* The first of all opened devices. */
pl_cl_device *pl_cl_opened(void);
/* Waits until the queue is empty. */
int pl_cl_finish(pl_cl_device *device, pl_cl_error *error);

pl_cl_buffer *pl_cl_buffer_new(pl_cl_device *device, size_t bytes, pl_cl_error *error);
/* The buffer over another library's memory, which it keeps alive; one per memory object. */
pl_cl_buffer *pl_cl_buffer_of(pl_cl_device *device, cl_mem memory, size_t bytes,
                              pl_cl_error *error);
void pl_cl_buffer_release(pl_cl_buffer *buffer);
int pl_cl_write(pl_cl_buffer *to, size_t offset, const void *from, size_t bytes,
                pl_cl_error *error);
int pl_cl_read(const pl_cl_buffer *from, size_t offset, void *to, size_t bytes, pl_cl_error *error);
/* Copies bytes within a device. Both buffers are in its context; the bytes do not overlap. */
int pl_cl_copy(const pl_cl_buffer *from, size_t from_offset, pl_cl_buffer *to, size_t to_offset,
               size_t bytes, pl_cl_error *error);
/* Sets bytes to 0. */
int pl_cl_clear(pl_cl_buffer *to, size_t offset, size_t bytes, pl_cl_error *error);
/* Returns a device's idle buffers to its driver. */
void pl_cl_free_idle(pl_cl_device *device);
/* Returns the idle buffers of all devices. */
void pl_cl_trim(void);

/* ---- cache.c: compiled programs on disk. The caller holds device->launch. */

/* The binary stored under a name, malloc'd; NULL if there is none that can be trusted. */
unsigned char *pl_cl_cache_read(const char *name, size_t *size);
void pl_cl_cache_write(const char *name, const unsigned char *binary, size_t size);
/* Why the cache cannot be used; NULL if it can, or if an earlier call has returned the reason. */
const char *pl_cl_cache_complaint(void);
uint64_t pl_cl_hash(uint64_t hash, const void *data, size_t bytes);

/* ---- program.c */

/* All programs, as csrc/generate.py writes them; the last one has no name. */
typedef struct {
    const char *name, *source;
} pl_cl_named_source;
extern const pl_cl_named_source pl_cl_programs[];

/* The kernel `name` of the program built from `source`, a constant, with build `options`. The
 * program comes from memory, from the cache on disk, or from the compiler. The caller holds
 * device->launch as long as it uses the kernel. `*group` is the kernel's largest work-group. */
cl_kernel pl_cl_kernel(pl_cl_device *device, const char *name, const char *source,
                       const char *options, size_t *group, pl_cl_error *error);

#endif
