/* What PYLOSS_OPENCL_PROFILE prints: the time of each command by the device's own clock, from
 * events of queues that keep these times; the builds of programs, with the compiler's remarks. */
#include "profile.h"

#include <stdlib.h>
#include <string.h>

/* Commands whose events are not read yet. A full list is read at once. */
enum { MOST_PENDING = 4096 };

static struct {
    pl_mutex lock;
    int on;
    pl_cl_profile found;
    struct {
        cl_event event;
        pl_cl_device *device;
        size_t command; /* of found.commands */
    } pending[MOST_PENDING];
    int pending_count;
} profile = {.lock = PL_MUTEX};

int pl_cl_profiling(void) { return __atomic_load_n(&profile.on, __ATOMIC_RELAXED); }

/* Room for one more item of `size` bytes in a list whose room is a power of two. */
static void *grown(void *list, size_t count, size_t size) {
    if (count & (count - 1)) return list;
    return realloc(list, size * (count ? 2 * count : 1));
}

/* ---- commands */

/* The number of a command's entry; -1 without memory. */
static ptrdiff_t entry_of(const char *operation, const char *command) {
    pl_cl_profile *found = &profile.found;
    for (size_t i = 0; i < found->command_count; i++)
        if (!strcmp(found->commands[i].operation, operation) &&
            !strcmp(found->commands[i].command, command))
            return (ptrdiff_t)i;
    void *list = grown(found->commands, found->command_count, sizeof *found->commands);
    if (!list) return -1;
    found->commands = list;
    found->commands[found->command_count] = (pl_cl_command_time){operation, command, 0, 0, 0};
    return (ptrdiff_t)found->command_count++;
}

/* Adds the times of pending commands to their entries; waits until they have ended. */
static void read_pending(void) {
    for (int i = 0; i < profile.pending_count; i++) {
        pl_cl_device *device = profile.pending[i].device;
        cl_event event = profile.pending[i].event;
        cl_ulong begin, end;
        if (!pl_cl.WaitForEvents(1, &event) &&
            !pl_cl.GetEventProfilingInfo(event, CL_PROFILING_COMMAND_START, sizeof begin, &begin,
                                         NULL) &&
            !pl_cl.GetEventProfilingInfo(event, CL_PROFILING_COMMAND_END, sizeof end, &end, NULL)) {
            profile.found.commands[profile.pending[i].command].nanoseconds +=
                (int64_t)(end - begin);
            if (!device->profiled_end) device->profiled_begin = begin;
            if (end > device->profiled_end) device->profiled_end = end;
        }
        pl_cl.ReleaseEvent(event);
    }
    profile.pending_count = 0;
}

cl_event *pl_cl_profile_room(const pl_cl_device *device, cl_event *room) {
    *room = NULL;
    return pl_cl_profiling() && device->profiled ? room : NULL;
}

void pl_cl_profile_command(pl_cl_device *device, cl_event event, const char *operation,
                           const char *command, size_t bytes) {
    if (!event) return;
    pl_lock(&profile.lock);
    const ptrdiff_t at = entry_of(operation, command);
    if (at < 0) {
        pl_cl.ReleaseEvent(event);
    } else {
        profile.found.commands[at].calls++;
        profile.found.commands[at].bytes += (int64_t)bytes;
        const int i = profile.pending_count++;
        profile.pending[i].event = event;
        profile.pending[i].device = device;
        profile.pending[i].command = (size_t)at;
        if (profile.pending_count == MOST_PENDING) read_pending();
    }
    pl_unlock(&profile.lock);
}

/* ---- builds */

void pl_cl_profile_build(const char *program, const char *options, int cached, int64_t nanoseconds,
                         char *log) {
    pl_lock(&profile.lock);
    pl_cl_profile *found = &profile.found;
    char *copy = strdup(options);
    void *list = copy ? grown(found->builds, found->build_count, sizeof *found->builds) : NULL;
    if (list) {
        found->builds = list;
        found->builds[found->build_count++] =
            (pl_cl_build_time){program, copy, log, cached, nanoseconds};
    } else {
        free(copy);
        free(log);
    }
    pl_unlock(&profile.lock);
}

/* ---- the whole */

pl_cl_profile pl_cl_profile_switch(int on) {
    pl_lock(&profile.lock);
    /* A forked child must not use the library. */
    if (pl_cl_forked()) profile.pending_count = 0;
    read_pending();
    pl_cl_profile found = profile.found;
    profile.found = (pl_cl_profile){0};
    __atomic_store_n(&profile.on, on, __ATOMIC_RELAXED);
    for (pl_cl_device *device = pl_cl_opened(); device; device = device->next) {
        found.span += (int64_t)(device->profiled_end - device->profiled_begin);
        device->profiled_begin = device->profiled_end = 0;
    }
    pl_unlock(&profile.lock);
    return found;
}

void pl_cl_profile_free(pl_cl_profile *found) {
    for (size_t i = 0; i < found->build_count; i++) {
        free(found->builds[i].options);
        free(found->builds[i].log);
    }
    free(found->builds);
    free(found->commands);
}
