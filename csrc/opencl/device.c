/* Opened devices: queues, memory, copies. Released buffers stay for reuse, as in core/buffers.c. */
#include "profile.h"

#include <stdlib.h>
#include <string.h>

static pl_cl_device *devices;
/* Guards the list; taken before a device's own locks. */
static pl_mutex devices_lock = PL_MUTEX;
static uint64_t next_address = (uint64_t)1 << 48; /* above every host address */

static int refuse_forked(pl_cl_error *error) {
    int count;
    const char *reason;
    return pl_cl_forked() ? pl_cl_open(&count, &reason, error) : 0;
}

/* Adds a device to the list. Takes over the references to context and queue, even if it fails. */
static pl_cl_device *add_device(int index, cl_context context, cl_command_queue queue,
                                cl_bitfield properties, pl_cl_error *error) {
    pl_cl_device *device = calloc(1, sizeof *device);
    if (!device) {
        pl_cl_fail(error, "opening the device", CL_OUT_OF_HOST_MEMORY);
        pl_cl.ReleaseCommandQueue(queue);
        pl_cl.ReleaseContext(context);
        return NULL;
    }
    device->info = pl_cl_info_at(index);
    device->index = index;
    device->context = context;
    device->queue = queue;
    device->wait = (properties & CL_QUEUE_OUT_OF_ORDER_EXEC_MODE_ENABLE) != 0;
    device->profiled = (properties & CL_QUEUE_PROFILING_ENABLE) != 0;
    pl_mutex_init(&device->launch);
    pl_mutex_init(&device->memory);
    device->next = devices;
    __atomic_store_n(&devices, device, __ATOMIC_RELEASE);
    return device;
}

static pl_cl_device *open_device(int index, pl_cl_error *error) {
    const pl_cl_info *info = pl_cl_info_at(index);
    cl_properties properties[] = {CL_CONTEXT_PLATFORM, (cl_properties)info->platform, 0};
    cl_int code;
    cl_context context = pl_cl.CreateContext(properties, 1, &info->id, NULL, NULL, &code);
    if (!context) {
        pl_cl_fail(error, "clCreateContext", code);
        return NULL;
    }
    const cl_bitfield kept = pl_cl_profiling() ? CL_QUEUE_PROFILING_ENABLE : 0;
    cl_command_queue queue = pl_cl.CreateCommandQueue(context, info->id, kept, &code);
    if (!queue) {
        pl_cl_fail(error, "clCreateCommandQueue", code);
        pl_cl.ReleaseContext(context);
        return NULL;
    }
    return add_device(index, context, queue, kept, error);
}

pl_cl_device *pl_cl_device_at(int index, pl_cl_error *error) {
    int count;
    const char *reason;
    if (pl_cl_open(&count, &reason, error)) return NULL;
    if (index < 0 || index >= count) {
        pl_cl_refuse(error, PL_CL_FAILED, "there is no such device: %s",
                     count ? "see pyloss.devices()" : reason);
        return NULL;
    }
    pl_lock(&devices_lock);
    pl_cl_device *device = devices;
    while (device && !(device->own && device->index == index)) device = device->next;
    if (!device && (device = open_device(index, error))) device->own = 1;
    pl_unlock(&devices_lock);
    return device;
}

pl_cl_device *pl_cl_device_of(cl_context context, cl_command_queue queue, pl_cl_error *error) {
    int count, index = -1;
    const char *reason;
    if (pl_cl_open(&count, &reason, error)) return NULL;
    cl_device_id id = NULL;
    cl_bitfield properties = 0;
    cl_int code = pl_cl.GetCommandQueueInfo(queue, CL_QUEUE_DEVICE, sizeof id, &id, NULL);
    if (!code)
        code = pl_cl.GetCommandQueueInfo(queue, CL_QUEUE_PROPERTIES, sizeof properties, &properties,
                                         NULL);
    if (code) {
        pl_cl_fail(error, "clGetCommandQueueInfo", code);
        return NULL;
    }
    for (int i = 0; i < count; i++)
        if (pl_cl_info_at(i)->id == id) index = i;
    if (index < 0) {
        pl_cl_refuse(error, PL_CL_FAILED,
                     "the array is on a device that pyloss.devices() does not list");
        return NULL;
    }
    pl_lock(&devices_lock);
    pl_cl_device *device = devices;
    while (device && !(device->context == context && device->queue == queue)) device = device->next;
    if (!device && !(code = pl_cl.RetainContext(context)) &&
        !(code = pl_cl.RetainCommandQueue(queue)))
        device = add_device(index, context, queue, properties, error);
    pl_unlock(&devices_lock);
    if (code) pl_cl_fail(error, "clRetainContext", code);
    return device;
}

pl_cl_device *pl_cl_opened(void) { return __atomic_load_n(&devices, __ATOMIC_ACQUIRE); }

int pl_cl_finish(pl_cl_device *device, pl_cl_error *error) {
    if (refuse_forked(error)) return 1;
    cl_int code = pl_cl.Finish(device->queue);
    return code ? pl_cl_fail(error, "clFinish", code) : 0;
}

/* ---- buffers */

void pl_cl_free_idle(pl_cl_device *device) {
    pl_lock(&device->memory);
    pl_cl_buffer *list = device->idle;
    device->idle = NULL;
    device->idle_bytes = 0;
    device->peak_bytes = device->used_bytes;
    pl_unlock(&device->memory);
    while (list) {
        pl_cl_buffer *next = list->next;
        pl_cl.ReleaseMemObject(list->memory);
        free(list);
        list = next;
    }
}

/* Takes an idle buffer out of the list, at most an eighth and a page larger than `bytes`. */
static pl_cl_buffer *take_idle(pl_cl_device *device, size_t bytes) {
    for (pl_cl_buffer **link = &device->idle; *link; link = &(*link)->next) {
        pl_cl_buffer *found = *link;
        if (found->bytes < bytes || found->bytes > bytes + bytes / 8 + 4096) continue;
        *link = found->next;
        device->idle_bytes -= found->bytes;
        return found;
    }
    return NULL;
}

static void drop_last_idle(pl_cl_device *device) {
    pl_cl_buffer **link = &device->idle;
    while ((*link)->next) link = &(*link)->next;
    device->idle_bytes -= (*link)->bytes;
    pl_cl.ReleaseMemObject((*link)->memory);
    free(*link);
    *link = NULL;
}

static pl_cl_buffer *make_buffer(pl_cl_device *device, cl_mem memory, size_t bytes, int foreign) {
    pl_cl_buffer *buffer = calloc(1, sizeof *buffer);
    if (!buffer) return NULL;
    buffer->device = device;
    buffer->memory = memory;
    buffer->bytes = bytes;
    buffer->foreign = foreign;
    buffer->references = 1;
    buffer->address =
        __atomic_fetch_add(&next_address, (bytes / 4096 + 2) * 4096, __ATOMIC_RELAXED);
    return buffer;
}

pl_cl_buffer *pl_cl_buffer_new(pl_cl_device *device, size_t bytes, pl_cl_error *error) {
    if (refuse_forked(error)) return NULL;
    if (bytes > device->info->max_allocation) {
        pl_cl_refuse(error, PL_CL_NO_MEMORY,
                     "%zu bytes in one array are more than the device's limit of %llu", bytes,
                     (unsigned long long)device->info->max_allocation);
        return NULL;
    }
    bytes = bytes < 64 ? 64 : (bytes + 63) / 64 * 64;
    pl_lock(&device->memory);
    pl_cl_buffer *buffer = take_idle(device, bytes);
    if (buffer) {
        buffer->references = 1;
        buffer->next = NULL;
    } else {
        /* Hold no more than the peak: the idle buffers have sizes that are no longer used. */
        while (device->idle && device->used_bytes + device->idle_bytes + bytes > device->peak_bytes)
            drop_last_idle(device);
    }
    device->used_bytes += buffer ? buffer->bytes : bytes;
    if (device->used_bytes > device->peak_bytes) device->peak_bytes = device->used_bytes;
    pl_unlock(&device->memory);
    if (buffer) return buffer;
    cl_int code;
    cl_mem memory = pl_cl.CreateBuffer(device->context, CL_MEM_READ_WRITE, bytes, NULL, &code);
    if (!memory) {
        pl_cl_free_idle(device);
        memory = pl_cl.CreateBuffer(device->context, CL_MEM_READ_WRITE, bytes, NULL, &code);
    }
    if (memory && !(buffer = make_buffer(device, memory, bytes, 0))) {
        pl_cl.ReleaseMemObject(memory);
        code = CL_OUT_OF_HOST_MEMORY;
    }
    if (buffer) return buffer;
    pl_lock(&device->memory);
    device->used_bytes -= bytes;
    device->peak_bytes = device->used_bytes; /* the refused bytes must not raise the peak */
    pl_unlock(&device->memory);
    pl_cl_fail(error, "clCreateBuffer", code);
    return NULL;
}

pl_cl_buffer *pl_cl_buffer_of(pl_cl_device *device, cl_mem memory, size_t bytes,
                              pl_cl_error *error) {
    if (refuse_forked(error)) return NULL;
    cl_int code = 0;
    pl_lock(&device->memory);
    pl_cl_buffer *buffer = device->adopted;
    while (buffer && buffer->memory != memory) buffer = buffer->next;
    if (buffer) {
        __atomic_add_fetch(&buffer->references, 1, __ATOMIC_RELAXED);
    } else if (!(code = pl_cl.RetainMemObject(memory))) {
        if ((buffer = make_buffer(device, memory, bytes, 1))) {
            buffer->next = device->adopted;
            device->adopted = buffer;
        } else {
            pl_cl.ReleaseMemObject(memory);
            code = CL_OUT_OF_HOST_MEMORY;
        }
    }
    pl_unlock(&device->memory);
    if (!buffer) pl_cl_fail(error, "clRetainMemObject", code);
    return buffer;
}

void pl_cl_buffer_release(pl_cl_buffer *buffer) {
    if (!buffer) return;
    pl_cl_device *device = buffer->device;
    if (pl_cl_forked()) return;
    pl_lock(&device->memory);
    if (__atomic_sub_fetch(&buffer->references, 1, __ATOMIC_ACQ_REL)) {
        pl_unlock(&device->memory);
        return;
    }
    if (buffer->foreign) {
        pl_cl_buffer **link = &device->adopted;
        while (*link != buffer) link = &(*link)->next;
        *link = buffer->next;
        pl_unlock(&device->memory);
        pl_cl.ReleaseMemObject(buffer->memory);
        free(buffer);
        return;
    }
    /* The queue is in order: kernels that still read the memory run before its next user. */
    device->used_bytes -= buffer->bytes;
    device->idle_bytes += buffer->bytes;
    buffer->next = device->idle;
    device->idle = buffer;
    pl_unlock(&device->memory);
}

int pl_cl_write(pl_cl_buffer *to, size_t offset, const void *from, size_t bytes,
                pl_cl_error *error) {
    if (refuse_forked(error)) return 1;
    if (!bytes) return 0;
    __atomic_add_fetch(&to->writes, 1, __ATOMIC_RELAXED);
    cl_event event;
    cl_int code = pl_cl.EnqueueWriteBuffer(to->device->queue, to->memory, CL_TRUE, offset, bytes,
                                           from, 0, NULL, pl_cl_profile_room(to->device, &event));
    pl_cl_profile_command(to->device, event, "", "copy to the device", bytes);
    return code ? pl_cl_fail(error, "clEnqueueWriteBuffer", code) : 0;
}

int pl_cl_read(const pl_cl_buffer *from, size_t offset, void *to, size_t bytes,
               pl_cl_error *error) {
    if (refuse_forked(error)) return 1;
    if (!bytes) return 0;
    cl_event event;
    cl_int code = pl_cl.EnqueueReadBuffer(from->device->queue, from->memory, CL_TRUE, offset, bytes,
                                          to, 0, NULL, pl_cl_profile_room(from->device, &event));
    pl_cl_profile_command(from->device, event, "", "copy from the device", bytes);
    return code ? pl_cl_fail(error, "clEnqueueReadBuffer", code) : 0;
}

int pl_cl_copy(const pl_cl_buffer *from, size_t from_offset, pl_cl_buffer *to, size_t to_offset,
               size_t bytes, pl_cl_error *error) {
    pl_cl_device *device = to->device;
    if (refuse_forked(error)) return 1;
    if (!bytes) return 0;
    if (device->wait && pl_cl_finish(device, error)) return 1;
    __atomic_add_fetch(&to->writes, 1, __ATOMIC_RELAXED);
    cl_event event;
    cl_int code =
        pl_cl.EnqueueCopyBuffer(device->queue, from->memory, to->memory, from_offset, to_offset,
                                bytes, 0, NULL, pl_cl_profile_room(device, &event));
    pl_cl_profile_command(device, event, "", "copy", bytes);
    if (code) return pl_cl_fail(error, "clEnqueueCopyBuffer", code);
    return device->wait ? pl_cl_finish(device, error) : 0;
}

int pl_cl_clear(pl_cl_buffer *to, size_t offset, size_t bytes, pl_cl_error *error) {
    if (refuse_forked(error)) return 1;
    if (!bytes) return 0;
    static const unsigned char zero;
    __atomic_add_fetch(&to->writes, 1, __ATOMIC_RELAXED);
    cl_event event;
    cl_int code = pl_cl.EnqueueFillBuffer(to->device->queue, to->memory, &zero, 1, offset, bytes, 0,
                                          NULL, pl_cl_profile_room(to->device, &event));
    pl_cl_profile_command(to->device, event, "", "clear", bytes);
    if (code) return pl_cl_fail(error, "clEnqueueFillBuffer", code);
    return to->device->wait ? pl_cl_finish(to->device, error) : 0;
}

void pl_cl_trim(void) {
    if (pl_cl_forked()) return;
    pl_lock(&devices_lock);
    for (pl_cl_device *device = devices; device; device = device->next) pl_cl_free_idle(device);
    pl_unlock(&devices_lock);
}
