/* How kernels cut their work for pl_parallel. Pieces depend on shapes alone, never on the number of
 * threads. */
#ifndef PYLOSS_PIECES_H
#define PYLOSS_PIECES_H
#include "simd/vec.h"

/* Elements of a piece: 32 KB, so that small calls run inline. */
enum { PIECE = 8192 };

INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
/* How many items of `size` elements make a piece. */
INLINE int64_t grain_of(int64_t size) { return size >= PIECE ? 1 : PIECE / (size > 0 ? size : 1); }

#endif
