/* What differs between operating systems: threads, memory, the clock, libraries found at run time,
 * processors and private files. os_posix.c and os_windows.c have it, and os_posix_files.c; no other
 * file includes a header of a system. */
#ifndef PYLOSS_OS_H
#define PYLOSS_OS_H

#include <stddef.h>
#include <stdint.h>

/* ---- threads. Locks and conditions need no freeing. */

#ifdef _WIN32
typedef struct {
    void *word;
} pl_mutex; /* an SRWLOCK */
typedef struct {
    void *word;
} pl_condition; /* a CONDITION_VARIABLE */
typedef void *pl_thread;
typedef unsigned pl_thread_result;
#define PL_THREAD_CALL __stdcall
#define PL_MUTEX \
    { 0 }
#define PL_CONDITION \
    { 0 }
#else
#include <pthread.h>
typedef pthread_mutex_t pl_mutex;
typedef pthread_cond_t pl_condition;
typedef pthread_t pl_thread;
typedef void *pl_thread_result;
#define PL_THREAD_CALL
#define PL_MUTEX PTHREAD_MUTEX_INITIALIZER
#define PL_CONDITION PTHREAD_COND_INITIALIZER
#endif

typedef pl_thread_result(PL_THREAD_CALL *pl_thread_main)(void *argument);

void pl_lock(pl_mutex *mutex);
/* Whether the lock was free and is now held. */
int pl_try_lock(pl_mutex *mutex);
void pl_unlock(pl_mutex *mutex);
/* Makes a mutex or a condition, or one anew that a forked child has got in any state. */
void pl_mutex_init(pl_mutex *mutex);
void pl_condition_init(pl_condition *condition);
void pl_wait(pl_condition *condition, pl_mutex *mutex);
void pl_wake_all(pl_condition *condition);
/* 0, or -1 if the system refuses. */
int pl_thread_start(pl_thread *thread, pl_thread_main main, void *argument);
void pl_thread_join(pl_thread thread);
void pl_yield(void);
/* Calls around each fork; any of them may be NULL. Windows has no fork. */
void pl_at_fork(void (*before)(void), void (*in_parent)(void), void (*in_child)(void));

/* Tells the processor that a loop waits. */
#if defined(__x86_64__)
#include <immintrin.h>
#define PL_RELAX() _mm_pause()
#elif defined(__aarch64__)
#define PL_RELAX() __asm__ volatile("yield")
#else
#define PL_RELAX() (void)0
#endif

/* Runs a function `static void name(void)` when the library is loaded. */
#define PL_AT_LOAD __attribute__((constructor))

/* ---- memory */

/* Aligned memory of the heap; `align` is a power of two. NULL if there is none. */
void *pl_heap_take(size_t align, size_t bytes);
void pl_heap_free(void *p);
/* Cleared pages from the system, at a multiple of `align`, at least 4096. The first `huge` bytes
 * should be huge pages where the system has them. NULL if there is no memory. */
void *pl_pages_take(size_t align, size_t bytes, size_t huge);
void pl_pages_free(void *p, size_t bytes);
/* Resizes pages, which keep their content. NULL if the system cannot; they stay as they are. */
void *pl_pages_resize(void *p, size_t from, size_t to);

/* ---- libraries found at run time. The clock of pyloss.h is here, too. */

void *pl_library_open(const char *name);
void *pl_library_symbol(void *library, const char *name);

/* ---- processors. pl_cpu_count of pyloss.h is here, too. */

/* Whether the system saves the registers of AVX-512, which the processor has. `enabled` are the
 * states that it saves so far (extended control register 0). */
int pl_saves_zmm(uint32_t enabled);
/* Whether an arm64 processor has the instructions of dotprod, as the system says. */
int pl_has_dotprod(void);
/* Asks the system for the tile unit, for all threads and forked children; 0 if it gives it. */
int pl_request_tiles(void);

/* ---- private files: a folder that only this user can write to, and files in it. Functions that
 * fail set *reason: why nothing there can be trusted, or NULL if it does not matter. */

typedef struct {
#ifdef _WIN32
    const char *path;
#else
    int descriptor;
#endif
} pl_folder;

/* Makes the folder at `path`, with the folders above it, and opens it; 0 or -1. Files are opened
 * through it alone, so that a folder put in its place later is not used. `path` must last. */
int pl_folder_open(pl_folder *folder, char *path, const char **reason);
void pl_folder_close(pl_folder *folder);
/* The whole file, malloc'd; NULL if there is none, or it has over `most` bytes. */
unsigned char *pl_file_read(const pl_folder *folder, const char *name, size_t most, size_t *size,
                            const char **reason);
/* Writes a file of two parts under a random name, then renames it. A failure leaves nothing. */
void pl_file_write(const pl_folder *folder, const char *name, const void *head, size_t head_bytes,
                   const void *body, size_t body_bytes);

#endif
