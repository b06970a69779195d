/* Kernel calls with arguments in bfloat16 that the kernel takes in float32. */
#ifndef PYLOSS_BINDING_WIDENED_H
#define PYLOSS_BINDING_WIDENED_H

#include "spec.h"

/* Runs the kernel of a checked call; touches no Python. */
pl_status pl_run_widened(int op, const pl_spec *spec, pl_call *call);

#endif
