/* Enqueues kernels, and finds the launcher of an operation. */
#include "runtime.h"

#include <string.h>

pl_cl_shape pl_cl_forced_shape;

void pl_cl_add_buffer(pl_cl_arguments *to, const pl_cl_buffer *buffer, size_t offset, size_t item) {
    to->argument[to->count].size = sizeof(cl_mem);
    to->argument[to->count++].value.memory = buffer ? buffer->memory : NULL;
    pl_cl_add_i64(to, (int64_t)(offset / item));
}

void pl_cl_add_i64(pl_cl_arguments *to, int64_t value) {
    to->argument[to->count].size = sizeof value;
    to->argument[to->count++].value.i64 = value;
}

void pl_cl_add_scalar(pl_cl_arguments *to, const pl_cl_device *device, double value) {
    to->argument[to->count].size = device->info->fp64 ? sizeof(double) : sizeof(float);
    if (device->info->fp64) to->argument[to->count++].value.f64 = value;
    else to->argument[to->count++].value.f32 = (float)value;
}

static cl_int enqueue(pl_cl_device *device, cl_kernel kernel, const pl_cl_arguments *arguments, size_t groups, size_t group) {
    cl_int code = 0;
    for (int i = 0; i < arguments->count && !code; i++)
        code = pl_cl.SetKernelArg(kernel, (cl_uint)i, arguments->argument[i].size, &arguments->argument[i].value);
    size_t all = groups * group;
    if (!code) code = pl_cl.EnqueueNDRangeKernel(device->queue, kernel, 1, NULL, &all, &group, 0, NULL, NULL);
    return code;
}

int pl_cl_launch(pl_cl_device *device, const char *name, const char *source, const char *options,
                 const pl_cl_arguments *arguments, size_t groups, size_t group, int *too_large, pl_cl_error *error) {
    int failed = 0;
    size_t largest;
    /* What the owner of an out-of-order queue has put there may still be writing the arguments. */
    if (device->wait && pl_cl_finish(device, error)) return 1;
    pthread_mutex_lock(&device->launch);
    cl_kernel kernel = pl_cl_kernel(device, name, source, options, &largest, error);
    if (!kernel) {
        failed = 1;
    } else if (too_large && (*too_large = group > largest)) {
        failed = 1;
    } else {
        cl_int code = enqueue(device, kernel, arguments, groups, group);
        /* Drivers that allocate late find here that memory is short: the kept buffers may help. */
        if ((code == CL_MEM_OBJECT_ALLOCATION_FAILURE || code == CL_OUT_OF_RESOURCES) && device->idle) {
            pl_cl_free_idle(device);
            code = enqueue(device, kernel, arguments, groups, group);
        }
        if (!code) code = pl_cl.Flush(device->queue);
        if (code) failed = pl_cl_fail(error, "clEnqueueNDRangeKernel", code);
    }
    pthread_mutex_unlock(&device->launch);
    return failed || (device->wait && pl_cl_finish(device, error));
}

int pl_cl_run(pl_cl_device *device, const char *name, const pl_call *call, const pl_cl_place *place, pl_cl_error *error) {
    if (call->wide && !device->info->fp64)
        return pl_cl_refuse(error, PL_CL_UNSUPPORTED, "the device has no float64 arithmetic; use float32 arrays or the cpu");
    int failed = pl_cl_row_loss(device, name, call, place, error);
    if (failed >= 0) return failed;
    return pl_cl_refuse(error, PL_CL_UNSUPPORTED,
                        "this operation has no OpenCL kernel; move its arguments to the cpu with .numpy()");
}
