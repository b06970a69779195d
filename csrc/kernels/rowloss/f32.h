/* The computed type float32: what the plain names of the row drivers stand for, until untyped.h. */
#include "../simd/vec.h"

#define REAL float
#define V vf
#define WIDTH LANES
#define NATIVE PL_F32
#define VEC(name) vf_##name
#define TYPED(name) name##_f32
#include "typed.h"
