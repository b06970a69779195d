/* The counts of PYLOSS_PROFILE: calls, time and bytes of each operation, and of copies to and from
 * devices. */
#ifndef PYLOSS_BINDING_PROFILE_H
#define PYLOSS_BINDING_PROFILE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "../pyloss.h"

/* What is counted: the operations, by their numbers, then the copies. */
enum { PL_PROFILE_TO_DEVICES = PL_OP_COUNT, PL_PROFILE_FROM_DEVICES, PL_PROFILE_COUNT };

/* Whether calls are counted. */
int pl_profile_is_on(void);
/* The time; 0 while nothing is counted. */
int64_t pl_profile_begin(void);
/* Counts a call that began then; nothing for 0. */
void pl_profile_end(int entry, int64_t begin, int64_t bytes);
/* Switches counting on or off; returns {name: (calls, seconds, bytes)} of the calls so far, and
 * forgets them. */
PyObject *pl_profile_switch(int on);

#endif
