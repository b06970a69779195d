/* Included first by every file that defines kernels: the C contract, the name of a kernel in the
 * instruction set that is compiled, and the arguments of the operations by name. */
#ifndef PYLOSS_KERNEL_H
#define PYLOSS_KERNEL_H
#include "../pyloss.h"
#include "args.h"

#define PL_CAT_(a, b) a##b
#define PL_CAT(a, b) PL_CAT_(a, b)
#define PL_STR_(a) #a
#define PL_STR(a) PL_STR_(a)

/* rope_avx2, say. Kernels are the only symbols that their objects share, and are hidden, so that
 * the linker reports a missing one. Everything else is static: a function of the same name in two
 * objects could be taken from the one with wider instructions. */
#define KERNEL(name) PL_CAT(name##_, PL_ISA)
#define PL_OP(name, spec) \
    __attribute__((visibility("hidden"))) pl_status KERNEL(name)(const pl_call *call);
#include "../ops.def"

#endif
