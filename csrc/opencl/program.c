/* Programs of a device: built once per source and options, kept in memory, and on disk for the next process.
 *
 * A file of the cache is a header with the size and a checksum of the driver's binary, then the binary. It is named by a hash of
 * all that the binary depends on; one that is damaged, or that the driver refuses, is ignored and written anew.
 */
#include "runtime.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

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

typedef struct {
    char magic[8];
    uint64_t size, checksum;
} file_header;

static const char MAGIC[8] = "pyloss1";
enum { PATH_SIZE = 1024 };

/* FNV-1a. */
static uint64_t hash(uint64_t h, const void *data, size_t bytes) {
    const unsigned char *p = data;
    for (size_t i = 0; i < bytes; i++) h = (h ^ p[i]) * 0x100000001b3;
    return h;
}

/* ---- the cache on disk; whatever fails here only costs a build */

/* The folder of the cache, made if need be: PYLOSS_CACHE, or pyloss in the user's cache folder. */
static int cache_folder(char *path) {
    const char *given = getenv("PYLOSS_CACHE"), *user = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    int n;
    if (given && *given) n = snprintf(path, PATH_SIZE, "%s/opencl", given);
    else if (user && *user) n = snprintf(path, PATH_SIZE, "%s/pyloss/opencl", user);
    else if (home && *home) n = snprintf(path, PATH_SIZE, "%s/.cache/pyloss/opencl", home);
    else return -1;
    if (n < 0 || n >= PATH_SIZE) return -1;
    for (char *slash = path + 1; (slash = strchr(slash, '/')); slash++) {
        *slash = 0;
        mkdir(path, 0700);
        *slash = '/';
    }
    return mkdir(path, 0700) && errno != EEXIST ? -1 : 0;
}

static int cache_path(const pl_cl_device *device, const char *source, const char *options, char *path) {
    char folder[PATH_SIZE];
    if (cache_folder(folder)) return -1;
    const pl_cl_info *info = device->info;
    const char *parts[] = {info->platform_name, info->platform_version, info->vendor, info->name,
                           info->version,       info->driver,           options,      source};
    uint64_t a = 0xcbf29ce484222325, b = 0x9ae16a3b2f90404f;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        a = hash(a, parts[i], strlen(parts[i]) + 1);
        b = hash(b, parts[i], strlen(parts[i]) + 1);
    }
    int n = snprintf(path, PATH_SIZE, "%s/%016llx%016llx.bin", folder, (unsigned long long)a, (unsigned long long)b);
    return n < 0 || n >= PATH_SIZE ? -1 : 0;
}

static unsigned char *read_cache(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    if (!file) return NULL;
    file_header header;
    unsigned char *binary = NULL;
    struct stat status;
    if (fread(&header, sizeof header, 1, file) == 1 && !memcmp(header.magic, MAGIC, sizeof MAGIC) &&
        !fstat(fileno(file), &status) && header.size && header.size == (uint64_t)status.st_size - sizeof header &&
        (binary = malloc(header.size))) {
        if (fread(binary, 1, header.size, file) != header.size || hash(0, binary, header.size) != header.checksum) {
            free(binary);
            binary = NULL;
        }
        *size = header.size;
    }
    fclose(file);
    return binary;
}

static void write_cache(const char *path, const unsigned char *binary, size_t size) {
    char beside[PATH_SIZE + 32];
    snprintf(beside, sizeof beside, "%s.%ld", path, (long)getpid()); /* written by one thread: the launch lock is held */
    FILE *file = fopen(beside, "wb");
    if (!file) return;
    file_header header = {.size = size, .checksum = hash(0, binary, size)};
    memcpy(header.magic, MAGIC, sizeof MAGIC);
    int good = fwrite(&header, sizeof header, 1, file) == 1 && fwrite(binary, 1, size, file) == size;
    good = !fclose(file) && good;
    if (!good || rename(beside, path)) unlink(beside);
}

static cl_program from_cache(pl_cl_device *device, const char *path, const char *options) {
    size_t size;
    unsigned char *binary = read_cache(path, &size);
    if (!binary) return NULL;
    const unsigned char *given = binary;
    cl_int code, status;
    cl_program program = pl_cl.CreateProgramWithBinary(device->context, 1, &device->info->id, &size, &given, &status, &code);
    free(binary);
    if (program && (code || status || pl_cl.BuildProgram(program, 1, &device->info->id, options, NULL, NULL))) {
        pl_cl.ReleaseProgram(program);
        program = NULL;
    }
    return program;
}

static void to_cache(cl_program program, const char *path) {
    size_t size = 0;
    if (pl_cl.GetProgramInfo(program, CL_PROGRAM_BINARY_SIZES, sizeof size, &size, NULL) || !size) return;
    unsigned char *binary = malloc(size);
    if (binary && !pl_cl.GetProgramInfo(program, CL_PROGRAM_BINARIES, sizeof binary, &binary, NULL))
        write_cache(path, binary, size);
    free(binary);
}

/* ---- building */

static cl_program build(pl_cl_device *device, const char *source, const char *options, pl_cl_error *error) {
    cl_int code;
    cl_program program = pl_cl.CreateProgramWithSource(device->context, 1, &source, NULL, &code);
    if (!program) {
        pl_cl_fail(error, "clCreateProgramWithSource", code);
        return NULL;
    }
    code = pl_cl.BuildProgram(program, 1, &device->info->id, options, NULL, NULL);
    if (!code) return program;
    pl_cl_fail(error, "clBuildProgram", code);
    size_t length = 0;
    if (!pl_cl.GetProgramBuildInfo(program, device->info->id, CL_PROGRAM_BUILD_LOG, 0, NULL, &length) && length &&
        (error->log = calloc(1, length + 1)))
        pl_cl.GetProgramBuildInfo(program, device->info->id, CL_PROGRAM_BUILD_LOG, length, error->log, NULL);
    pl_cl.ReleaseProgram(program);
    return NULL;
}

static pl_cl_program *find_program(pl_cl_device *device, const char *source, const char *options, pl_cl_error *error) {
    pl_cl_program *found = device->programs;
    while (found && (found->source != source || strcmp(found->options, options))) found = found->next;
    if (found) return found;
    char path[PATH_SIZE];
    int cached = !cache_path(device, source, options, path);
    cl_program program = cached ? from_cache(device, path, options) : NULL;
    if (!program) {
        if (!(program = build(device, source, options, error))) return NULL;
        if (cached) to_cache(program, path);
    }
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

cl_kernel pl_cl_kernel(pl_cl_device *device, const char *name, const char *source, const char *options, size_t *group,
                       pl_cl_error *error) {
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
        pl_cl.GetKernelWorkGroupInfo(kernel, device->info->id, CL_KERNEL_WORK_GROUP_SIZE, sizeof found->group, &found->group,
                                     NULL);
        found->next = program->kernels;
        program->kernels = found;
    }
    *group = found->group;
    return found->kernel;
}
