/* Elementwise maps, with the formulas of maps.h. MAP is the function of the map or its gradient. */
#include "each.cl"

#undef FORMULA
#define FORMULA(name) name##_at
#define v_log(x) log(x)
#define v_sqrt(x) sqrt(x)
#define v_copysign(x, s) copysign(x, s)
#define v_residue(a, b, p) fma(a, b, -(p))
#include "../../maps.h"

#ifdef OF_ONE
KERNEL map_one(IN(x), OUT(y), long n) {
    MINE;
    PUT(y, MAP(GET(x)));
}
#else
KERNEL map_two(IN(a), IN(b), OUT(y), long n) {
    MINE;
    PUT(y, MAP(GET(a), GET(b)));
}

/* y of three axes, of which the last two have `middle` and `last` elements, with steps of a and b
 * along each. */
KERNEL map_pair(IN(a), IN(b), OUT(y), long middle, long last, long a0, long a1, long a2, long b0,
                long b1, long b2, long n) {
    MINE;
    float from_a[WIDTH], from_b[WIDTH];
    for (int l = 0; l < WIDTH; l++) {
        const long at = min(i + l, n - 1), row = at / last, j = at % last, o = row / middle,
                   m = row % middle;
        from_a[l] = *ROW(a, o * a0 + m * a1 + j * a2);
        from_b[l] = *ROW(b, o * b0 + m * b1 + j * b2);
    }
    PUT(y, MAP(VLOAD(0, from_a), VLOAD(0, from_b)));
}
#endif
