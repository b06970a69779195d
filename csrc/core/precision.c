/* The precision of dense layers: a setting of the process, read only by their kernels. */
#include "../pyloss.h"

#include <stdatomic.h>

const char *const pl_precision_names[] = {"float32", "bfloat16", "bfloat16-emulated", NULL};

static _Atomic int chosen = PL_FLOAT32;

pl_precision pl_matmul_precision(void) {
    return (pl_precision)atomic_load_explicit(&chosen, memory_order_relaxed);
}
void pl_set_matmul_precision(pl_precision precision) {
    atomic_store_explicit(&chosen, (int)precision, memory_order_relaxed);
}
