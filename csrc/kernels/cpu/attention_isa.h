#pragma once

#include "kernels/cpu/backward.h"
#include "kernels/cpu/forward.h"

// Entry points of one instruction set: the type that is computed in and the score.
namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA {

inline void forward(const AttentionForward& call, const Parallel& parallel) {
  const bool additive = call.problem.score == ScoreKind::kAdditive;
  if (call.problem.compute_in_double()) {
    if (additive) {
      ForwardKernel<AdditiveScore<Elements<double>>>(call, parallel).run();
    } else {
      ForwardKernel<DotScore<Elements<double>>>(call, parallel).run();
    }
  } else if (additive) {
    ForwardKernel<AdditiveScore<Elements<float>>>(call, parallel).run();
  } else {
    ForwardKernel<DotScore<Elements<float>>>(call, parallel).run();
  }
}

inline void backward(const AttentionBackward& call, const Parallel& parallel) {
  const bool additive = call.problem.score == ScoreKind::kAdditive;
  if (call.problem.compute_in_double()) {
    if (additive) {
      BackwardKernel<AdditiveGradient<Elements<double>>>(call, parallel).run();
    } else {
      BackwardKernel<DotGradient<Elements<double>>>(call, parallel).run();
    }
  } else if (additive) {
    BackwardKernel<AdditiveGradient<Elements<float>>>(call, parallel).run();
  } else {
    BackwardKernel<DotGradient<Elements<float>>>(call, parallel).run();
  }
}

}  // namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA
