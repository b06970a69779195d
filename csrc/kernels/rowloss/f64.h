/* The computed type float64: what the plain names of the row drivers stand for, until untyped.h. */
#include "../simd/vec.h"

#define REAL double
#define V vd
#define WIDTH DLANES
#define NATIVE PL_F64
#define VEC(name) vd_##name
#define TYPED(name) name##_f64
#include "typed.h"
