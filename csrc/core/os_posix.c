/* os.h on Linux, macOS and other systems of POSIX, without its private files. */
#ifndef _WIN32
#define _GNU_SOURCE
#include "os.h"

#include "../pyloss.h"

#include <dlfcn.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/auxv.h>
#include <sys/syscall.h>
#endif
#ifdef __APPLE__
#include <sys/sysctl.h>
#endif

void pl_lock(pl_mutex *mutex) { pthread_mutex_lock(mutex); }
int pl_try_lock(pl_mutex *mutex) { return !pthread_mutex_trylock(mutex); }
void pl_unlock(pl_mutex *mutex) { pthread_mutex_unlock(mutex); }
void pl_mutex_init(pl_mutex *mutex) {
    const pl_mutex fresh = PL_MUTEX;
    *mutex = fresh;
}
void pl_condition_init(pl_condition *condition) {
    const pl_condition fresh = PL_CONDITION;
    *condition = fresh;
}
void pl_wait(pl_condition *condition, pl_mutex *mutex) { pthread_cond_wait(condition, mutex); }
void pl_wake_all(pl_condition *condition) { pthread_cond_broadcast(condition); }
int pl_thread_start(pl_thread *thread, pl_thread_main main, void *argument) {
    return pthread_create(thread, NULL, main, argument) ? -1 : 0;
}
void pl_thread_join(pl_thread thread) { pthread_join(thread, NULL); }
void pl_yield(void) { sched_yield(); }
void pl_at_fork(void (*before)(void), void (*in_parent)(void), void (*in_child)(void)) {
    pthread_atfork(before, in_parent, in_child);
}

void *pl_heap_take(size_t align, size_t bytes) {
    void *p;
    return posix_memalign(&p, align, bytes) ? NULL : p;
}
void pl_heap_free(void *p) { free(p); }

void *pl_pages_take(size_t align, size_t bytes, size_t huge) {
    const long page = sysconf(_SC_PAGESIZE);
    const size_t spare = align > (size_t)page ? align : 0;
    char *p = mmap(NULL, bytes + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return NULL;
    if (spare) {
        const size_t before = -(uintptr_t)p & (align - 1);
        if (before) munmap(p, before);
        if (before < spare) munmap(p + before + bytes, spare - before);
        p += before;
    }
#ifdef MADV_HUGEPAGE
    if (huge) madvise(p, huge, MADV_HUGEPAGE);
#else
    (void)huge;
#endif
    return p;
}
void pl_pages_free(void *p, size_t bytes) { munmap(p, bytes); }
void *pl_pages_resize(void *p, size_t from, size_t to) {
#ifdef MREMAP_MAYMOVE
    void *moved = mremap(p, from, to, MREMAP_MAYMOVE);
    return moved == MAP_FAILED ? NULL : moved;
#else
    (void)p, (void)from, (void)to;
    return NULL;
#endif
}

int64_t pl_nanoseconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}
void *pl_library_open(const char *name) { return dlopen(name, RTLD_NOW | RTLD_LOCAL); }
void *pl_library_symbol(void *library, const char *name) { return dlsym(library, name); }

int pl_saves_zmm(uint32_t enabled) {
    enum { ZMM_STATES = 7 << 5 };
#ifdef __APPLE__
    /* The system saves them from a thread's first use on, and only then shows it. */
    int has = 0;
    size_t size = sizeof has;
    (void)enabled;
    return !sysctlbyname("hw.optional.avx512f", &has, &size, NULL, 0) && has;
#else
    return (enabled & ZMM_STATES) == ZMM_STATES;
#endif
}

/* Linux, Documentation/arch/arm64/elf_hwcaps.rst. */
int pl_has_dotprod(void) {
#if defined(__linux__) && defined(__aarch64__)
    enum { ASIMDDP = 1 << 20 };
    return (getauxval(AT_HWCAP) & ASIMDDP) != 0;
#elif defined(__APPLE__) && defined(__aarch64__)
    int has = 0;
    size_t size = sizeof has;
    return !sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, NULL, 0) && has;
#else
    return 0;
#endif
}

/* Linux, Documentation/arch/x86/xstate.rst. */
int pl_request_tiles(void) {
#if defined(__linux__) && defined(SYS_arch_prctl)
    enum { TILE_DATA = 18, REQUEST_PERMISSION = 0x1023 };
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) ? -1 : 0;
#else
    return -1;
#endif
}

#ifdef __linux__
/* How many processors the control group's quota amounts to, or 0. */
static double quota_of_group(void) {
    double quota = 0, period = 0;
    FILE *f = fopen("/sys/fs/cgroup/cpu.max", "r"); /* cgroup v2: "quota period" or "max period" */
    if (f) {
        if (fscanf(f, "%lf %lf", &quota, &period) != 2) quota = 0;
        fclose(f);
    } else { /* cgroup v1; a quota of -1 means none */
        if ((f = fopen("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "r"))) {
            if (fscanf(f, "%lf", &quota) != 1) quota = 0;
            fclose(f);
        }
        if ((f = fopen("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "r"))) {
            if (fscanf(f, "%lf", &period) != 1) period = 0;
            fclose(f);
        }
    }
    return quota > 0 && period > 0 ? quota / period : 0;
}
#endif

int pl_cpu_count(void) {
    long n = sysconf(_SC_NPROCESSORS_ONLN);
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) n = CPU_COUNT(&set);
    const double quota = quota_of_group();
    if (quota > 0) {
        long limit = (long)(quota + 0.999);
        if (limit < 1) limit = 1;
        if (limit < n) n = limit;
    }
#endif
    return n < 1 ? 1 : (int)n;
}
#endif
