/* Runs an elementwise function, written for LANES elements, over whole arrays. */
#ifndef PYLOSS_MAP_H
#define PYLOSS_MAP_H

#include "act.h"
#include "vec.h"

enum { MAX_LANES_ARGS = 4 };

/* An elementwise function: replaces its inputs v[0], v[1], ... by its outputs. `index` is the index
 * of the first of the LANES elements. */
typedef void (*lanes_fn)(vf *v, int64_t index, const void *constants);

INLINE void map_step(lanes_fn f, int inputs, const float *const *in, int outputs, float *const *out,
                     int64_t i, int64_t n, const void *constants) {
    vf v[MAX_LANES_ARGS];
    for (int j = 0; j < inputs; j++)
        v[j] = n == LANES ? vf_load(in[j] + i) : vf_load_part(in[j] + i, n, 0.0f);
    f(v, i, constants);
    for (int j = 0; j < outputs; j++) {
        if (n == LANES) vf_store(out[j] + i, v[j]);
        else vf_store_part(out[j] + i, v[j], n);
    }
}

/* Applies f to the elements [begin, end). Outputs may use the memory of inputs. */
INLINE void map(lanes_fn f, int inputs, const float *const *in, int outputs, float *const *out,
                int64_t begin, int64_t end, const void *constants) {
    int64_t i = begin;
    for (; i + LANES <= end; i += LANES) map_step(f, inputs, in, outputs, out, i, LANES, constants);
    if (i < end) map_step(f, inputs, in, outputs, out, i, end - i, constants);
}

/* The same for `act` arguments. */
INLINE void map_acts(lanes_fn f, int inputs, const pl_act *in, int outputs, const pl_act *out,
                     int64_t begin, int64_t end, const void *constants) {
    for (int64_t i = begin; i < end; i += LANES) {
        const int64_t n = end - i < LANES ? end - i : LANES;
        vf v[MAX_LANES_ARGS];
        for (int j = 0; j < inputs; j++) v[j] = act_load(in[j], i, n);
        f(v, i, constants);
        for (int j = 0; j < outputs; j++) act_store(out[j], i, v[j], n);
    }
}

#endif
