/* Products in int8: the entry into their unit, which is compiled apart, with and without the
 * processor's instructions for dots of bytes. */
#ifndef PYLOSS_INT8_H
#define PYLOSS_INT8_H
#include "../kernel.h"
#include "product.h"

#define INT8_PLAIN_RUN KERNEL(int8_run)
#define INT8_DOTS_RUN KERNEL(int8_dots_run)
#ifdef PL_DOTS
#define INT8_RUN INT8_DOTS_RUN
#else
#define INT8_RUN INT8_PLAIN_RUN
#endif

/* Whether this build and instruction set have the instructions; see pl_int8_dots. */
#if (PL_BYTES == 64 && defined(PL_AVX512_VNNI)) || (PL_BYTES == 32 && defined(PL_AVX_VNNI)) || \
    (PL_BYTES == 16 && defined(PL_DOTPROD))
enum { INT8_DOTS_COMPILED = 1 };
#define INT8_QUICKEST_RUN INT8_DOTS_RUN
#else
enum { INT8_DOTS_COMPILED = 0 };
#define INT8_QUICKEST_RUN INT8_PLAIN_RUN
#endif

/* Runs the products of `groups` whose form is INT8 or INT8_DOTS; the latter by INT8_DOTS_RUN. The
 * rows L of their low-rank branches are given. */
__attribute__((visibility("hidden"))) pl_status INT8_PLAIN_RUN(const gemm *groups, int64_t count);
__attribute__((visibility("hidden"))) pl_status INT8_DOTS_RUN(const gemm *groups, int64_t count);

#endif
