/* The kernels of one instruction set. Each isa_*.c sets PL_ISA and PL_BYTES and includes this.
 * setup.py compiles each once per unit, with PL_UNIT_<unit> defined: units are compiled side by side.
 * A kernel has its instruction set in its name (rope_avx2) and everything else is static, so that
 * no wide instruction leaks into a shared symbol. */
#include "../pyloss.h"

#define PL_CAT_(a, b) a##b
#define PL_CAT(a, b) PL_CAT_(a, b)
#define PL_STR_(a) #a
#define PL_STR(a) PL_STR_(a)

/* Hidden, so that the linker reports one that is missing. */
#define KERNEL(name) PL_CAT(name##_, PL_ISA)
#define PL_OP(name, spec) \
    __attribute__((visibility("hidden"))) pl_status KERNEL(name)(const pl_call *call);
#include "../ops.def"

#ifdef PL_UNIT_TABLE
const pl_table PL_CAT(pl_table_, PL_ISA) = {
    .name = PL_STR(PL_ISA),
    .kernel =
        {
#define PL_OP(name, spec) [PL_OP_##name] = KERNEL(name),
#include "../ops.def"
        },
};
#else
#include "args.h"
#include "vec.h"
#include "narrow.h"
#endif

#ifdef PL_UNIT_PRODUCTS
#include "matmul.tpl.h"
#include "experts.tpl.h"
#include "norms.tpl.h"
#endif

#ifdef PL_UNIT_LAYERS
#include "layers.tpl.h"
#include "routing.tpl.h"
#include "columns.tpl.h"
#include "optim.tpl.h"
#include "attention.tpl.h"
#endif

#ifdef PL_UNIT_LOSSES
#include "rowloss.tpl.h"
#endif
