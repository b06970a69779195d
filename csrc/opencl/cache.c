/* Compiled programs on disk, for the next process. The driver runs these files, so folder and file
 * must belong to this user, and nobody else may be able to write to them. A failure only costs a
 * build.
 *
 * A file is a header (size and checksum of the driver's binary), then the binary. It is written
 * under a random name and renamed. A damaged file is ignored and overwritten.
 */
#define _GNU_SOURCE
#include "runtime.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

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

/* Why an opened file or folder cannot be trusted; NULL if it can. */
static const char *distrust(const struct stat *status) {
    if (status->st_uid != geteuid()) return "belongs to another user";
    return status->st_mode & (S_IWGRP | S_IWOTH) ? "can be written to by other users" : NULL;
}

/* FNV-1a. */
uint64_t pl_cl_hash(uint64_t h, const void *data, size_t bytes) {
    const unsigned char *p = data;
    for (size_t i = 0; i < bytes; i++) h = (h ^ p[i]) * 0x100000001b3;
    return h;
}

/* Makes the folder, in PYLOSS_CACHE or in the user's cache folder, and gives its path. */
static int folder_path(char *path) {
    const char *given = getenv("PYLOSS_CACHE"), *user = getenv("XDG_CACHE_HOME"),
               *home = getenv("HOME");
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

/* Opens the folder; -1 if there is none that can be trusted. Files are opened through this
 * descriptor alone, so that a folder put in its place later is not used. */
static int open_folder(char *path) {
    if (folder_path(path)) return -1;
    int folder = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    struct stat status;
    const char *reason = NULL;
    if (folder < 0)
        reason = errno == ELOOP || errno == ENOTDIR ? "is a link or no folder" : "cannot be opened";
    else if (fstat(folder, &status)) reason = "cannot be examined";
    else reason = distrust(&status);
    if (!reason) return folder;
    complain(path, NULL, reason);
    if (folder >= 0) close(folder);
    return -1;
}

static int read_all(int file, void *to, size_t bytes) {
    for (char *p = to; bytes;) {
        ssize_t n = read(file, p, bytes);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return -1;
        p += n;
        bytes -= (size_t)n;
    }
    return 0;
}

static int write_all(int file, const void *from, size_t bytes) {
    for (const char *p = from; bytes;) {
        ssize_t n = write(file, p, bytes);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return -1;
        p += n;
        bytes -= (size_t)n;
    }
    return 0;
}

static unsigned char *read_binary(int file, const struct stat *status, size_t *size) {
    file_header header;
    if (read_all(file, &header, sizeof header) || memcmp(header.magic, MAGIC, sizeof MAGIC) ||
        !header.size || header.size > LARGEST ||
        header.size != (uint64_t)status->st_size - sizeof header)
        return NULL;
    unsigned char *binary = malloc(header.size);
    if (binary && (read_all(file, binary, header.size) ||
                   pl_cl_hash(0, binary, header.size) != header.checksum)) {
        free(binary);
        return NULL;
    }
    *size = header.size;
    return binary;
}

unsigned char *pl_cl_cache_read(const char *name, size_t *size) {
    char path[PATH_SIZE];
    int folder = open_folder(path);
    if (folder < 0) return NULL;
    int file = openat(folder, name,
                      O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC); /* a pipe must not block */
    unsigned char *binary = NULL;
    struct stat status;
    if (file >= 0 && !fstat(file, &status)) {
        const char *reason = S_ISREG(status.st_mode) ? distrust(&status) : "is no file";
        if (reason) complain(path, name, reason);
        else binary = read_binary(file, &status, size);
    } else if (file < 0 && errno == ELOOP) {
        complain(path, name, "is a link");
    }
    if (file >= 0) close(file);
    close(folder);
    return binary;
}

/* Appends 64 random bits to `name`. */
static int random_name(const char *name, char *to, size_t room) {
    unsigned long long word;
    int source = open("/dev/urandom", O_RDONLY | O_CLOEXEC);
    if (source < 0) return -1;
    int failed = read_all(source, &word, sizeof word);
    close(source);
    int n = snprintf(to, room, "%s.%016llx.tmp", name, word);
    return failed || n < 0 || (size_t)n >= room ? -1 : 0;
}

void pl_cl_cache_write(const char *name, const unsigned char *binary, size_t size) {
    char path[PATH_SIZE], beside[128];
    int folder = open_folder(path);
    if (folder < 0) return;
    if (!random_name(name, beside, sizeof beside)) {
        int file =
            openat(folder, beside, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
        if (file >= 0) {
            file_header header = {.size = size, .checksum = pl_cl_hash(0, binary, size)};
            memcpy(header.magic, MAGIC, sizeof MAGIC);
            int good = !write_all(file, &header, sizeof header) && !write_all(file, binary, size);
            good = !close(file) && good;
            if (!good || renameat(folder, beside, folder, name)) unlinkat(folder, beside, 0);
        }
    }
    close(folder);
}
