#define PL_ISA avx2
#define PL_BYTES 32
#include "kernels.tpl.h"
