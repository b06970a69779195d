/* os.h on Windows 10 and later. */
#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#define _CRT_RAND_S /* rand_s */
#include "os.h"

#include "../pyloss.h"

#include <malloc.h>
#include <process.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <windows.h>

_Static_assert(sizeof(pl_mutex) == sizeof(SRWLOCK), "os.h declares it without windows.h");
_Static_assert(sizeof(pl_condition) == sizeof(CONDITION_VARIABLE), "as for pl_mutex");

void pl_lock(pl_mutex *mutex) { AcquireSRWLockExclusive((SRWLOCK *)mutex); }
int pl_try_lock(pl_mutex *mutex) { return TryAcquireSRWLockExclusive((SRWLOCK *)mutex); }
void pl_unlock(pl_mutex *mutex) { ReleaseSRWLockExclusive((SRWLOCK *)mutex); }
void pl_mutex_init(pl_mutex *mutex) { InitializeSRWLock((SRWLOCK *)mutex); }
void pl_condition_init(pl_condition *condition) {
    InitializeConditionVariable((CONDITION_VARIABLE *)condition);
}
void pl_wait(pl_condition *condition, pl_mutex *mutex) {
    SleepConditionVariableSRW((CONDITION_VARIABLE *)condition, (SRWLOCK *)mutex, INFINITE, 0);
}
void pl_wake_all(pl_condition *condition) {
    WakeAllConditionVariable((CONDITION_VARIABLE *)condition);
}
int pl_thread_start(pl_thread *thread, pl_thread_main main, void *argument) {
    *thread = (pl_thread)_beginthreadex(NULL, 0, main, argument, 0, NULL);
    return *thread ? 0 : -1;
}
void pl_thread_join(pl_thread thread) {
    WaitForSingleObject(thread, INFINITE);
    CloseHandle(thread);
}
void pl_yield(void) { SwitchToThread(); }
void pl_at_fork(void (*before)(void), void (*in_parent)(void), void (*in_child)(void)) {
    (void)before, (void)in_parent, (void)in_child;
}

void *pl_heap_take(size_t align, size_t bytes) { return _aligned_malloc(bytes, align); }
void pl_heap_free(void *p) { _aligned_free(p); }

/* VirtualAlloc gives multiples of 64 KiB. Alignment beyond that only serves huge pages, which a
 * process needs a privilege for, so it is not kept. */
void *pl_pages_take(size_t align, size_t bytes, size_t huge) {
    (void)align, (void)huge;
    return VirtualAlloc(NULL, bytes, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE);
}
void pl_pages_free(void *p, size_t bytes) {
    (void)bytes;
    VirtualFree(p, 0, MEM_RELEASE);
}
void *pl_pages_resize(void *p, size_t from, size_t to) {
    (void)p, (void)from, (void)to;
    return NULL;
}

int64_t pl_nanoseconds(void) {
    LARGE_INTEGER ticks, rate;
    QueryPerformanceCounter(&ticks);
    QueryPerformanceFrequency(&rate);
    const int64_t whole = ticks.QuadPart / rate.QuadPart, rest = ticks.QuadPart % rate.QuadPart;
    return whole * 1000000000 + rest * 1000000000 / rate.QuadPart;
}

/* A name without a folder is not looked for in the working directory. */
void *pl_library_open(const char *name) {
    const int placed = strpbrk(name, "/\\") != NULL;
    return (void *)LoadLibraryExA(name, NULL, placed ? 0 : LOAD_LIBRARY_SEARCH_DEFAULT_DIRS);
}
void *pl_library_symbol(void *library, const char *name) {
    FARPROC found = GetProcAddress((HMODULE)library, name);
    void *p;
    memcpy(&p, &found, sizeof p);
    return p;
}

int pl_saves_zmm(uint32_t enabled) {
    enum { ZMM_STATES = 7 << 5 };
    return (enabled & ZMM_STATES) == ZMM_STATES;
}
int pl_has_dotprod(void) {
    enum { ARM_V82_DP_INSTRUCTIONS_AVAILABLE = 43 };
    return IsProcessorFeaturePresent(ARM_V82_DP_INSTRUCTIONS_AVAILABLE) != 0;
}
int pl_request_tiles(void) { return -1; }

int pl_cpu_count(void) {
    DWORD_PTR own, all;
    int n = (int)GetActiveProcessorCount(ALL_PROCESSOR_GROUPS);
    /* Of a process in several groups the masks are 0. */
    if (GetProcessAffinityMask(GetCurrentProcess(), &own, &all) && own) {
        n = 0;
        for (; own; own &= own - 1) n++;
    }
    return n < 1 ? 1 : n;
}

/* ---- private files. The folders of LOCALAPPDATA are their user's by the access lists that they
 * inherit, so only links are refused here. */

static int is_link(const char *path) {
    const DWORD attributes = GetFileAttributesA(path);
    return attributes != INVALID_FILE_ATTRIBUTES && (attributes & FILE_ATTRIBUTE_REPARSE_POINT);
}

int pl_folder_open(pl_folder *folder, char *path, const char **reason) {
    *reason = NULL;
    for (char *p = path + 1; *p; p++) {
        if (*p != '/' && *p != '\\') continue;
        const char slash = *p;
        *p = 0;
        CreateDirectoryA(path, NULL);
        *p = slash;
    }
    if (!CreateDirectoryA(path, NULL) && GetLastError() != ERROR_ALREADY_EXISTS) return -1;
    const DWORD attributes = GetFileAttributesA(path);
    if (attributes == INVALID_FILE_ATTRIBUTES) *reason = "cannot be examined";
    else if (!(attributes & FILE_ATTRIBUTE_DIRECTORY) || is_link(path))
        *reason = "is a link or no folder";
    folder->path = path;
    return *reason ? -1 : 0;
}
void pl_folder_close(pl_folder *folder) { (void)folder; }

enum { PATH_SIZE = 1200 };

unsigned char *pl_file_read(const pl_folder *folder, const char *name, size_t most, size_t *size,
                            const char **reason) {
    char path[PATH_SIZE];
    *reason = NULL;
    if ((size_t)snprintf(path, sizeof path, "%s/%s", folder->path, name) >= sizeof path)
        return NULL;
    if (is_link(path)) {
        *reason = "is a link";
        return NULL;
    }
    FILE *file = fopen(path, "rb");
    if (!file) return NULL;
    unsigned char *data = NULL;
    long long bytes = _fseeki64(file, 0, SEEK_END) ? -1 : _ftelli64(file);
    if (bytes > 0 && (unsigned long long)bytes <= most && !_fseeki64(file, 0, SEEK_SET)) {
        *size = (size_t)bytes;
        data = malloc(*size);
        if (data && fread(data, 1, *size, file) != *size) {
            free(data);
            data = NULL;
        }
    }
    fclose(file);
    return data;
}

void pl_file_write(const pl_folder *folder, const char *name, const void *head, size_t head_bytes,
                   const void *body, size_t body_bytes) {
    char path[PATH_SIZE], beside[PATH_SIZE];
    unsigned high, low;
    if (rand_s(&high) || rand_s(&low)) return;
    if ((size_t)snprintf(path, sizeof path, "%s/%s", folder->path, name) >= sizeof path ||
        (size_t)snprintf(beside, sizeof beside, "%s.%08x%08x.tmp", path, high, low) >=
            sizeof beside)
        return;
    FILE *file = fopen(beside, "wbx");
    if (!file) return;
    int good = fwrite(head, 1, head_bytes, file) == head_bytes &&
               fwrite(body, 1, body_bytes, file) == body_bytes;
    good = !fclose(file) && good;
    if (!good || !MoveFileExA(beside, path, MOVEFILE_REPLACE_EXISTING)) DeleteFileA(beside);
}
#endif
