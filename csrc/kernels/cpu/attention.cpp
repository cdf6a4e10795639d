#include "kernels/cpu/attention.h"

#include "kernels/common/reference.h"

namespace torch_selfattn::kernels::cpu {
namespace {

const char* always_supported(const AttentionProblem& /*problem*/) { return nullptr; }

const AttentionImplementation implementations[] = {
    {"reference", always_supported, reference::forward, reference::backward},
};

}  // namespace

std::span<const AttentionImplementation> attention_implementations() { return implementations; }

}  // namespace torch_selfattn::kernels::cpu
