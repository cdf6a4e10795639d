#pragma once

#include "kernels/cpu/backward.h"
#include "kernels/cpu/few_queries.h"
#include "kernels/cpu/few_queries_additive.h"
#include "kernels/cpu/few_queries_backward.h"
#include "kernels/cpu/forward.h"
#include "kernels/cpu/leaky_relu.h"

// Entry points of one instruction set: the type that is computed in, the score, and how keys are
// read.
namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA {

template <typename T>
inline void forward_in(const AttentionForward& call, const Parallel& parallel) {
  if (has_few_queries(call.problem)) {
    ForwardKernel<DotScoreInPlace<T>>(call, parallel).run();
  } else if (has_few_additive_queries<T>(call.problem)) {
    ForwardKernel<AdditiveScoreInPlace<T>>(call, parallel).run();
  } else if (call.problem.score == ScoreKind::kDotProduct) {
    ForwardKernel<DotScore<Elements<T>>>(call, parallel).run();
  } else if (call.problem.activation == Activation::kTanh) {
    ForwardKernel<AdditiveScore<Elements<T>>>(call, parallel).run();
  } else {
    ForwardKernel<LeakyReluScore<Elements<T>>>(call, parallel).run();
  }
}

// Dot products of bfloat16 by an operand of pairs.
template <typename Operand>
inline void forward_of_pairs(const AttentionForward& call, const Parallel& parallel) {
  if (has_few_queries(call.problem)) {
    ForwardKernel<DotScoreInPlace<float>>(call, parallel).run();
  } else {
    ForwardKernel<DotScore<Operand>>(call, parallel).run();
  }
}

template <typename Operand>
inline void backward_of_pairs(const AttentionBackward& call, const Parallel& parallel) {
  if (backward_of_few_queries<float>(call, parallel)) return;
  BackwardKernel<DotGradient<Operand>>(call, parallel).run();
}

inline void forward(const AttentionForward& call, const Parallel& parallel) {
  if (call.problem.compute_in_double()) {
    forward_in<double>(call, parallel);
  } else {
    forward_in<float>(call, parallel);
  }
}

template <typename T>
inline void backward_in(const AttentionBackward& call, const Parallel& parallel) {
  if (backward_of_few_queries<T>(call, parallel)) return;
  if (call.problem.score == ScoreKind::kDotProduct) {
    BackwardKernel<DotGradient<Elements<T>>>(call, parallel).run();
  } else if (call.problem.activation == Activation::kTanh) {
    BackwardKernel<AdditiveGradient<Elements<T>>>(call, parallel).run();
  } else {
    BackwardKernel<LeakyReluGradient<Elements<T>>>(call, parallel).run();
  }
}

inline void backward(const AttentionBackward& call, const Parallel& parallel) {
  if (call.problem.compute_in_double()) {
    backward_in<double>(call, parallel);
  } else {
    backward_in<float>(call, parallel);
  }
}

}  // namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA
