#define TSA_CPU_ISA avx2
#include "loops.h"
#include "loops_isa.h"

TSA_LOOPS(avx2)
