#pragma once

#include <cuda_runtime_api.h>

#include "kernels/common/positional_problem.h"

// Positional encodings on CUDA. Pointers are device pointers; nothing waits for the device. A
// position id that lies outside its table is a device-side assertion.
namespace torch_selfattn::kernels::cuda {

cudaError_t sinusoid_table(const SinusoidTable& problem, cudaStream_t stream);
cudaError_t add_sinusoid(const AddSinusoid& problem, cudaStream_t stream);
cudaError_t add_learned(const AddLearned& problem, cudaStream_t stream);
cudaError_t learned_table_grad(const LearnedTableGrad& problem, cudaStream_t stream);
cudaError_t rotary(const Rotary& problem, cudaStream_t stream);

}  // namespace torch_selfattn::kernels::cuda
