// Dot-product attention by the tile unit (AMX): what attention_avx512bf16.cpp says, with tdpbf16ps
// in the place of vdpbf16ps (amx_tiles.h). Of bfloat16 roundings are the same; sums are made in
// another order. Bound: the passes over the scores. float32 and float16 are multiplied in parts of
// bfloat16 (float_parts.h), which hold their digits; what is out of the range of parts, and what is
// not finite, is computed by AVX-512 from the start. Bound: the products. Few queries too
// (few_queries.h) are AVX-512's.
#define TSA_CPU_ISA amx
#include "kernels/cpu/attention_isa.h"
#include "kernels/cpu/float_parts.h"

namespace torch_selfattn::kernels::cpu {

void attention_forward_avx512(const AttentionForward& call, const Parallel& parallel);
void attention_backward_avx512(const AttentionBackward& call, const Parallel& parallel);

void attention_forward_amx(const AttentionForward& call, const Parallel& parallel) {
  const bool done = !amx::has_few_queries(call.problem) &&
                    amx::with_tiles(call.problem.dtype, [&]<typename Operand>() {
                      return amx::ForwardKernel<amx::DotScore<Operand>>(call, parallel).run();
                    });
  if (!done) attention_forward_avx512(call, parallel);
}
void attention_backward_amx(const AttentionBackward& call, const Parallel& parallel) {
  const bool done = !amx::has_few_queries(call.problem) &&
                    amx::with_tiles(call.problem.dtype, [&]<typename Operand>() {
                      return amx::BackwardKernel<amx::DotGradient<Operand>>(call, parallel).run();
                    });
  if (!done) attention_backward_avx512(call, parallel);
}

}  // namespace torch_selfattn::kernels::cpu
