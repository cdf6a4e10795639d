#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

namespace torch_selfattn::kernels {

// The threads a CPU kernel may use, as a callback of the caller's: kernels own no pool, since a
// second pool beside the caller's spinning workers costs up to half the speed.
struct Parallel {
  int threads = 1;
  // Runs task(context, index, thread) once for every index in [0, count), in any order, each
  // thread taking the next index as it becomes free; 0 <= thread < threads.
  void (*run_tasks)(std::int64_t count, int threads,
                    void (*task)(void* context, std::int64_t index, int thread),
                    void* context) = nullptr;

  // Whether no thread waits for long at the end while others are at one more of so many tasks.
  bool deals_evenly(std::int64_t count, bool equal_tasks) const {
    if (threads <= 1) return true;
    if (!equal_tasks && count < 4 * std::int64_t{threads}) return false;
    const std::int64_t rest = count % threads;
    return rest == 0 || threads - rest <= count / 16;
  }

  // body(index, thread), thread < min(count, threads)
  template <typename Body>
  void run(std::int64_t count, Body&& body) const {
    if (threads <= 1 || count <= 1 || run_tasks == nullptr) {
      for (std::int64_t index = 0; index < count; ++index) body(index, 0);
      return;
    }
    using Plain = std::remove_reference_t<Body>;
    run_tasks(
        count, count < threads ? static_cast<int>(count) : threads,
        [](void* context, std::int64_t index, int thread) {
          (*static_cast<Plain*>(context))(index, thread);
        },
        const_cast<void*>(static_cast<const void*>(std::addressof(body))));
  }
};

}  // namespace torch_selfattn::kernels
