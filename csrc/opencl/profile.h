/* The profile of devices: times of their commands, and builds of programs. Nothing is kept while it
 * is off. */
#ifndef PYLOSS_CL_PROFILE_H
#define PYLOSS_CL_PROFILE_H

#include "runtime.h"

/* All commands of one kind. */
typedef struct {
    const char *operation, *command; /* constants; a copy has the operation "" */
    int64_t calls, bytes;            /* bytes: of copies */
    int64_t nanoseconds;
} pl_cl_command_time;

/* A program that was built or came from the cache on disk. */
typedef struct {
    const char *program; /* a constant */
    char *options, *log; /* log: the compiler's remarks; NULL: none */
    int cached;
    int64_t nanoseconds; /* of the host */
} pl_cl_build_time;

typedef struct {
    pl_cl_command_time *commands;
    pl_cl_build_time *builds;
    size_t command_count, build_count;
    int64_t span; /* nanoseconds from the first command's begin to the last one's end */
} pl_cl_profile;

int pl_cl_profiling(void);
/* Switches the profile on or off, for devices opened from now on and for queues of other libraries
 * that keep times. Waits for the devices; returns what was kept so far and forgets it. */
pl_cl_profile pl_cl_profile_switch(int on);
void pl_cl_profile_free(pl_cl_profile *found);

/* Where an enqueued command puts its event, which is `room`; NULL if it needs none. */
cl_event *pl_cl_profile_room(const pl_cl_device *device, cl_event *room);
/* Keeps a command, and takes over its event; nothing for NULL. */
void pl_cl_profile_command(pl_cl_device *device, cl_event event, const char *operation,
                           const char *command, size_t bytes);
/* Keeps a build, and takes over its malloc'd log. */
void pl_cl_profile_build(const char *program, const char *options, int cached, int64_t nanoseconds,
                         char *log);

#endif
