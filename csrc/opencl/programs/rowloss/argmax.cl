/* The position of a row's largest element. The build options are those of rows.cl. */
#include "rows.cl"

/* Whether element a at i ranks before b at j: NaN first, then the larger, then the earlier. */
INLINE int comes_first(REAL a, long i, REAL b, long j) {
    int odd_a = a != a, odd_b = b != b;
    if (odd_a != odd_b) return odd_a;
    if (!odd_a && a != b) return a > b;
    return i < j;
}

KERNEL row_loss(ARRAY(const STORED(IN0), x), ARRAY(int, index), long length) {
    const INDEX n = (INDEX)length;
    const long row = get_group_id(0);
    const global STORED(IN0) *x = ROW(x, row * length);
    REAL best = LOWEST;
    long at = LONG_MAX;
    EACH_BLOCK(begin, n)
        EACH_VECTOR(b, i, begin, n) {
            V v = FETCH(IN0)(x, i, n, LOWEST);
            REAL a[WIDTH];
            REAL high = max_of(v);
            /* Rare: an element is at least the best so far, or NaN. */
            if (!(high < best) || any(isnan(v))) {
                VSTORE(v, 0, a);
                for (int j = 0; j < WIDTH && i + j < n; j++)
                    if (comes_first(a[j], i + j, best, at)) {
                        best = a[j];
                        at = i + j;
                    }
            }
        }
#if GROUP > 1
    local REAL bests[GROUP];
    local long ats[GROUP];
    bests[LANE] = best;
    ats[LANE] = at;
    for (int h = GROUP / 2; h; h /= 2) {
        barrier(CLK_LOCAL_MEM_FENCE);
        if (LANE < h && comes_first(bests[LANE + h], ats[LANE + h], bests[LANE], ats[LANE])) {
            bests[LANE] = bests[LANE + h];
            ats[LANE] = ats[LANE + h];
        }
    }
    at = ats[0]; /* work-item 0 wrote it, and reads it below */
#endif
    if (LANE == 0) *ROW(index, row) = (int)at;
}
