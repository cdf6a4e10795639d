// The weights' kernel for the baseline of the platform; see weights.h.
#define TSA_CPU_ISA generic
#include "kernels/cpu/weights.h"

namespace torch_selfattn::kernels::cpu {

void attention_weights_generic(const AttentionWeights& call, const Parallel& parallel) {
  generic::weights(call, parallel);
}

}  // namespace torch_selfattn::kernels::cpu
