/* Floats in place of bfloat16, for the forms of a kernel that take only these. */
#ifndef PYLOSS_WIDENING_H
#define PYLOSS_WIDENING_H
#include "pieces.h"
#include "simd/act.h"

/* An argument of n elements, while it is replaced by floats. */
typedef struct {
    pl_act *act;
    int64_t n;
    int reads, writes; /* what the kernel does with it */
    pl_act given;
} widening;

typedef struct {
    pl_act from, to;
} conversion;
static void convert_part(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const conversion *c = context;
    act_copy(act_at(c->from, begin), end - begin, act_at(c->to, begin));
}
/* to[0, n) = from[0, n), in the type of each. */
UNUSED static void convert_all(pl_act from, int64_t n, pl_act to) {
    in_pieces(n, 1, convert_part, &(conversion){from, to});
}

/* Rounds what was written into the given memory, unless `status` says that nothing was, and frees
 * the floats. Returns `status`. */
UNUSED static pl_status narrow_again(widening *w, int count, pl_status status) {
    for (; count--; w++) {
        if (!w->given.narrow) continue;
        if (w->writes && status == PL_OK) convert_all(*w->act, w->n, w->given);
        pl_release(w->act->data);
        *w->act = w->given;
    }
    return status;
}

/* Replaces those arguments that are bfloat16 by floats; narrow_again undoes it, also after an
 * error. */
UNUSED static pl_status widen(widening *w, int count) {
    for (; count--; w++) {
        if (!w->act->narrow) continue;
        const pl_act floats = {pl_acquire((size_t)w->n * sizeof(float)), 0};
        if (!floats.data) return PL_NO_MEMORY;
        w->given = *w->act;
        *w->act = floats;
        if (w->reads) convert_all(w->given, w->n, floats);
    }
    return PL_OK;
}

#endif
