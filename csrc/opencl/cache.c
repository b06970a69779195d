/* Compiled programs on disk, for the next process. The driver runs these files, so folder and file
 * must belong to this user, and nobody else may be able to write to them. A failure only costs a
 * build.
 *
 * A file is a header (size and checksum of the driver's binary), then the binary. It is written
 * under a random name and renamed. A damaged file is ignored and overwritten.
 */
#include "runtime.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    char magic[8];
    uint64_t size, checksum;
} file_header;

static const char MAGIC[8] = "pyloss1";
static const uint64_t LARGEST = (uint64_t)1 << 30; /* bytes; a larger size is damage */
enum { PATH_SIZE = 1024 };

/* The first complaint; only this one is reported. */
static char complaint[PATH_SIZE + 128];
static atomic_int complained; /* 1: being written; 2: written; 3: reported */

static void complain(const char *folder, const char *name, const char *reason) {
    int none = 0;
    if (!atomic_compare_exchange_strong(&complained, &none, 1)) return;
    snprintf(complaint, sizeof complaint, "compiled OpenCL kernels are not cached: %s%s%s %s",
             folder, name ? "/" : "", name ? name : "", reason);
    atomic_store(&complained, 2);
}

const char *pl_cl_cache_complaint(void) {
    int there = 2;
    return atomic_compare_exchange_strong(&complained, &there, 3) ? complaint : NULL;
}

/* FNV-1a. */
uint64_t pl_cl_hash(uint64_t h, const void *data, size_t bytes) {
    const unsigned char *p = data;
    for (size_t i = 0; i < bytes; i++) h = (h ^ p[i]) * 0x100000001b3;
    return h;
}

/* The path of the folder: in PYLOSS_CACHE or in the user's cache folder. */
static int folder_path(char *path) {
    static const char *const places[][2] = {{"PYLOSS_CACHE", "opencl"},
                                            {"XDG_CACHE_HOME", "pyloss/opencl"},
#ifdef _WIN32
                                            {"LOCALAPPDATA", "pyloss/Cache/opencl"}};
#else
                                            {"HOME", ".cache/pyloss/opencl"}};
#endif
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        const char *given = getenv(places[i][0]);
        if (!given || !*given) continue;
        const int n = snprintf(path, PATH_SIZE, "%s/%s", given, places[i][1]);
        return n < 0 || n >= PATH_SIZE ? -1 : 0;
    }
    return -1;
}

/* Opens the folder; -1 if there is none that can be trusted. */
static int open_folder(pl_folder *folder, char *path) {
    const char *reason;
    if (folder_path(path)) return -1;
    const int failed = pl_folder_open(folder, path, &reason);
    if (reason) complain(path, NULL, reason);
    return failed;
}

unsigned char *pl_cl_cache_read(const char *name, size_t *size) {
    char path[PATH_SIZE];
    pl_folder folder;
    if (open_folder(&folder, path)) return NULL;
    const char *reason;
    size_t bytes;
    unsigned char *data = pl_file_read(&folder, name, LARGEST, &bytes, &reason);
    if (reason) complain(path, name, reason);
    pl_folder_close(&folder);
    if (!data) return NULL;
    file_header header = {.size = 0};
    if (bytes > sizeof header) memcpy(&header, data, sizeof header);
    if (memcmp(header.magic, MAGIC, sizeof MAGIC) || header.size != bytes - sizeof header ||
        pl_cl_hash(0, data + sizeof header, (size_t)header.size) != header.checksum) {
        free(data);
        return NULL;
    }
    *size = (size_t)header.size;
    memmove(data, data + sizeof header, *size);
    return data;
}

void pl_cl_cache_write(const char *name, const unsigned char *binary, size_t size) {
    char path[PATH_SIZE];
    pl_folder folder;
    if (open_folder(&folder, path)) return;
    file_header header = {.size = size, .checksum = pl_cl_hash(0, binary, size)};
    memcpy(header.magic, MAGIC, sizeof MAGIC);
    pl_file_write(&folder, name, &header, sizeof header, binary, size);
    pl_folder_close(&folder);
}
