#define TSA_INSTRUCTION_SET avx2
#include "kernels/cpu/positional_generic.h"
