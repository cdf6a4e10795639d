// The weights' kernel for dot products by tiles: weights.h, amx_tiles.h, and attention_amx.cpp on
// what becomes of the dtypes.
#define TSA_CPU_ISA amx
#include "kernels/cpu/float_parts.h"
#include "kernels/cpu/weights.h"

namespace torch_selfattn::kernels::cpu {

void attention_weights_avx512(const AttentionWeights& call, const Parallel& parallel);

namespace amx {
namespace {

template <typename Operand>
bool weights_by(const AttentionWeights& call, const Parallel& parallel) {
  return WeightsKernel<DotScore<Operand>>(call, parallel).run();
}

}  // namespace
}  // namespace amx

void attention_weights_amx(const AttentionWeights& call, const Parallel& parallel) {
  bool done = false;
  switch (call.problem.dtype) {
    case DType::kBFloat16: done = amx::weights_by<amx::Bfloat16Tiles>(call, parallel); break;
    case DType::kFloat16: done = amx::weights_by<amx::FloatTiles<2>>(call, parallel); break;
    default: done = amx::weights_by<amx::FloatTiles<3>>(call, parallel); break;
  }
  if (!done) attention_weights_avx512(call, parallel);
}

}  // namespace torch_selfattn::kernels::cpu
