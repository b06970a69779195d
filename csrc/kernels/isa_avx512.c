#define PL_ISA avx512
#define PL_BYTES 64
#include "kernels.tpl.h"
