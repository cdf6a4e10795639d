#pragma once

// CUDA C++ built-ins for g++. Included by cuda_on_cpu.h. Only what kernels use; grow it as they do.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <type_traits>

// One block runs at a time, so a static shared variable is an ordinary static one; the section lets
// the scheduler find all of them and fill them with NaN at the start of each block.
#undef __shared__
#define __shared__ static __attribute__((section("cuda_shared")))
#undef __noinline__
#define __noinline__ __attribute__((noinline))
#undef __launch_bounds__
#define __launch_bounds__(...)

extern uint3 threadIdx, blockIdx;  // set by the scheduler whenever it resumes a thread
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace cuda_on_cpu {

enum class Shuffle { kIndex, kUp, kDown, kXor };

template <typename T>
struct ShuffleArguments {
  T in, out;
  int parameter, width;
};

template <typename T, Shuffle kind>
void shuffle_operation(void* const* arguments, std::uint32_t mask) {
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    auto& a = *static_cast<ShuffleArguments<T>*>(arguments[lane]);
    const int base = lane & ~(a.width - 1);
    int source = lane;
    switch (kind) {
      case Shuffle::kIndex: source = base + (a.parameter & (a.width - 1)); break;
      case Shuffle::kUp: source = lane - a.parameter; break;
      case Shuffle::kDown: source = lane + a.parameter; break;
      case Shuffle::kXor: source = lane ^ a.parameter; break;
    }
    if (source < base || source >= base + a.width) source = lane;
    if ((mask >> source & 1) == 0) {
      fail("shfl: lane %d reads lane %d, which is not in mask %08x", lane, source, mask);
    }
    a.out = static_cast<ShuffleArguments<T>*>(arguments[source])->in;
  }
}

template <Shuffle kind, typename T>
__forceinline__ T shuffle(std::uint32_t mask, T value, int parameter, int width) {
  ShuffleArguments<T> arguments{value, value, parameter, width};
  warp_collective(mask, "shfl.sync", shuffle_operation<T, kind>, &arguments);
  return arguments.out;
}

// All lanes of mask get the fold of their values.
template <typename T, typename Fold>
__forceinline__ T reduce(std::uint32_t mask, T value, Fold) {
  warp_collective(
      mask, "redux/vote.sync",
      [](void* const* arguments, std::uint32_t lanes) {
        T result{};
        bool first = true;
        for (int lane = 0; lane < 32; ++lane) {
          if ((lanes >> lane & 1) == 0) continue;
          const T next = *static_cast<T*>(arguments[lane]);
          result = first ? next : Fold{}(result, next);
          first = false;
        }
        for (int lane = 0; lane < 32; ++lane) {
          if ((lanes >> lane & 1) != 0) *static_cast<T*>(arguments[lane]) = result;
        }
      },
      &value);
  return value;
}

struct Minimum {
  template <typename T>
  T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};
struct Maximum {
  template <typename T>
  T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};

// Fibers never switch inside an atomic, so plain code is atomic; the race detector is told so.
template <typename T, typename Function>
__attribute__((noinline, no_sanitize("thread"))) T atomic(T* p, Function function) {
  race_access(p, sizeof(T), true, true, __builtin_return_address(0));
  const T old = *p;
  *p = function(old);
  return old;
}

}  // namespace cuda_on_cpu

__forceinline__ void __syncthreads() { cuda_on_cpu::sync_threads(); }
__forceinline__ int __syncthreads_count(int p) { return cuda_on_cpu::sync_threads_count(p); }
__forceinline__ int __syncthreads_or(int p) { return cuda_on_cpu::sync_threads_count(p) > 0; }
__forceinline__ int __syncthreads_and(int p) { return cuda_on_cpu::sync_threads_count(!p) == 0; }
__forceinline__ void __syncwarp(std::uint32_t mask = ~0u) { cuda_on_cpu::sync_warp(mask); }
__forceinline__ void __threadfence() {}
__forceinline__ std::uint32_t __activemask() { return cuda_on_cpu::active_lanes(); }

template <typename T>
__forceinline__ T __shfl_sync(std::uint32_t mask, T value, int lane, int width = 32) {
  return cuda_on_cpu::shuffle<cuda_on_cpu::Shuffle::kIndex>(mask, value, lane, width);
}
template <typename T>
__forceinline__ T __shfl_up_sync(std::uint32_t mask, T value, unsigned delta, int width = 32) {
  return cuda_on_cpu::shuffle<cuda_on_cpu::Shuffle::kUp>(mask, value, delta, width);
}
template <typename T>
__forceinline__ T __shfl_down_sync(std::uint32_t mask, T value, unsigned delta, int width = 32) {
  return cuda_on_cpu::shuffle<cuda_on_cpu::Shuffle::kDown>(mask, value, delta, width);
}
template <typename T>
__forceinline__ T __shfl_xor_sync(std::uint32_t mask, T value, int lanes, int width = 32) {
  return cuda_on_cpu::shuffle<cuda_on_cpu::Shuffle::kXor>(mask, value, lanes, width);
}
__forceinline__ std::uint32_t __ballot_sync(std::uint32_t mask, int p) {
  return cuda_on_cpu::reduce(mask, p != 0 ? 1u << cuda_on_cpu::current_lane() : 0u,
                             std::bit_or<std::uint32_t>{});
}
__forceinline__ int __any_sync(std::uint32_t mask, int p) { return __ballot_sync(mask, p) != 0; }
__forceinline__ int __all_sync(std::uint32_t mask, int p) { return __ballot_sync(mask, !p) == 0; }
template <typename T>
__forceinline__ T __reduce_add_sync(std::uint32_t mask, T value) {
  return cuda_on_cpu::reduce(mask, value, std::plus<T>{});
}
template <typename T>
__forceinline__ T __reduce_min_sync(std::uint32_t mask, T value) {
  return cuda_on_cpu::reduce(mask, value, cuda_on_cpu::Minimum{});
}
template <typename T>
__forceinline__ T __reduce_max_sync(std::uint32_t mask, T value) {
  return cuda_on_cpu::reduce(mask, value, cuda_on_cpu::Maximum{});
}

template <typename T>
__forceinline__ T atomicAdd(T* p, std::type_identity_t<T> v) {
  return cuda_on_cpu::atomic(p, [&](T old) -> T { return old + v; });
}
template <typename T>
__forceinline__ T atomicMax(T* p, std::type_identity_t<T> v) {
  return cuda_on_cpu::atomic(p, [&](T old) -> T { return old < v ? v : old; });
}
template <typename T>
__forceinline__ T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> v) {
  return cuda_on_cpu::atomic(p, [&](T old) -> T { return old == expected ? v : old; });
}

template <typename T>
T __ldg(const T* p) {
  return *p;
}
inline std::size_t __cvta_generic_to_shared(const void* p) {
  return cuda_on_cpu::shared_address(p);
}

// Fast intrinsics are rounded correctly here; the GPU's are good to about 2 units in the last
// place.
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __sinf(float x) { return std::sin(x); }
inline float __cosf(float x) { return std::cos(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline void sincospi(double x, double* s, double* c) {
  *s = std::sin(x * 3.14159265358979323846), *c = std::cos(x * 3.14159265358979323846);
}
inline std::uint32_t __float_as_uint(float x) { return std::bit_cast<std::uint32_t>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(std::uint32_t x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline int __popc(std::uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x != 0 ? __builtin_clz(x) : 32; }
using std::max;
using std::min;
