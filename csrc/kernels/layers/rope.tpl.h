/* Rotary position embeddings (RoPE). */
#ifndef PYLOSS_ROPE_TPL_H
#define PYLOSS_ROPE_TPL_H
#include "../kernel.h"
#include "../pieces.h"
#include "../simd/act.h"
#include "../simd/vec.h"

INLINE void rope_step(pl_act x, const float *cosine, const float *sine, float sign, int64_t half,
                      pl_act y, int64_t at, int64_t n) {
    vf a = act_load(x, at, n), b = act_load(x, at + half, n);
    vf c = vf_load_part(cosine + at, n, 0.0f), s = sign * vf_load_part(sine + at, n, 0.0f);
    act_store(y, at, a * c - b * s, n);
    act_store(y, at + half, b * c + a * s, n);
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
            const pl_act x = act_at(args.x, (i * heads + h) * d),
                         y = act_at(args.y, (i * heads + h) * d);
            int64_t j = 0;
            for (; j + LANES <= half; j += LANES)
                rope_step(x, cosine, sine, sign, half, y, j, LANES);
            if (j < half) rope_step(x, cosine, sine, sign, half, y, j, half - j);
            if (y.data != x.data && 2 * half < d)
                act_copy(act_at(x, 2 * half), d - 2 * half, act_at(y, 2 * half));
        }
    }
}
pl_status KERNEL(rope)(const pl_call *c) {
    in_pieces(PL_DIM(c, 'N'), PL_DIM(c, 'H') * PL_DIM(c, 'D'), rope_piece, c);
    return PL_OK;
}

#endif
