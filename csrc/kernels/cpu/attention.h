#pragma once

#include <span>

#include "kernels/common/attention_problem.h"
#include "kernels/common/attention_weights.h"
#include "kernels/common/parallel.h"

namespace torch_selfattn::kernels::cpu {

struct AttentionImplementation {
  const char* name;
  // Why this implementation cannot run the problem on this machine, or null if it can.
  const char* (*not_supported)(const AttentionProblem&);
  void (*forward)(const AttentionForward&, const Parallel&);
  void (*backward)(const AttentionBackward&, const Parallel&);
  void (*weights)(const AttentionWeights&, const Parallel&);
  // Why a later one is faster for a problem that this one can run, or null; null: none ever is. By
  // name it runs.
  const char* (*slower)(const AttentionProblem&) = nullptr;
};

// Best first; the last one supports every problem.
std::span<const AttentionImplementation> attention_implementations();

}  // namespace torch_selfattn::kernels::cpu
