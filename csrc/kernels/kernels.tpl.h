/* All kernels of one instruction set and their table. Included once by each isa_*.c, after PL_ISA and PL_BYTES are set;
 * everything but the table is static, so that no wide instruction leaks into a shared symbol. */
#include "../pyloss.h"
#include "args.h"
#include "vec.h"
#include "narrow.h"

#define PL_CAT_(a, b) a##b
#define PL_CAT(a, b) PL_CAT_(a, b)
#define PL_STR_(a) #a
#define PL_STR(a) PL_STR_(a)

#include "quant.tpl.h"
#include "tile.tpl.h"
#include "pack.tpl.h"
#include "matmul.tpl.h"
#include "experts.tpl.h"
#include "layers.tpl.h"
#include "routing.tpl.h"
#include "norms.tpl.h"
#include "columns.tpl.h"
#include "attention.tpl.h"
#include "rowloss.tpl.h"
#include "optim.tpl.h"

const pl_table PL_CAT(pl_table_, PL_ISA) = {
    .name = PL_STR(PL_ISA),
    .kernel =
        {
#define PL_OP(name, spec) [PL_OP_##name] = name,
#include "../ops.def"
        },
};
