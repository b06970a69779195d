/* Vectors of `act` arguments, which are float32 or bfloat16. */
#ifndef PYLOSS_ACT_H
#define PYLOSS_ACT_H
#include "../../pyloss.h"
#include "narrow.h"

INLINE pl_act act_of_floats(const float *data) { return (pl_act){(void *)(uintptr_t)data, 0}; }
/* Elements from `i` on. */
INLINE pl_act act_at(pl_act a, int64_t i) {
    return (pl_act){(char *)a.data + i * (a.narrow ? 2 : 4), a.narrow};
}
/* Elements [i, i + n), at most LANES, and zeros. */
INLINE vf act_load(pl_act a, int64_t i, int64_t n) {
    if (!a.narrow)
        return n == LANES ? vf_load((const float *)a.data + i)
                          : vf_load_part((const float *)a.data + i, n, 0);
    const uint16_t *p = (const uint16_t *)a.data + i;
    if (n == LANES) return vf_from_bf16((const uint8_t *)p);
    uint16_t part[LANES] = {0};
    memcpy(part, p, (size_t)n * sizeof *p);
    return vf_from_bf16((const uint8_t *)part);
}
INLINE void act_store(pl_act a, int64_t i, vf v, int64_t n) {
    if (!a.narrow) {
        if (n == LANES) vf_store((float *)a.data + i, v);
        else vf_store_part((float *)a.data + i, v, n);
        return;
    }
    uint16_t *p = (uint16_t *)a.data + i, part[LANES];
    if (n == LANES) {
        vf_to_bf16(p, v);
        return;
    }
    vf_to_bf16(part, v);
    memcpy(p, part, (size_t)n * sizeof *p);
}
/* to[0, n) = from[0, n) */
INLINE void act_copy(pl_act from, int64_t n, pl_act to) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) act_store(to, i, act_load(from, i, LANES), LANES);
    if (i < n) act_store(to, i, act_load(from, i, n - i), n - i);
}

/* n elements as floats: in place, or expanded into `buffer`. */
INLINE const float *act_floats(pl_act a, int64_t n, float *buffer) {
    if (!a.narrow) return a.data;
    act_copy(a, n, act_of_floats(buffer));
    return buffer;
}
/* Where floats are written that act_put then stores. */
INLINE float *act_target(pl_act a, float *buffer) { return a.narrow ? buffer : a.data; }
INLINE void act_put(pl_act a, int64_t n, const float *target) {
    if (a.narrow) act_copy(act_of_floats(target), n, a);
}

#endif
