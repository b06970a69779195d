/* Operations on devices: calls launchers, builds up their launches, enqueues kernels. */
#include "launch.h"
#include "profile.h"

#include <stdarg.h>
#include <stdio.h>

pl_cl_shape pl_cl_forced_shape;
int pl_cl_without_fp64;

int pl_cl_fp64(const pl_cl_device *device) { return device->info->fp64 && !pl_cl_without_fp64; }

int pl_cl_is_cpu(const pl_cl_device *device) {
    return (device->info->kind & CL_DEVICE_TYPE_CPU) != 0;
}

pl_cl_place pl_cl_place_of(const pl_cl_operation *operation, const void *address) {
    uint64_t at = (uint64_t)(uintptr_t)address;
    for (int i = 0; i < operation->weight_buffer_count; i++) {
        pl_cl_buffer *buffer = operation->weight_buffers[i];
        if (at >= buffer->address && at <= buffer->address + buffer->bytes)
            return (pl_cl_place){buffer, (size_t)(at - buffer->address)};
    }
    return (pl_cl_place){NULL, 0};
}

/* ---- building up a launch */

void pl_cl_define(pl_cl_launch *l, const char *format, ...) {
    va_list given;
    va_start(given, format);
    l->options_length += vsnprintf(l->options + l->options_length,
                                   sizeof l->options - (size_t)l->options_length, format, given);
    va_end(given);
}

pl_cl_launch pl_cl_begin(const pl_cl_operation *operation, const char *source, pl_cl_shape shape,
                         int wide) {
    pl_cl_launch l = {.operation = operation, .source = source};
    pl_cl_define(&l, "-DWIDTH=%d -DBLOCK=%d -DGROUP=%d ", shape.width, shape.block, shape.group);
    pl_cl_define(&l, wide ? "-DREAL=double -DREAL_F64 " : "-DREAL=float ");
    if (pl_cl_fp64(operation->device)) pl_cl_define(&l, "-DFP64 ");
    if (pl_cl_is_cpu(operation->device) && !wide) pl_cl_define(&l, "-DPOLYNOMIALS ");
    return l;
}

void pl_cl_add_place(pl_cl_launch *l, pl_cl_place place, size_t item) {
    l->argument[l->count].size = sizeof(cl_mem);
    l->argument[l->count++].value.memory = place.buffer ? place.buffer->memory : NULL;
    pl_cl_add_i64(l, (int64_t)(place.offset / item));
    pl_cl_align(l, place, item);
}

void pl_cl_align(pl_cl_launch *l, pl_cl_place place, size_t item) {
    if (place.buffer && place.offset % item) l->misaligned = 1;
}

void pl_cl_add_each(pl_cl_launch *l, size_t item, size_t count, const pl_cl_place *places) {
    for (size_t i = 0; i < count; i++) pl_cl_add_place(l, places[i], item);
}

void pl_cl_add_i64(pl_cl_launch *l, int64_t value) {
    l->argument[l->count].size = sizeof value;
    l->argument[l->count++].value.i64 = value;
}

void pl_cl_add_f32(pl_cl_launch *l, double value) {
    l->argument[l->count].size = sizeof(float);
    l->argument[l->count++].value.f32 = (float)value;
}

void pl_cl_add_scalar(pl_cl_launch *l, double value) {
    if (!pl_cl_fp64(l->operation->device)) {
        pl_cl_add_f32(l, value);
        return;
    }
    l->argument[l->count].size = sizeof(double);
    l->argument[l->count++].value.f64 = value;
}

pl_cl_place pl_cl_scratch(const pl_cl_operation *operation, size_t bytes) {
    return (pl_cl_place){pl_cl_buffer_new(operation->device, bytes, operation->error), 0};
}

/* ---- enqueueing */

static cl_int enqueue(pl_cl_device *device, cl_kernel kernel, const char *name,
                      const pl_cl_launch *l, size_t groups, size_t group) {
    cl_int code = 0;
    for (int i = 0; i < l->count && !code; i++)
        code = pl_cl.SetKernelArg(kernel, (cl_uint)i, l->argument[i].size, &l->argument[i].value);
    size_t all = groups * group;
    if (code) return code;
    cl_event event;
    code = pl_cl.EnqueueNDRangeKernel(device->queue, kernel, 1, NULL, &all, &group, 0, NULL,
                                      pl_cl_profile_room(device, &event));
    pl_cl_profile_command(device, event, l->operation->name, name, 0);
    return code;
}

int pl_cl_enqueue(pl_cl_launch *l, const char *name, size_t groups, size_t group, int *too_large) {
    pl_cl_device *device = l->operation->device;
    pl_cl_error *error = l->operation->error;
    int failed = 0;
    size_t largest;
    if (!groups) return 0;
    if (l->misaligned)
        return pl_cl_refuse(error, PL_CL_UNSUPPORTED,
                            "an array does not begin at a multiple of its element's size; copy it");
    /* The owner of an out-of-order queue may have enqueued kernels that still write the
     * arguments. */
    if (device->wait && pl_cl_finish(device, error)) return 1;
    pl_lock(&device->launch);
    cl_kernel kernel = pl_cl_kernel(device, name, l->source, l->options, &largest, error);
    if (!kernel) {
        failed = 1;
    } else if (too_large && (*too_large = group > largest)) {
        failed = 1;
    } else {
        cl_int code = enqueue(device, kernel, name, l, groups, group);
        /* Some drivers allocate memory only here: idle buffers may make room. */
        if ((code == CL_MEM_OBJECT_ALLOCATION_FAILURE || code == CL_OUT_OF_RESOURCES) &&
            device->idle) {
            pl_cl_free_idle(device);
            code = enqueue(device, kernel, name, l, groups, group);
        }
        if (!code) code = pl_cl.Flush(device->queue);
        if (code) failed = pl_cl_fail(error, "clEnqueueNDRangeKernel", code);
    }
    pl_unlock(&device->launch);
    return failed || (device->wait && pl_cl_finish(device, error));
}

/* ---- operations */

int pl_cl_run(int op, const pl_cl_operation *operation) {
    static int (*const launchers[PL_OP_COUNT])(const pl_cl_operation *) = {
#define PL_OP(name, spec) [PL_OP_##name] = pl_cl_launch_##name,
#include "../ops.def"
    };
    if (operation->call->wide && !pl_cl_fp64(operation->device))
        return pl_cl_refuse(operation->error, PL_CL_UNSUPPORTED,
                            "the device has no float64 arithmetic; use float32 arrays or the cpu");
    return launchers[op](operation);
}
