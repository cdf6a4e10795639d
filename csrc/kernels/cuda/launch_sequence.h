#pragma once

#include "kernels/cuda/launch.h"

namespace torch_selfattn::kernels::cuda {

// Launches on one stream, up to the first error.
class LaunchSequence {
 public:
  explicit LaunchSequence(cudaStream_t stream) : stream_(stream) {}

  // launch(), which returns an error.
  template <typename Launch>
  void then(Launch launch) {
    if (error_ == cudaSuccess) error_ = launch();
  }
  // A kernel, if there are blocks for it.
  template <typename... Parameters, typename... Arguments>
  void run(void (*kernel)(Parameters...), std::int64_t blocks, int threads,
           std::int64_t shared_bytes, const Arguments&... arguments) {
    if (blocks == 0) return;
    then([&] {
      return launch(kernel, dim3(static_cast<unsigned>(blocks)),
                    dim3(static_cast<unsigned>(threads)), static_cast<std::size_t>(shared_bytes),
                    stream_, arguments...);
    });
  }
  cudaError_t error() const { return error_; }

 private:
  cudaStream_t stream_;
  cudaError_t error_ = cudaSuccess;
};

}  // namespace torch_selfattn::kernels::cuda
