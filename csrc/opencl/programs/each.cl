/* For kernels over n elements, one vector per work-item. */
#define INDEX long
#include "types.cl"

#define IN(name) ARRAY(const float, name)
#define OUT(name) ARRAY(float, name)
#define GET(name) fetch_f32(ROW(name, 0), i, n, 0)
#define PUT(name, v) put_f32(v, ROW(name, 0), i, n)
/* The work-item's elements begin at i. */
#define MINE \
    const long i = (long)get_global_id(0) * WIDTH; \
    if (i >= n) return
