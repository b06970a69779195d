/* libOpenCL: found at run time; its devices, its errors, and its state after fork. */
#include "runtime.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

pl_cl_functions pl_cl;

enum { MAX_PLATFORMS = 16, MAX_DEVICES = 64 };

static struct {
    pl_mutex lock;
    int tried, forked, count;
    char reason[512];
    pl_cl_info info[MAX_DEVICES];
} library = {.lock = PL_MUTEX};

/* A forked child lacks the driver's threads: any call could wait forever. */
static void after_fork(void) {
    library.forked = 1;
    pl_mutex_init(&library.lock);
}

int pl_cl_forked(void) { return library.forked; }

static int find_functions(void) {
    const char *given = getenv("PYLOSS_OPENCL_LIBRARY");
#ifdef _WIN32
    static const char missing[] = "no OpenCL.dll on this machine (graphics drivers bring it)";
    const char *const usual[] = {"OpenCL.dll", NULL};
#else
    static const char missing[] = "no libOpenCL.so.1 on this machine (Debian: ocl-icd-libopencl1)";
    const char *const usual[] = {"libOpenCL.so.1", "libOpenCL.so",
                                 "/System/Library/Frameworks/OpenCL.framework/OpenCL", NULL};
#endif
    const char *const named[] = {given, NULL};
    void *handle = NULL;
    for (const char *const *name = given && *given ? named : usual; *name && !handle; name++)
        handle = pl_library_open(*name);
    if (!handle) {
        if (given && *given)
            snprintf(library.reason, sizeof library.reason,
                     "PYLOSS_OPENCL_LIBRARY=%s could not be loaded", given);
        else snprintf(library.reason, sizeof library.reason, "%s", missing);
        return -1;
    }
#define X(result, name, parameters) \
    if (!(pl_cl.name = (result(*) parameters)pl_library_symbol(handle, "cl" #name))) { \
        snprintf(library.reason, sizeof library.reason, \
                 "the OpenCL library has no cl%s: OpenCL 1.2 is needed", #name); \
        return -1; \
    }
    PL_CL_FUNCTIONS(X)
#undef X
    return 0;
}

static void read_text(cl_device_id id, cl_uint what, char *text, size_t size) {
    size_t length = 0;
    text[0] = 0;
    if (pl_cl.GetDeviceInfo(id, what, 0, NULL, &length) || !length) return;
    char *whole = malloc(length + 1);
    if (whole && !pl_cl.GetDeviceInfo(id, what, length, whole, NULL)) {
        whole[length] = 0;
        snprintf(text, size, "%s", whole + strspn(whole, " "));
    }
    free(whole);
}

static int has_extension(cl_device_id id, const char *name) {
    char listed[8192];
    read_text(id, CL_DEVICE_EXTENSIONS, listed, sizeof listed);
    return strstr(listed, name) != NULL;
}

static void read_device(cl_platform_id platform, cl_device_id id, pl_cl_info *info) {
    memset(info, 0, sizeof *info);
    info->platform = platform;
    info->id = id;
    pl_cl.GetPlatformInfo(platform, CL_PLATFORM_NAME, sizeof info->platform_name - 1,
                          info->platform_name, NULL);
    pl_cl.GetPlatformInfo(platform, CL_PLATFORM_VERSION, sizeof info->platform_version - 1,
                          info->platform_version, NULL);
    read_text(id, CL_DEVICE_NAME, info->name, sizeof info->name);
    read_text(id, CL_DEVICE_VENDOR, info->vendor, sizeof info->vendor);
    read_text(id, CL_DRIVER_VERSION, info->driver, sizeof info->driver);
    read_text(id, CL_DEVICE_VERSION, info->version, sizeof info->version);
    cl_bool available = 0, compiler = 0;
    cl_bitfield doubles = 0;
#define READ(what, field) pl_cl.GetDeviceInfo(id, what, sizeof field, &field, NULL)
    READ(CL_DEVICE_TYPE, info->kind);
    READ(CL_DEVICE_GLOBAL_MEM_SIZE, info->global_memory);
    READ(CL_DEVICE_MAX_MEM_ALLOC_SIZE, info->max_allocation);
    READ(CL_DEVICE_LOCAL_MEM_SIZE, info->local_memory);
    READ(CL_DEVICE_MAX_WORK_GROUP_SIZE, info->max_group);
    READ(CL_DEVICE_MAX_COMPUTE_UNITS, info->units);
    READ(CL_DEVICE_NATIVE_VECTOR_WIDTH_FLOAT, info->vector);
    READ(CL_DEVICE_AVAILABLE, available);
    READ(CL_DEVICE_COMPILER_AVAILABLE, compiler);
    READ(CL_DEVICE_DOUBLE_FP_CONFIG, doubles); /* fails on devices without doubles */
#undef READ
    info->fp64 = doubles != 0;
    info->usable = available && compiler;
    info->remarks = has_extension(id, "cl_nv_compiler_options");
}

static void list_devices(void) {
    cl_platform_id platforms[MAX_PLATFORMS];
    cl_uint found = 0;
    cl_int code = pl_cl.GetPlatformIDs(MAX_PLATFORMS, platforms, &found);
    if (code && code != CL_PLATFORM_NOT_FOUND_KHR) {
        snprintf(library.reason, sizeof library.reason, "clGetPlatformIDs: %s",
                 pl_cl_error_name(code));
        return;
    }
    for (cl_uint i = 0; i < found && i < MAX_PLATFORMS; i++) {
        cl_device_id ids[MAX_DEVICES];
        cl_uint n = 0;
        if (pl_cl.GetDeviceIDs(platforms[i], CL_DEVICE_TYPE_ALL, MAX_DEVICES, ids, &n))
            continue; /* a platform without devices */
        for (cl_uint j = 0; j < n && j < MAX_DEVICES && library.count < MAX_DEVICES; j++) {
            read_device(platforms[i], ids[j], &library.info[library.count]);
            library.count += library.info[library.count].usable;
        }
    }
    if (!library.count)
        snprintf(library.reason, sizeof library.reason,
                 "libOpenCL has no device (for the processor itself, Debian: pocl-opencl-icd)");
}

int pl_cl_open(int *count, const char **reason, pl_cl_error *error) {
    *count = 0;
    *reason = NULL;
    pl_lock(&library.lock);
    int forked = library.forked;
    if (!forked && !library.tried) {
        library.tried = 1;
        if (!find_functions()) {
            list_devices();
            pl_at_fork(NULL, NULL, after_fork);
        }
    }
    pl_unlock(&library.lock);
    if (forked)
        return pl_cl_refuse(
            error, PL_CL_FORKED,
            "this process was forked from one that had already used OpenCL, which does not survive "
            "a fork; start it with multiprocessing's \"spawn\", or use OpenCL in child processes "
            "only");
    *count = library.count;
    if (!library.count) *reason = library.reason;
    return 0;
}

const pl_cl_info *pl_cl_info_at(int index) { return &library.info[index]; }

int pl_cl_refuse(pl_cl_error *error, int kind, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    error->kind = kind;
    error->log = NULL;
    vsnprintf(error->text, sizeof error->text, format, arguments);
    va_end(arguments);
    return 1;
}

int pl_cl_fail(pl_cl_error *error, const char *operation, cl_int code) {
    int memory = code == CL_MEM_OBJECT_ALLOCATION_FAILURE || code == CL_OUT_OF_RESOURCES ||
                 code == CL_OUT_OF_HOST_MEMORY || code == CL_INVALID_BUFFER_SIZE;
    /* Drivers also report a crashed kernel as "out of resources", from clFinish. */
    if (code == CL_OUT_OF_RESOURCES && !strcmp(operation, "clFinish")) memory = 0;
    return pl_cl_refuse(error, memory ? PL_CL_NO_MEMORY : PL_CL_FAILED, "%s: %s", operation,
                        pl_cl_error_name(code));
}

const char *pl_cl_error_name(cl_int code) {
    static const struct {
        cl_int code;
        const char *name;
    } names[] = {
        {-1, "CL_DEVICE_NOT_FOUND"},
        {-2, "CL_DEVICE_NOT_AVAILABLE"},
        {-3, "CL_COMPILER_NOT_AVAILABLE"},
        {-4, "CL_MEM_OBJECT_ALLOCATION_FAILURE"},
        {-5, "CL_OUT_OF_RESOURCES"},
        {-6, "CL_OUT_OF_HOST_MEMORY"},
        {-11, "CL_BUILD_PROGRAM_FAILURE"},
        {-12, "CL_MAP_FAILURE"},
        {-14, "CL_EXEC_STATUS_ERROR_FOR_EVENTS_IN_WAIT_LIST"},
        {-30, "CL_INVALID_VALUE"},
        {-33, "CL_INVALID_DEVICE"},
        {-34, "CL_INVALID_CONTEXT"},
        {-36, "CL_INVALID_COMMAND_QUEUE"},
        {-38, "CL_INVALID_MEM_OBJECT"},
        {-42, "CL_INVALID_BINARY"},
        {-43, "CL_INVALID_BUILD_OPTIONS"},
        {-44, "CL_INVALID_PROGRAM"},
        {-45, "CL_INVALID_PROGRAM_EXECUTABLE"},
        {-46, "CL_INVALID_KERNEL_NAME"},
        {-48, "CL_INVALID_KERNEL"},
        {-49, "CL_INVALID_ARG_INDEX"},
        {-50, "CL_INVALID_ARG_VALUE"},
        {-51, "CL_INVALID_ARG_SIZE"},
        {-52, "CL_INVALID_KERNEL_ARGS"},
        {-54, "CL_INVALID_WORK_GROUP_SIZE"},
        {-55, "CL_INVALID_WORK_ITEM_SIZE"},
        {-59, "CL_INVALID_OPERATION"},
        {-61, "CL_INVALID_BUFFER_SIZE"},
        {-63, "CL_INVALID_GLOBAL_WORK_SIZE"},
        {-1001, "CL_PLATFORM_NOT_FOUND_KHR"},
    };
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (names[i].code == code) return names[i].name;
    static _Thread_local char unnamed[32];
    snprintf(unnamed, sizeof unnamed, "OpenCL error %d", (int)code);
    return unnamed;
}
