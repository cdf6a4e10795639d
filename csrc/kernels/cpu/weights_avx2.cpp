// The weights' kernel for AVX2 with FMA; see weights.h.
#define TSA_CPU_ISA avx2
#include "kernels/cpu/weights.h"

namespace torch_selfattn::kernels::cpu {

void attention_weights_avx2(const AttentionWeights& call, const Parallel& parallel) {
  avx2::weights(call, parallel);
}

}  // namespace torch_selfattn::kernels::cpu
