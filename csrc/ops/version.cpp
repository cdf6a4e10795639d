#include <torch/version.h>
#include <torch_selfattn/version.h>

namespace torch_selfattn {

BuildInfo build_info() {
#ifdef TORCH_SELFATTN_WITH_CUDA
  return {TORCH_SELFATTN_VERSION, TORCH_VERSION, true, TORCH_SELFATTN_CUDA_ARCHS};
#else
  return {TORCH_SELFATTN_VERSION, TORCH_VERSION, false, ""};
#endif
}

}  // namespace torch_selfattn
