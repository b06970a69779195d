/* What the programs on rows of logits share: their types and parameters, and the formulas of
 * losses/, which the C kernels share. A program is one kernel, `row_loss`, for one loss, with one
 * work-group per row unless its file says otherwise. Its build options define, in addition to those
 * of types.cl:
 *
 *   LOSS, FAMILY, ...       the loss's line in losses.def, as far as the kernel needs it
 *   IN0, IN1, OUT0, OUT1    element types; an array without one is absent
 */
#ifndef PYLOSS_CL_ROWS
#define PYLOSS_CL_ROWS
#include "../types.cl"
/* A family's properties in families.def, as constants. */
#define PL_FAMILY(name, shifted, sloped) \
    enum { name##_is_shifted = shifted, name##_is_sloped = sloped };
#include "../../../families.def"
#include "options.h"
#include "../../../losses/formulas.h"
#include "../../../losses.def"

#define OF_FAMILY(what) CAT(FAMILY, what)
#define STORED(type) CAT(stored_, type)
#define FETCH(type) CAT(fetch_, type)
#define PUT(type) CAT(put_, type)
#define LOWEST (-(REAL)INFINITY) /* its weight is 0: a masked logit, or past a row's end */

#define SHIFTED OF_FAMILY(_is_shifted)
#define SLOPED OF_FAMILY(_is_sloped)

/* Parameters of the kernels. */
#ifdef OUT0
#define OUT0_ARGUMENT(name) ARRAY(STORED(OUT0), name),
#else
#define OUT0_ARGUMENT(name)
#endif
#ifdef OUT1
#define OUT1_ARGUMENT(name) ARRAY(STORED(OUT1), name),
#else
#define OUT1_ARGUMENT(name)
#endif
#ifdef IN1
#define IN1_ARGUMENT(name) ARRAY(const STORED(IN1), name),
#else
#define IN1_ARGUMENT(name)
#endif
#define LOSS_ARGUMENTS ARRAY(const REAL, dloss), ARRAY(REAL, loss),
#define OPTIONS SCALAR option0, SCALAR option1, SCALAR option2, SCALAR option3
#define GIVEN_OPTIONS \
    { option0, option1, option2, option3 }

#endif
