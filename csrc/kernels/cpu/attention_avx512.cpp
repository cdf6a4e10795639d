#define TSA_CPU_ISA avx512
#include "kernels/cpu/attention_isa.h"

namespace torch_selfattn::kernels::cpu {

void attention_forward_avx512(const AttentionForward& call, const Parallel& parallel) {
  avx512::forward(call, parallel);
}
void attention_backward_avx512(const AttentionBackward& call, const Parallel& parallel) {
  avx512::backward(call, parallel);
}

}  // namespace torch_selfattn::kernels::cpu
