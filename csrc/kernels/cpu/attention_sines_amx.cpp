// Additive attention of bfloat16 as dot products of sines and cosines of the tokens
// (sine_features.h), multiplied by the tile unit (amx_tiles.h). What its fits do not reach, and
// what is not finite, is computed by AVX-512 from the start. Bound: the products of the features, 4
// to 20 of a pair and element.
#define TSA_CPU_ISA amx
#include "kernels/cpu/backward.h"
#include "kernels/cpu/forward.h"
#include "kernels/cpu/sine_score.h"

namespace torch_selfattn::kernels::cpu {

void attention_forward_avx512(const AttentionForward& call, const Parallel& parallel);
void attention_backward_avx512(const AttentionBackward& call, const Parallel& parallel);

namespace {

// The problem of the features. The views are still those of the tokens, which the policies know.
template <typename Call>
Call of_features(const Call& call, const amx::SinePlan& plan) {
  Call of_features = call;
  of_features.problem.head_dim = plan.elements();
  return of_features;
}

}  // namespace

void attention_forward_sines(const AttentionForward& call, const Parallel& parallel) {
  amx::SinePlan plan;
  const bool done =
      plan.make(call.problem, parallel) &&
      amx::ForwardKernel<amx::SineScore>(of_features(call, plan), parallel, plan).run();
  if (!done) attention_forward_avx512(call, parallel);
}
void attention_backward_sines(const AttentionBackward& call, const Parallel& parallel) {
  amx::SinePlan plan;
  plan.set_row_sums(call);
  const bool done =
      plan.make(call.problem, parallel) &&
      amx::BackwardKernel<amx::SineGradient>(of_features(call, plan), parallel, plan).run();
  if (!done) attention_backward_avx512(call, parallel);
}

}  // namespace torch_selfattn::kernels::cpu
