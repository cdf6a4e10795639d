#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

#include "kernels/common/parallel.h"

namespace torch_selfattn::ops {

// PyTorch's own intra-op threads for the torch-free kernels. Tasks are handed out one by one, so
// that long and short ones balance. Inside a parallel region (nested calls, DataLoader workers with
// one thread) everything runs on the calling thread.
inline kernels::Parallel torch_parallel() {
  kernels::Parallel parallel;
  parallel.threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  parallel.run_tasks = [](int64_t count, int threads, void (*task)(void*, int64_t, int),
                          void* context) {
    std::atomic<int64_t> next{0};
    const int64_t workers = std::min<int64_t>(count, threads);
    at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) {
        for (int64_t index = next++; index < count; index = next++) {
          task(context, index, static_cast<int>(worker));
        }
      }
    });
  };
  return parallel;
}

}  // namespace torch_selfattn::ops
