#pragma once

#include <c10/core/DeviceType.h>

#include <vector>

#include "ops/attention.h"
#include "ops/implementation_choice.h"

namespace torch_selfattn::ops {

// What a device's backend would say of each implementation for a canonical problem.
using ListCandidates = std::vector<Candidate> (*)(const AttentionTensors&,
                                                  const AttentionOptions<int64_t>&);

// Called once per device by a static initialiser of its backend; returns true.
bool register_candidates(c10::DeviceType device, ListCandidates list);

// The explanation of a canonical problem that check_attention_forward has accepted.
std::string explain_attention(const AttentionTensors& tensors,
                              const AttentionOptions<int64_t>& options);

}  // namespace torch_selfattn::ops
