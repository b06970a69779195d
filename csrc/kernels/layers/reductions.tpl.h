/* Reductions of arrays [N] to one value: comparisons and the sum of squares. */
#ifndef PYLOSS_REDUCTIONS_TPL_H
#define PYLOSS_REDUCTIONS_TPL_H
#include "../kernel.h"
#include "../pieces.h"
#include "../simd/dot_f32.h"

/* same = 1 if x and y [N] have the same bits, else 0 */
static void same_bits_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const pl_call *c = context;
    const same_bits_args args = same_bits_args_of(c);
    const float *x = args.x, *y = args.y;
    uint8_t *same = args.same;
    if (memcmp(x + begin, y + begin, (size_t)(end - begin) * sizeof *x))
        __atomic_store_n(same, 0, __ATOMIC_RELAXED);
}
pl_status KERNEL(same_bits)(const pl_call *c) {
    const same_bits_args args = same_bits_args_of(c);
    *args.same = 1;
    pl_parallel(PL_DIM(c, 'N'), 8 * PIECE, same_bits_piece, c);
    return PL_OK;
}

typedef struct {
    const float *x;
    double *partial; /* [pieces] */
} square_job;

static void sum_squares_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const square_job *job = context;
    job->partial[begin / PIECE] = wide_dot(job->x + begin, job->x + begin, end - begin);
}

/* out[0] = sum of x^2 in float64 */
pl_status KERNEL(sum_squares)(const pl_call *c) {
    const sum_squares_args args = sum_squares_args_of(c);
    int64_t n = PL_DIM(c, 'N'), pieces = (n + PIECE - 1) / PIECE;
    square_job job = {args.x, pl_acquire((size_t)pieces * sizeof(double))};
    double *out = args.out;
    if (!job.partial) return PL_NO_MEMORY;
    pl_parallel(n, PIECE, sum_squares_piece, &job);
    *out = 0;
    for (int64_t i = 0; i < pieces; i++) *out += job.partial[i];
    pl_release(job.partial);
    return PL_OK;
}

#endif
