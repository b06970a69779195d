/* Rotary position embeddings (RoPE). */
#ifndef PYLOSS_ROPE_TPL_H
#define PYLOSS_ROPE_TPL_H
#include "../kernel.h"
#include "../pieces.h"
#include "../simd/vec.h"

INLINE void rope_step(const float *x, const float *cosine, const float *sine, float sign,
                      int64_t half, float *y, int64_t n) {
    vf a = vf_load_part(x, n, 0.0f), b = vf_load_part(x + half, n, 0.0f);
    vf c = vf_load_part(cosine, n, 0.0f), s = sign * vf_load_part(sine, n, 0.0f);
    vf_store_part(y, a * c - b * s, n);
    vf_store_part(y + half, b * c + a * s, n);
}

/* Rotates each pair (x[j], x[R + j]) by the angle of its position; the rest of a head, from 2 R on,
 * stays. With `inverse` it rotates back, which is also the gradient.
 * x, y [N,H,D], positions [N], cos, sin [P,R]; y may be x */
static void rope_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const pl_call *call = context;
    const rope_args args = rope_args_of(call);
    const int32_t *positions = args.positions;
    float sign = args.inverse ? -1.0f : 1.0f;
    int64_t heads = PL_DIM(call, 'H'), d = PL_DIM(call, 'D'), half = PL_DIM(call, 'R');
    for (int64_t i = begin; i < end; i++) {
        const float *cosine = args.cos + positions[i] * half;
        const float *sine = args.sin + positions[i] * half;
        for (int64_t h = 0; h < heads; h++) {
            const float *x = args.x + (i * heads + h) * d;
            float *y = args.y + (i * heads + h) * d;
            int64_t j = 0;
            for (; j + LANES <= half; j += LANES)
                rope_step(x + j, cosine + j, sine + j, sign, half, y + j, LANES);
            if (j < half) rope_step(x + j, cosine + j, sine + j, sign, half, y + j, half - j);
            if (y != x && 2 * half < d)
                memcpy(y + 2 * half, x + 2 * half, (size_t)(d - 2 * half) * sizeof *y);
        }
    }
}
pl_status KERNEL(rope)(const pl_call *c) {
    in_pieces(PL_DIM(c, 'N'), PL_DIM(c, 'H') * PL_DIM(c, 'D'), rope_piece, c);
    return PL_OK;
}

#endif
