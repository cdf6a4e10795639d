// The weights' kernel for dot products of bfloat16 with AVX512-BF16; see weights.h and operand.h.
#define TSA_CPU_ISA avx512bf16
#include "kernels/cpu/weights.h"

namespace torch_selfattn::kernels::cpu {

void attention_weights_avx512bf16(const AttentionWeights& call, const Parallel& parallel) {
  avx512bf16::WeightsKernel<avx512bf16::DotScore<avx512bf16::Bfloat16Pairs>>(call, parallel).run();
}

}  // namespace torch_selfattn::kernels::cpu
