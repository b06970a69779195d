/* How maps cut their work: a region of the elements for each thread. */
#ifndef PYLOSS_REGIONS_H
#define PYLOSS_REGIONS_H
#include "../pyloss.h"
#include "pieces.h"

/* Items in regions, one for each thread, cut into pieces. A thread takes the pieces of its own
 * region first, which its caches may hold from the last call, then those that others have left. The
 * pieces depend on the number of threads, so that each item must be computed for itself. */
enum { REGIONS = 64 };
typedef struct {
    int64_t next; /* the region's first item that is not taken yet */
    char line[56];
} region;
typedef struct {
    pl_range_fn fn;
    const void *context;
    int64_t n, grain, size, regions;
    region *at;
} region_job;

static void take_regions(const void *context, int64_t begin UNUSED, int64_t end UNUSED,
                         int worker) {
    const region_job *job = context;
    for (int64_t i = 0; i < job->regions; i++) {
        const int64_t own = (worker + i) % job->regions,
                      last = at_most((own + 1) * job->size, job->n);
        for (;;) {
            const int64_t first =
                own * job->size +
                __atomic_fetch_add(&job->at[own].next, job->grain, __ATOMIC_RELAXED);
            if (first >= last) break;
            job->fn(job->context, first, at_most(first + job->grain, last), worker);
        }
    }
}
/* For n independent items of `size` elements each. */
static void in_regions(int64_t n, int64_t size, pl_range_fn fn, const void *context) {
    /* Single elements: whole cache lines. */
    const int64_t least = grain_of(size), unit = size == 1 ? 64 : 1;
    const int64_t threads = at_most(at_most(pl_num_threads(), REGIONS), n / least);
    if (threads <= 1) {
        if (n) fn(context, 0, n, 0);
        return;
    }
    region_job job = {.fn = fn, .context = context, .n = n, .regions = threads};
    job.size = round_up((n + threads - 1) / threads, unit);
    job.grain = at_least(least, at_most(round_up(job.size / 4, unit), 8 * least));
    region at[REGIONS];
    for (int64_t i = 0; i < threads; i++) at[i].next = 0;
    job.at = at;
    pl_parallel(threads, 1, take_regions, &job);
}

#endif
