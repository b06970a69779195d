/* How kernels cut their work for pl_parallel. Pieces depend on shapes alone, never on the number of
 * threads. */
#ifndef PYLOSS_PIECES_H
#define PYLOSS_PIECES_H
#include "simd/vec.h"

/* Elements of a piece: at most 32 KB, so that small calls run inline. Large calls have enough
 * pieces for 64 threads, of 4 KB at least. */
enum { PIECE = 8192, LEAST_PIECE = 1024, WANTED_PIECES = 256 };

INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
/* How many items of `size` elements make a piece. */
INLINE int64_t grain_of(int64_t size) { return size >= PIECE ? 1 : PIECE / (size > 0 ? size : 1); }
/* How many of n independent items of `size` elements make a piece. */
INLINE int64_t grain_for(int64_t n, int64_t size) {
    const int64_t most = grain_of(size), least = at_least(LEAST_PIECE / at_least(size, 1), 1);
    if (n <= most) return most;
    const int64_t grain = at_least(n / WANTED_PIECES, least);
    /* Single elements: whole cache lines. */
    return at_most(size == 1 ? round_up(grain, 64) : grain, most);
}
INLINE void in_pieces(int64_t n, int64_t size, pl_range_fn fn, const void *context) {
    pl_parallel(n, grain_for(n, size), fn, context);
}

#endif
