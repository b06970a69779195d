/* The precision of dense layers, and by tiles of attention: a setting of the process, read only by
 * their kernels. */
#include "../pyloss.h"

#include <stdatomic.h>

const char *const pl_precision_names[] = {"float32",
                                          "bfloat16",
                                          "bfloat16-emulated",
                                          "bfloat16-tiles",
                                          "bfloat16-tiles-emulated",
                                          "int8",
                                          "int8-emulated",
                                          "int8-tiles",
                                          NULL};

static _Atomic int chosen = PL_FLOAT32;
static _Thread_local int tried = -1; /* of this thread's calls, instead of `chosen` */

pl_precision pl_matmul_precision(void) {
    if (tried >= 0) return (pl_precision)tried;
    return (pl_precision)atomic_load_explicit(&chosen, memory_order_relaxed);
}
void pl_set_matmul_precision(pl_precision precision) {
    atomic_store_explicit(&chosen, (int)precision, memory_order_relaxed);
}
void pl_try_matmul_precision(int precision) { tried = precision; }
