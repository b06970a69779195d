/* The instruction sets of this processor, and the number of processors that this process may
 * use. */
#define _GNU_SOURCE
#include "../pyloss.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#ifdef __linux__
#include <sched.h>
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
