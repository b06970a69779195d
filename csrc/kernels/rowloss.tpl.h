/* Losses of a row of logits: the row drivers of rowloss_real.tpl.h for float32 and float64, and the kernels over them.
 *
 * VEC(f) is the primitive f of the computed type's vector, TYPED(f) a function of this type.
 */
#define VEC(name) vf_##name
#define TYPED(name) name##_f32
typedef float real_f32;
typedef vf vector_f32;
enum { WIDTH_f32 = LANES };
#include "rowloss_real.tpl.h"
#undef VEC
#undef TYPED

#define VEC(name) vd_##name
#define TYPED(name) name##_f64
typedef double real_f64;
typedef vd vector_f64;
enum { WIDTH_f64 = DLANES };
#include "rowloss_real.tpl.h"
#undef VEC
#undef TYPED
