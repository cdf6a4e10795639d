// The functions of ptx.cuh and the CUDA built-ins against plain computations. The same source runs
// on a GPU, where it checks the emulation's idea of the hardware.
#include "kernels/cuda/ptx.cuh"
#include "testing.h"

namespace torch_selfattn::kernels::cuda {
namespace {

__host__ __device__ inline float value(__nv_bfloat16 x) { return __bfloat162float(x); }
__host__ __device__ inline float value(__half x) { return __half2float(x); }

// Exact in every type; their sums of products are exact in float32.
template <typename T>
std::vector<T> small_numbers(std::size_t count) {
  std::vector<T> numbers(count);
  for (T& x : numbers) x = T(static_cast<float>(static_cast<int>(testing::random() % 17) - 8) / 4);
  return numbers;
}

// c[16][8] += a[16][16] b, b given as [8][16], or as [16][8] if transposed; through cp.async.
template <typename T, bool transposed>
__global__ void mma_kernel(const T* a, const T* b, float* c) {
  T* const shared_a = shared_at<T>(0, 256);
  T* const shared_b = shared_at<T>(512, 256);
  const int lane = static_cast<int>(threadIdx.x);
  cp_async16(shared_a + lane * 8, a + lane * 8);
  cp_async16(shared_b + lane * 8, b + lane % 16 * 8, lane < 16);  // the upper lanes write zeros
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  std::uint32_t fragment_a[4];
  std::uint32_t fragment_b[2];
  ldmatrix(fragment_a, shared_address(shared_a + lane % 16 * 16 + lane / 16 * 8));
  const int row_b = transposed ? lane % 16 * 8 : lane % 8 * 16 + lane / 8 % 2 * 8;
  ldmatrix<transposed>(fragment_b, shared_address(shared_b + row_b));
  float d[4] = {};
  mma_m16n8k16<T>(d, fragment_a, fragment_b);
  mma_m16n8k16<T>(d, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) {
    const float zero = value(shared_b[128 + 4 * lane + i]);
    c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i] + zero;
  }
}

template <typename T, bool transposed>
void test_mma() {
  const auto a = small_numbers<T>(256);
  const auto b = small_numbers<T>(128);
  const testing::DeviceArray<T> device_a(a);
  const testing::DeviceArray<T> device_b(b);
  const testing::DeviceArray<float> device_c(128);
  CHECK(launch(mma_kernel<T, transposed>, 1, 32, 1024, nullptr, device_a.data(), device_b.data(),
               device_c.data()) == cudaSuccess);
  const auto c = device_c.copy();
  for (std::size_t m = 0; m < 16; ++m) {
    for (std::size_t n = 0; n < 8; ++n) {
      float sum = 0;
      for (std::size_t k = 0; k < 16; ++k) {
        sum += 2 * value(a[m * 16 + k]) * value(transposed ? b[k * 8 + n] : b[n * 16 + k]);
      }
      CHECK(c[m * 8 + n] == sum);
    }
  }
}

__global__ void tf32_kernel(const float* a, const float* b, float* c) {  // a [16][8], b [8][8]
  const int lane = static_cast<int>(threadIdx.x);
  const int g = lane / 4;
  const int t = lane % 4;
  const auto bits = [](float x) { return __float_as_uint(x); };
  const std::uint32_t fragment_a[4] = {bits(a[g * 8 + t]), bits(a[(g + 8) * 8 + t]),
                                       bits(a[g * 8 + t + 4]), bits(a[(g + 8) * 8 + t + 4])};
  const std::uint32_t fragment_b[2] = {bits(b[t * 8 + g]), bits(b[(t + 4) * 8 + g])};
  float d[4] = {};
  mma_m16n8k8_tf32(d, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + t * 2 + i % 2] = d[i];
}

void test_tf32() {
  const auto a = small_numbers<float>(128);
  const auto b = small_numbers<float>(64);
  const testing::DeviceArray<float> device_a(a);
  const testing::DeviceArray<float> device_b(b);
  const testing::DeviceArray<float> device_c(128);
  CHECK(launch(tf32_kernel, 1, 32, 0, nullptr, device_a.data(), device_b.data(), device_c.data()) ==
        cudaSuccess);
  const auto c = device_c.copy();
  for (std::size_t m = 0; m < 16; ++m) {
    for (std::size_t n = 0; n < 8; ++n) {
      float sum = 0;
      for (std::size_t k = 0; k < 8; ++k) sum += a[m * 8 + k] * b[k * 8 + n];
      CHECK(c[m * 8 + n] == sum);
    }
  }
}

// d is not read.
__global__ void product_kernel(const std::uint32_t* a, const std::uint32_t* b, float* d) {
  const int lane = static_cast<int>(threadIdx.x);
  const std::uint32_t fragment_a[4] = {a[lane], a[32 + lane], a[64 + lane], a[96 + lane]};
  const std::uint32_t fragment_b[2] = {b[lane], b[32 + lane]};
  float product[4] = {1e30f, 1e30f, 1e30f, 1e30f};
  float sum[4] = {};
  mma_product_m16n8k16<__nv_bfloat16>(product, fragment_a, fragment_b);
  mma_m16n8k16<__nv_bfloat16>(sum, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) d[4 * lane + i] = product[i] - sum[i];
}

void test_product() {
  const auto a = small_numbers<__nv_bfloat16>(256);
  const auto b = small_numbers<__nv_bfloat16>(128);
  const testing::DeviceArray<__nv_bfloat16> device_a(a);
  const testing::DeviceArray<__nv_bfloat16> device_b(b);
  const testing::DeviceArray<float> device_d(128);
  CHECK(launch(product_kernel, 1, 32, 0, nullptr,
               reinterpret_cast<const std::uint32_t*>(device_a.data()),
               reinterpret_cast<const std::uint32_t*>(device_b.data()),
               device_d.data()) == cudaSuccess);
  for (const float difference : device_d.copy()) CHECK(difference == 0);
}

// Sums 96 numbers in a block of three warps: shuffles, static shared memory, barriers, votes.
__global__ void sum_kernel(const float* x, float* result) {
  __shared__ float of_warp[3];
  const int thread = static_cast<int>(threadIdx.x);
  float sum = x[thread];
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
  if (thread % 32 == 0) of_warp[thread / 32] = sum;
  const int odd = __syncthreads_count(thread % 2);
  const bool any = __syncthreads_or(thread == 95) != 0;
  const std::uint32_t low = __ballot_sync(~0u, thread % 32 < 4);
  if (thread == 0) {
    result[0] = of_warp[0] + of_warp[1] + of_warp[2];
    result[1] = static_cast<float>(odd);
    result[2] = any && low == 15 ? exp2_approx(3) + reciprocal_approx(4) : 0;
  }
}

void test_block() {
  const auto x = small_numbers<float>(96);
  float sum = 0;
  for (const float value : x) sum += value;
  const testing::DeviceArray<float> device_x(x);
  const testing::DeviceArray<float> device_result(3);
  CHECK(launch(sum_kernel, 1, 96, 0, nullptr, device_x.data(), device_result.data()) ==
        cudaSuccess);
  const auto result = device_result.copy();
  CHECK(result[0] == sum);
  CHECK(result[1] == 48);
  CHECK(result[2] == 8.25f);
}

const testing::Test tests[] = {
    {"mma bf16", test_mma<__nv_bfloat16, false>},
    {"mma bf16, transposed ldmatrix", test_mma<__nv_bfloat16, true>},
    {"mma fp16", test_mma<__half, false>},
    {"mma fp16, transposed ldmatrix", test_mma<__half, true>},
    {"mma tf32", test_tf32},
    {"mma without an accumulator", test_product},
    {"shuffles, votes and barriers", test_block},
};

}  // namespace
}  // namespace torch_selfattn::kernels::cuda
