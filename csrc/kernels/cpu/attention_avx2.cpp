#define TSA_CPU_ISA avx2
#include "kernels/cpu/attention_isa.h"

namespace torch_selfattn::kernels::cpu {

void attention_forward_avx2(const AttentionForward& call, const Parallel& parallel) {
  avx2::forward(call, parallel);
}
void attention_backward_avx2(const AttentionBackward& call, const Parallel& parallel) {
  avx2::backward(call, parallel);
}

}  // namespace torch_selfattn::kernels::cpu
