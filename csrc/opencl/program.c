/* Programs of a device: built once per source and options, cached in memory and on disk. */
#include "../pyloss.h"
#include "profile.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct named_kernel {
    struct named_kernel *next;
    cl_kernel kernel;
    size_t group;
    char name[64];
} named_kernel;

struct pl_cl_program {
    pl_cl_program *next;
    const char *source; /* a constant: compared by its address */
    char *options;
    cl_program program;
    named_kernel *kernels;
};

static const char *name_of(const char *source) {
    const pl_cl_named_source *p = pl_cl_programs;
    while (p->name && p->source != source) p++;
    return p->name;
}

/* A program's name on disk: a hash of everything that its binary depends on. */
enum { NAME_SIZE = 40 };

static void cache_name(const pl_cl_device *device, const char *source, const char *options,
                       char *name) {
    const pl_cl_info *info = device->info;
    const char *parts[] = {info->platform_name, info->platform_version, info->vendor, info->name,
                           info->version,       info->driver,           options,      source};
    uint64_t a = 0xcbf29ce484222325, b = 0x9ae16a3b2f90404f;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        a = pl_cl_hash(a, parts[i], strlen(parts[i]) + 1);
        b = pl_cl_hash(b, parts[i], strlen(parts[i]) + 1);
    }
    snprintf(name, NAME_SIZE, "%016llx%016llx.bin", (unsigned long long)a, (unsigned long long)b);
}

static cl_program from_cache(pl_cl_device *device, const char *name, const char *options) {
    size_t size;
    unsigned char *binary = pl_cl_cache_read(name, &size);
    if (!binary) return NULL;
    const unsigned char *given = binary;
    cl_int code, status;
    cl_program program = pl_cl.CreateProgramWithBinary(device->context, 1, &device->info->id, &size,
                                                       &given, &status, &code);
    free(binary);
    if (program && (code || status ||
                    pl_cl.BuildProgram(program, 1, &device->info->id, options, NULL, NULL))) {
        pl_cl.ReleaseProgram(program);
        program = NULL;
    }
    return program;
}

static void to_cache(cl_program program, const char *name) {
    size_t size = 0;
    if (pl_cl.GetProgramInfo(program, CL_PROGRAM_BINARY_SIZES, sizeof size, &size, NULL) || !size)
        return;
    unsigned char *binary = malloc(size);
    if (binary && !pl_cl.GetProgramInfo(program, CL_PROGRAM_BINARIES, sizeof binary, &binary, NULL))
        pl_cl_cache_write(name, binary, size);
    free(binary);
}

/* ---- building */

/* The compiler's remarks, malloc'd; NULL if there are none. */
static char *build_log(const pl_cl_device *device, cl_program program) {
    size_t length = 0;
    char *log = NULL;
    if (!pl_cl.GetProgramBuildInfo(program, device->info->id, CL_PROGRAM_BUILD_LOG, 0, NULL,
                                   &length) &&
        length && (log = calloc(1, length + 1)))
        pl_cl.GetProgramBuildInfo(program, device->info->id, CL_PROGRAM_BUILD_LOG, length, log,
                                  NULL);
    if (log && !log[strspn(log, " \n\t")]) {
        free(log);
        log = NULL;
    }
    return log;
}

static cl_program build(pl_cl_device *device, const char *source, const char *options,
                        pl_cl_error *error) {
    cl_int code;
    char verbose[1024]; /* the profile shows registers, which do not change the code */
    if (pl_cl_profiling() && device->info->remarks) {
        snprintf(verbose, sizeof verbose, "%s -cl-nv-verbose", options);
        options = verbose;
    }
    cl_program program = pl_cl.CreateProgramWithSource(device->context, 1, &source, NULL, &code);
    if (!program) {
        pl_cl_fail(error, "clCreateProgramWithSource", code);
        return NULL;
    }
    code = pl_cl.BuildProgram(program, 1, &device->info->id, options, NULL, NULL);
    if (!code) return program;
    pl_cl_fail(error, "clBuildProgram", code);
    error->log = build_log(device, program);
    pl_cl.ReleaseProgram(program);
    return NULL;
}

static pl_cl_program *find_program(pl_cl_device *device, const char *source, const char *options,
                                   pl_cl_error *error) {
    pl_cl_program *found = device->programs;
    while (found && (found->source != source || strcmp(found->options, options)))
        found = found->next;
    if (found) return found;
    char in_cache[NAME_SIZE];
    cache_name(device, source, options, in_cache);
    const int64_t begin = pl_nanoseconds();
    cl_program program = from_cache(device, in_cache, options);
    const int cached = program != NULL;
    if (!program) {
        if (!(program = build(device, source, options, error))) return NULL;
        to_cache(program, in_cache); /* PoCL compiles kernels only for their binaries */
    }
    if (pl_cl_profiling())
        pl_cl_profile_build(name_of(source), options, cached, pl_nanoseconds() - begin,
                            cached ? NULL : build_log(device, program));
    char *copy = malloc(strlen(options) + 1);
    if (!copy || !(found = calloc(1, sizeof *found))) {
        free(copy);
        pl_cl.ReleaseProgram(program);
        pl_cl_fail(error, "building a program", CL_OUT_OF_HOST_MEMORY);
        return NULL;
    }
    *found = (pl_cl_program){device->programs, source, strcpy(copy, options), program, NULL};
    return device->programs = found;
}

cl_kernel pl_cl_kernel(pl_cl_device *device, const char *name, const char *source,
                       const char *options, size_t *group, pl_cl_error *error) {
    pl_cl_program *program = find_program(device, source, options, error);
    if (!program) return NULL;
    named_kernel *found = program->kernels;
    while (found && strcmp(found->name, name)) found = found->next;
    if (!found) {
        cl_int code;
        cl_kernel kernel = pl_cl.CreateKernel(program->program, name, &code);
        if (!kernel || !(found = calloc(1, sizeof *found))) {
            if (kernel) pl_cl.ReleaseKernel(kernel);
            pl_cl_fail(error, "clCreateKernel", kernel ? CL_OUT_OF_HOST_MEMORY : code);
            return NULL;
        }
        found->kernel = kernel;
        found->group = 1;
        snprintf(found->name, sizeof found->name, "%s", name);
        pl_cl.GetKernelWorkGroupInfo(kernel, device->info->id, CL_KERNEL_WORK_GROUP_SIZE,
                                     sizeof found->group, &found->group, NULL);
        found->next = program->kernels;
        program->kernels = found;
    }
    *group = found->group;
    return found->kernel;
}
