#pragma once

#include "kernels/cpu/backward.h"
#include "kernels/cpu/forward.h"

// Entry points of one instruction set: the type that is computed in and the score.
namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA {

inline void forward(const AttentionForward& call, const Parallel& parallel) {
  const bool additive = call.problem.score == ScoreKind::kAdditive;
  if (call.problem.compute_in_double()) {
    if (additive) {
      ForwardKernel<double, AdditiveScore>(call, parallel).run();
    } else {
      ForwardKernel<double, DotScore>(call, parallel).run();
    }
  } else if (additive) {
    ForwardKernel<float, AdditiveScore>(call, parallel).run();
  } else {
    ForwardKernel<float, DotScore>(call, parallel).run();
  }
}

inline void backward(const AttentionBackward& call, const Parallel& parallel) {
  const bool additive = call.problem.score == ScoreKind::kAdditive;
  if (call.problem.compute_in_double()) {
    if (additive) {
      BackwardKernel<double, AdditiveGradient>(call, parallel).run();
    } else {
      BackwardKernel<double, DotGradient>(call, parallel).run();
    }
  } else if (additive) {
    BackwardKernel<float, AdditiveGradient>(call, parallel).run();
  } else {
    BackwardKernel<float, DotGradient>(call, parallel).run();
  }
}

}  // namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA
