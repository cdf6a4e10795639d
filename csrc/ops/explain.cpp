#include "ops/explain.h"

#include <c10/core/Device.h>

#include <map>

namespace torch_selfattn::ops {

namespace {

std::map<c10::DeviceType, ListCandidates>& lists() {
  static std::map<c10::DeviceType, ListCandidates> by_device;
  return by_device;
}

}  // namespace

bool register_candidates(c10::DeviceType device, ListCandidates list) {
  lists()[device] = list;
  return true;
}

std::string explain_attention(const AttentionTensors& tensors,
                              const AttentionOptions<int64_t>& options) {
  const c10::DeviceType device = tensors.query.device().type();
  const auto found = lists().find(device);
  TORCH_CHECK_NOT_IMPLEMENTED(
      found != lists().end(), tensors.name(),
      ": there are no kernels for this device (got query=", tensors.query.device(), ")");
  const std::string call =
      std::string(tensors.name()) + " on " + c10::DeviceTypeName(device, /*lower_case=*/true);
  return explain_choice(call, found->second(tensors, options));
}

}  // namespace torch_selfattn::ops
