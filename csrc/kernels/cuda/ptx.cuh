#pragma once

// Every instruction that is not plain CUDA C++, as an inline function: the only file with inline
// PTX. With CUDA_ON_CPU defined the functions are emulated (tests/cuda_on_cpu). mma and ldmatrix
// are called by whole warps, the others by single threads.
#include <type_traits>

#include "kernels/cuda/launch.h"

namespace torch_selfattn::kernels::cuda {

#define TSA_PTX __device__ __forceinline__

#if !defined(CUDA_ON_CPU)

TSA_PTX std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// threadIdx.x, read anew by each call, so that what follows from it is computed where it is used.
// From threadIdx.x itself the compiler computes it before a loop, and keeps it in a register.
TSA_PTX int thread_index_here() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// 2^x and 1/x to 2 and 1 units in the last place; denormals count as 0.
TSA_PTX float exp2_approx(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
TSA_PTX float reciprocal_approx(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// d += a b; a is 16 x 16, b is 16 x 8 (tf32: k = 8), in the fragment layouts of the PTX ISA.
template <typename T>
TSA_PTX void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}
TSA_PTX void mma_m16n8k8_tf32(float (&d)[4], const std::uint32_t (&a)[4],
                              const std::uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d = a b. Not the above with d = 0: this one takes no registers for zeros.
template <typename T>
TSA_PTX void mma_product_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4],
                                  const std::uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, __nv_bfloat16>);
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%10,%10,%10,%10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(0.0f));
}

// Lane l gives the shared address of row l % 8 of matrix l / 8.
template <bool transpose = false>
TSA_PTX void ldmatrix(std::uint32_t (&r)[2], std::uint32_t row) {
  if constexpr (transpose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(row)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(row)
                 : "memory");
  }
}
template <bool transpose = false>
TSA_PTX void ldmatrix(std::uint32_t (&r)[4], std::uint32_t row) {
  if constexpr (transpose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
  }
}

// Copies 16 bytes to shared memory; without `inside` it writes zeros and does not read.
TSA_PTX void cp_async16(void* to, const void* from, bool inside = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(inside ? 16 : 0));
}
TSA_PTX void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for `threads` threads, whole warps, that call it with the same id, 1 ... 15.
TSA_PTX void barrier_sync(int id, int threads) {
  asm volatile("barrier.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
template <int groups_left>
TSA_PTX void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups_left) : "memory");
}

#else

TSA_PTX std::uint32_t shared_address(const void* pointer) {
  return cuda_on_cpu::shared_address(pointer);
}

TSA_PTX int thread_index_here() { return static_cast<int>(threadIdx.x); }

TSA_PTX float flush_denormal(float x) {
  return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x;
}
TSA_PTX float exp2_approx(float x) { return flush_denormal(std::exp2(flush_denormal(x))); }
TSA_PTX float reciprocal_approx(float x) { return flush_denormal(1.0f / flush_denormal(x)); }

template <typename T>
TSA_PTX void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  constexpr auto operation =
      std::is_same_v<T, __nv_bfloat16> ? cuda_on_cpu::mma_bf16 : cuda_on_cpu::mma_f16;
  cuda_on_cpu::MmaArguments arguments{d, a, {b[0], b[1]}};
  cuda_on_cpu::warp_collective(~0u, "mma.sync", operation, &arguments);
}
template <typename T>
TSA_PTX void mma_product_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4],
                                  const std::uint32_t (&b)[2]) {
  for (float& x : d) x = 0;
  mma_m16n8k16<T>(d, a, b);
}
TSA_PTX void mma_m16n8k8_tf32(float (&d)[4], const std::uint32_t (&a)[4],
                              const std::uint32_t (&b)[2]) {
  cuda_on_cpu::MmaArguments arguments{d, a, {b[0], b[1]}};
  cuda_on_cpu::warp_collective(~0u, "mma.sync", cuda_on_cpu::mma_tf32, &arguments);
}

template <bool transpose = false, int count>
TSA_PTX void ldmatrix(std::uint32_t (&r)[count], std::uint32_t row) {
  cuda_on_cpu::LdmatrixArguments arguments{r, row, count, transpose};
  cuda_on_cpu::warp_collective(~0u, "ldmatrix", cuda_on_cpu::ldmatrix, &arguments);
}

TSA_PTX void cp_async16(void* to, const void* from, bool inside = true) {
  cuda_on_cpu::cp_async(to, from, 16, inside ? 16 : 0);
}
TSA_PTX void cp_async_commit() { cuda_on_cpu::cp_async_commit(); }
TSA_PTX void barrier_sync(int id, int threads) { cuda_on_cpu::sync_some_threads(id, threads); }
template <int groups_left>
TSA_PTX void cp_async_wait() {
  cuda_on_cpu::cp_async_wait(groups_left);
}

#endif

#undef TSA_PTX

}  // namespace torch_selfattn::kernels::cuda
