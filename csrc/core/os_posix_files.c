/* The private files of os.h on systems of POSIX: folder and file belong to this user, nobody else
 * may write to them, and neither is a link. */
#ifndef _WIN32
#define _GNU_SOURCE
#include "os.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* Why an opened file or folder cannot be trusted; NULL if it can. */
static const char *distrust(const struct stat *status) {
    if (status->st_uid != geteuid()) return "belongs to another user";
    return status->st_mode & (S_IWGRP | S_IWOTH) ? "can be written to by other users" : NULL;
}

int pl_folder_open(pl_folder *folder, char *path, const char **reason) {
    *reason = NULL;
    for (char *slash = path + 1; (slash = strchr(slash, '/')); slash++) {
        *slash = 0;
        mkdir(path, 0700);
        *slash = '/';
    }
    if (mkdir(path, 0700) && errno != EEXIST) return -1;
    const int opened = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    struct stat status;
    if (opened < 0)
        *reason =
            errno == ELOOP || errno == ENOTDIR ? "is a link or no folder" : "cannot be opened";
    else if (fstat(opened, &status)) *reason = "cannot be examined";
    else *reason = distrust(&status);
    folder->descriptor = opened;
    if (!*reason) return 0;
    if (opened >= 0) close(opened);
    return -1;
}

void pl_folder_close(pl_folder *folder) { close(folder->descriptor); }

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

unsigned char *pl_file_read(const pl_folder *folder, const char *name, size_t most, size_t *size,
                            const char **reason) {
    *reason = NULL;
    /* O_NONBLOCK: a pipe must not block. */
    const int file =
        openat(folder->descriptor, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (file < 0) {
        if (errno == ELOOP) *reason = "is a link";
        return NULL;
    }
    unsigned char *data = NULL;
    struct stat status;
    if (!fstat(file, &status)) {
        *reason = S_ISREG(status.st_mode) ? distrust(&status) : "is no file";
        if (!*reason && status.st_size > 0 && (uint64_t)status.st_size <= most) {
            *size = (size_t)status.st_size;
            data = malloc(*size);
            if (data && read_all(file, data, *size)) {
                free(data);
                data = NULL;
            }
        }
    }
    close(file);
    return data;
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

void pl_file_write(const pl_folder *folder, const char *name, const void *head, size_t head_bytes,
                   const void *body, size_t body_bytes) {
    char beside[128];
    if (random_name(name, beside, sizeof beside)) return;
    const int at = folder->descriptor;
    const int file = openat(at, beside, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (file < 0) return;
    int good = !write_all(file, head, head_bytes) && !write_all(file, body, body_bytes);
    good = !close(file) && good;
    if (!good || renameat(at, beside, at, name)) unlinkat(at, beside, 0);
}
#endif
