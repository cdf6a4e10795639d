// Dot-product attention of bfloat16 with AVX512-BF16: the same driver and register tile as for
// AVX-512, with vdpbf16ps in the place of the fused multiply-add. Queries, keys, values and the
// gradient of the output are multiplied as they are (a few queries against many keys are not, but
// read at the speed of memory: few_queries.h); weights and gradients of scores are rounded to
// bfloat16 before their products, as PyTorch's kernel does. Sums, softmax and lse are float.
// Bound: vdpbf16ps, twice as many products per instruction as an FMA.
#define TSA_CPU_ISA avx512bf16
#include "kernels/cpu/attention_isa.h"

namespace torch_selfattn::kernels::cpu {

void attention_forward_avx512bf16(const AttentionForward& call, const Parallel& parallel) {
  avx512bf16::forward_of_pairs<avx512bf16::Bfloat16Pairs>(call, parallel);
}
void attention_backward_avx512bf16(const AttentionBackward& call, const Parallel& parallel) {
  avx512bf16::backward_of_pairs<avx512bf16::Bfloat16Pairs>(call, parallel);
}

}  // namespace torch_selfattn::kernels::cpu
