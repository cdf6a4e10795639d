#define TSA_CPU_ISA generic
#include "loops.h"
#include "loops_isa.h"

TSA_LOOPS(generic)
