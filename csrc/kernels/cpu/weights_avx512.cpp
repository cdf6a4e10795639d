// The weights' kernel for AVX-512; see weights.h.
#define TSA_CPU_ISA avx512
#include "kernels/cpu/weights.h"

namespace torch_selfattn::kernels::cpu {

void attention_weights_avx512(const AttentionWeights& call, const Parallel& parallel) {
  avx512::weights(call, parallel);
}

}  // namespace torch_selfattn::kernels::cpu
