#define TSA_INSTRUCTION_SET avx512
#include "kernels/cpu/positional_generic.h"
