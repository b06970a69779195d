/* The types, constants and functions of OpenCL 1.2 that pyloss uses, so that building needs no
 * OpenCL headers. library.c finds the functions in libOpenCL at run time and puts them into
 * `pl_cl`. */
#ifndef PYLOSS_CL_H
#define PYLOSS_CL_H

#include <stddef.h>
#include <stdint.h>

typedef struct cl_platform_handle *cl_platform_id;
typedef struct cl_device_handle *cl_device_id;
typedef struct cl_context_handle *cl_context;
typedef struct cl_queue_handle *cl_command_queue;
typedef struct cl_mem_handle *cl_mem;
typedef struct cl_program_handle *cl_program;
typedef struct cl_kernel_handle *cl_kernel;
typedef struct cl_event_handle *cl_event;
typedef int32_t cl_int;
typedef uint32_t cl_uint;
typedef uint32_t cl_bool;
typedef uint64_t cl_ulong;
typedef uint64_t cl_bitfield;
typedef intptr_t cl_properties;
typedef void (*cl_context_notify)(const char *text, const void *data, size_t bytes, void *user);
typedef void (*cl_program_notify)(cl_program program, void *user);

enum {
    CL_SUCCESS = 0,
    CL_DEVICE_NOT_FOUND = -1,
    CL_MEM_OBJECT_ALLOCATION_FAILURE = -4,
    CL_OUT_OF_RESOURCES = -5,
    CL_OUT_OF_HOST_MEMORY = -6,
    CL_BUILD_PROGRAM_FAILURE = -11,
    CL_INVALID_BUFFER_SIZE = -61,
    CL_PLATFORM_NOT_FOUND_KHR = -1001,

    CL_TRUE = 1,
    CL_PLATFORM_NAME = 0x0902,
    CL_PLATFORM_VERSION = 0x0901,
    CL_DEVICE_TYPE = 0x1000,
    CL_DEVICE_MAX_COMPUTE_UNITS = 0x1002,
    CL_DEVICE_MAX_WORK_GROUP_SIZE = 0x1004,
    CL_DEVICE_MAX_MEM_ALLOC_SIZE = 0x1010,
    CL_DEVICE_GLOBAL_MEM_SIZE = 0x101F,
    CL_DEVICE_LOCAL_MEM_SIZE = 0x1023,
    CL_DEVICE_AVAILABLE = 0x1027,
    CL_DEVICE_COMPILER_AVAILABLE = 0x1028,
    CL_DEVICE_NAME = 0x102B,
    CL_DEVICE_VENDOR = 0x102C,
    CL_DRIVER_VERSION = 0x102D,
    CL_DEVICE_VERSION = 0x102F,
    CL_DEVICE_EXTENSIONS = 0x1030,
    CL_DEVICE_PLATFORM = 0x1031,
    CL_DEVICE_NATIVE_VECTOR_WIDTH_FLOAT = 0x103A,
    CL_DEVICE_DOUBLE_FP_CONFIG = 0x1032,
    CL_DEVICE_TYPE_CPU = 1 << 1,
    CL_DEVICE_TYPE_GPU = 1 << 2,
    CL_DEVICE_TYPE_ACCELERATOR = 1 << 3,
    CL_CONTEXT_PLATFORM = 0x1084,
    CL_QUEUE_DEVICE = 0x1091,
    CL_QUEUE_PROPERTIES = 0x1093,
    CL_QUEUE_OUT_OF_ORDER_EXEC_MODE_ENABLE = 1 << 0,
    CL_QUEUE_PROFILING_ENABLE = 1 << 1,
    CL_MEM_READ_WRITE = 1 << 0,
    CL_PROGRAM_BINARY_SIZES = 0x1165,
    CL_PROGRAM_BINARIES = 0x1166,
    CL_PROGRAM_BUILD_LOG = 0x1183,
    CL_KERNEL_WORK_GROUP_SIZE = 0x11B0,
    CL_PROFILING_COMMAND_START = 0x1282,
    CL_PROFILING_COMMAND_END = 0x1283,
};
#define CL_DEVICE_TYPE_ALL 0xFFFFFFFFu

/* X(result, name without "cl", parameters) */
#define PL_CL_FUNCTIONS(X) \
    X(cl_int, GetPlatformIDs, (cl_uint, cl_platform_id *, cl_uint *)) \
    X(cl_int, GetPlatformInfo, (cl_platform_id, cl_uint, size_t, void *, size_t *)) \
    X(cl_int, GetDeviceIDs, (cl_platform_id, cl_bitfield, cl_uint, cl_device_id *, cl_uint *)) \
    X(cl_int, GetDeviceInfo, (cl_device_id, cl_uint, size_t, void *, size_t *)) \
    X(cl_context, CreateContext, \
      (const cl_properties *, cl_uint, const cl_device_id *, cl_context_notify, void *, cl_int *)) \
    X(cl_int, RetainContext, (cl_context)) \
    X(cl_int, ReleaseContext, (cl_context)) \
    X(cl_command_queue, CreateCommandQueue, (cl_context, cl_device_id, cl_bitfield, cl_int *)) \
    X(cl_int, RetainCommandQueue, (cl_command_queue)) \
    X(cl_int, ReleaseCommandQueue, (cl_command_queue)) \
    X(cl_int, GetCommandQueueInfo, (cl_command_queue, cl_uint, size_t, void *, size_t *)) \
    X(cl_mem, CreateBuffer, (cl_context, cl_bitfield, size_t, void *, cl_int *)) \
    X(cl_int, RetainMemObject, (cl_mem)) \
    X(cl_int, ReleaseMemObject, (cl_mem)) \
    X(cl_int, EnqueueReadBuffer, \
      (cl_command_queue, cl_mem, cl_bool, size_t, size_t, void *, cl_uint, const cl_event *, \
       cl_event *)) \
    X(cl_int, EnqueueWriteBuffer, \
      (cl_command_queue, cl_mem, cl_bool, size_t, size_t, const void *, cl_uint, const cl_event *, \
       cl_event *)) \
    X(cl_int, EnqueueCopyBuffer, \
      (cl_command_queue, cl_mem, cl_mem, size_t, size_t, size_t, cl_uint, const cl_event *, \
       cl_event *)) \
    X(cl_int, EnqueueFillBuffer, \
      (cl_command_queue, cl_mem, const void *, size_t, size_t, size_t, cl_uint, const cl_event *, \
       cl_event *)) \
    X(cl_program, CreateProgramWithSource, \
      (cl_context, cl_uint, const char **, const size_t *, cl_int *)) \
    X(cl_program, CreateProgramWithBinary, \
      (cl_context, cl_uint, const cl_device_id *, const size_t *, const unsigned char **, \
       cl_int *, cl_int *)) \
    X(cl_int, BuildProgram, \
      (cl_program, cl_uint, const cl_device_id *, const char *, cl_program_notify, void *)) \
    X(cl_int, GetProgramInfo, (cl_program, cl_uint, size_t, void *, size_t *)) \
    X(cl_int, GetProgramBuildInfo, (cl_program, cl_device_id, cl_uint, size_t, void *, size_t *)) \
    X(cl_int, ReleaseProgram, (cl_program)) \
    X(cl_kernel, CreateKernel, (cl_program, const char *, cl_int *)) \
    X(cl_int, ReleaseKernel, (cl_kernel)) \
    X(cl_int, SetKernelArg, (cl_kernel, cl_uint, size_t, const void *)) \
    X(cl_int, GetKernelWorkGroupInfo, \
      (cl_kernel, cl_device_id, cl_uint, size_t, void *, size_t *)) \
    X(cl_int, EnqueueNDRangeKernel, \
      (cl_command_queue, cl_kernel, cl_uint, const size_t *, const size_t *, const size_t *, \
       cl_uint, const cl_event *, cl_event *)) \
    X(cl_int, WaitForEvents, (cl_uint, const cl_event *)) \
    X(cl_int, GetEventProfilingInfo, (cl_event, cl_uint, size_t, void *, size_t *)) \
    X(cl_int, ReleaseEvent, (cl_event)) \
    X(cl_int, Flush, (cl_command_queue)) \
    X(cl_int, Finish, (cl_command_queue))

typedef struct {
#define X(result, name, parameters) result(*name) parameters;
    PL_CL_FUNCTIONS(X)
#undef X
} pl_cl_functions;

/* Valid after pl_cl_open has succeeded. */
extern pl_cl_functions pl_cl;

#endif
