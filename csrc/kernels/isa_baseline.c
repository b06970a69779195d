#define PL_ISA baseline
#define PL_BYTES 16
#include "kernels.tpl.h"
