// Dot-product attention by the tile unit (AMX): what attention_avx512bf16.cpp says, with tdpbf16ps
// in the place of vdpbf16ps (amx_tiles.h). Of bfloat16 roundings are the same; sums are made in
// another order. Bound: the passes over the scores. float32 and float16 are multiplied in parts of
// bfloat16 (float_parts.h), which hold their digits; what is out of the range of parts, and what is
// not finite, is computed by AVX-512 from the start. Bound: the products.
#define TSA_CPU_ISA amx
#include "kernels/cpu/attention_isa.h"
#include "kernels/cpu/float_parts.h"

namespace torch_selfattn::kernels::cpu {

void attention_forward_avx512(const AttentionForward& call, const Parallel& parallel);
void attention_backward_avx512(const AttentionBackward& call, const Parallel& parallel);

namespace amx {
namespace {

template <int kParts>
bool forward_in_parts(const AttentionForward& call, const Parallel& parallel) {
  if (has_few_queries(call.problem)) return false;
  return ForwardKernel<DotScore<FloatTiles<kParts>>>(call, parallel).run();
}
template <int kParts>
bool backward_in_parts(const AttentionBackward& call, const Parallel& parallel) {
  return BackwardKernel<DotGradient<FloatTiles<kParts>>>(call, parallel).run();
}

}  // namespace
}  // namespace amx

void attention_forward_amx(const AttentionForward& call, const Parallel& parallel) {
  if (call.problem.dtype == DType::kBFloat16) {
    amx::forward_of_pairs<amx::Bfloat16Tiles>(call, parallel);
    return;
  }
  const bool done = call.problem.dtype == DType::kFloat16
                        ? amx::forward_in_parts<2>(call, parallel)
                        : amx::forward_in_parts<3>(call, parallel);
  if (!done) attention_forward_avx512(call, parallel);
}
void attention_backward_amx(const AttentionBackward& call, const Parallel& parallel) {
  if (call.problem.dtype == DType::kBFloat16) {
    amx::BackwardKernel<amx::DotGradient<amx::Bfloat16Tiles>>(call, parallel).run();
    return;
  }
  const bool done = call.problem.dtype == DType::kFloat16
                        ? amx::backward_in_parts<2>(call, parallel)
                        : amx::backward_in_parts<3>(call, parallel);
  if (!done) attention_backward_avx512(call, parallel);
}

}  // namespace torch_selfattn::kernels::cpu
