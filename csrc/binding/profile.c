/* Counts calls and their time. */
#include "profile.h"

#include <string.h>

static struct { int64_t calls, nanoseconds, bytes; } profile[PL_PROFILE_COUNT];
static int profiling;

static const char *const names[PL_PROFILE_COUNT] = {
#define PL_OP(name, spec) #name,
#include "../ops.def"
    [PL_PROFILE_TO_DEVICES] = "copied to devices",
    [PL_PROFILE_FROM_DEVICES] = "copied from devices",
};

int pl_profile_is_on(void) { return profiling; }

int64_t pl_profile_begin(void) { return profiling ? pl_nanoseconds() : 0; }

void pl_profile_end(int entry, int64_t begin, int64_t bytes) {
    if (!profiling || !begin) return;
    profile[entry].calls++;
    profile[entry].nanoseconds += pl_nanoseconds() - begin;
    profile[entry].bytes += bytes;
}

PyObject *pl_profile_switch(int on) {
    PyObject *counts = PyDict_New();
    for (int i = 0; counts && i < PL_PROFILE_COUNT; i++) {
        if (!profile[i].calls) continue;
        PyObject *row =
            Py_BuildValue("(LdL)", (long long)profile[i].calls,
                          1e-9 * (double)profile[i].nanoseconds, (long long)profile[i].bytes);
        if (!row || PyDict_SetItemString(counts, names[i], row)) Py_CLEAR(counts);
        Py_XDECREF(row);
    }
    memset(profile, 0, sizeof profile);
    profiling = on;
    return counts;
}
