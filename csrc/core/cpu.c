/* The instruction sets of this processor, and the number of processors that this process may
 * use. */
#define _GNU_SOURCE
#include "../pyloss.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#ifdef __linux__
#include <sched.h>
#include <sys/syscall.h>
#endif
#ifdef PL_X86
#include <cpuid.h>
#endif

const pl_table *pl_table_at(int index) {
    const pl_table *found[8] = {&pl_table_baseline};
    int n = 1;
#ifdef PL_X86
    /* __builtin_cpu_supports also checks that the operating system saves the wide registers. */
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx2) found[n++] = &pl_table_avx2;
    if (avx512) found[n++] = &pl_table_avx512;
#endif
    return index >= 0 && index < n ? found[index] : NULL;
}

int pl_has_bf16_dots(void) {
#ifdef PL_X86
    return __builtin_cpu_supports("avx512bf16") != 0;
#else
    return 0;
#endif
}

int pl_has_int8_dots(int avx512) {
#ifdef PL_X86
    /* Not by __builtin_cpu_supports: some compilers do not know the newer name. The system's
     * support of the registers is that of the tables. */
    enum { AVX512_VNNI = 1 << 11, AVX_VNNI = 1 << 4 };
    static _Atomic int found[2]; /* 1 with a bit for yes: asking takes long in virtual machines */
    if (!found[!!avx512]) {
        unsigned a, b, c, d;
        const int yes = avx512 ? __get_cpuid_count(7, 0, &a, &b, &c, &d) && (c & AVX512_VNNI)
                               : __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & AVX_VNNI);
        found[!!avx512] = 1 | yes << 1;
    }
    return found[!!avx512] >> 1;
#else
    (void)avx512;
    return 0;
#endif
}

#if defined(PL_AMX) && defined(__linux__)
/* Bits of CPUID and of extended control register 0: "Intel Architecture Instruction Set
 * Extensions", chapter 3. The system call: Linux, Documentation/arch/x86/xstate.rst; its
 * permission holds for all threads and for forked children. */
const char *pl_amx_missing(int request) {
    enum { OSXSAVE = 1 << 27, AMX_BF16 = 1 << 22, AMX_TILE = 1 << 24 };
    enum { TILE_STATES = 3 << 17, TILE_DATA = 18, REQUEST_PERMISSION = 0x1023 };
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & AMX_TILE) || !(d & AMX_BF16))
        return "the processor has no amx_bf16";
    if (!pl_has_bf16_dots()) return "the processor has amx_bf16 without avx512_bf16";
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & OSXSAVE))
        return "the operating system saves no wide registers";
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & TILE_STATES) != TILE_STATES) return "the operating system saves no tile registers";
    if (request && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA))
        return "the operating system refuses the tile registers";
    return NULL;
}
#else
const char *pl_amx_missing(int request) {
    (void)request;
    return "this build has no amx_bf16";
}
#endif

int pl_cpu_count(void) {
    long n = sysconf(_SC_NPROCESSORS_ONLN);
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) n = CPU_COUNT(&set);
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
    if (quota > 0 && period > 0) {
        long limit = (long)(quota / period + 0.999);
        if (limit < 1) limit = 1;
        if (limit < n) n = limit;
    }
#endif
    return n < 1 ? 1 : (int)n;
}
