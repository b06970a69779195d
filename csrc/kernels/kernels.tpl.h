/* The kernels of one instruction set. An isa_*.c defines PL_ISA and PL_BYTES and includes this
 * file. setup.py compiles each isa_*.c once per unit, with PL_UNIT_<unit> defined, units side by
 * side. */
#include "kernel.h"

#ifdef PL_UNIT_PRODUCTS
#include "matmul/linear.tpl.h"
#include "matmul/batched.tpl.h"
#include "matmul/experts.tpl.h"
#include "matmul/norms.tpl.h"
#endif

#ifdef PL_UNIT_INT8
#include "matmul/int8.tpl.h"
#endif

#ifdef PL_UNIT_LAYERS
#include "layers/rows.tpl.h"
#include "layers/columns.tpl.h"
#include "layers/reductions.tpl.h"
#include "layers/rms_norm.tpl.h"
#include "layers/rope.tpl.h"
#include "layers/short_conv.tpl.h"
#include "layers/delta_rule.tpl.h"
#include "layers/delta_rule_grad.tpl.h"
#include "layers/delta_gates.tpl.h"
#include "layers/elementwise.tpl.h"
#include "layers/routing.tpl.h"
#include "layers/optim.tpl.h"
#include "attention/attention.tpl.h"
#endif

#ifdef PL_UNIT_MAPS
#include "layers/maps.tpl.h"
#include "layers/axes.tpl.h"
#endif

#ifdef PL_UNIT_LOSSES
#include "rowloss/rowloss.tpl.h"
#endif

#ifdef PL_UNIT_TABLE
const pl_table PL_CAT(pl_table_, PL_ISA) = {
    .name = PL_STR(PL_ISA),
    .bytes = PL_BYTES,
    .kernel =
        {
#define PL_OP(name, spec) [PL_OP_##name] = KERNEL(name),
#include "../ops.def"
        },
};
#endif
