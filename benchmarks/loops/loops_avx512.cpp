#define TSA_CPU_ISA avx512
#include "loops.h"
#include "loops_isa.h"

TSA_LOOPS(avx512)
