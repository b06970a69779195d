/* The clock of profiles. */
#include "../pyloss.h"

#include <time.h>

int64_t pl_nanoseconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}
