#include "kernels/cuda/sm80/additive_exponential_prepare.h"

#include "kernels/cuda/sm80/additive_exponential_tile.cuh"

// The operands of the exponential form, made once: float32 whatever the inputs' dtype and strides,
// e^2x of queries and keys, and whether tiles are within the range. A block has a tile of 64 tokens
// of one (batch, head) of one tensor.
// Traffic: the inputs once, four bytes for each element; 67 MB out at B H = 64, L = 1024, E = Ev =
// 64 in backward. Bound: memory.
namespace torch_selfattn::kernels::cuda::sm80 {

namespace {

// e^2x of larger numbers may overflow, or may be so small that it has lost digits.
constexpr float kLargestExponent = 32;
// Weights of pairs may be up to e^40, see BoundedSoftmax, and their products with values must be
// far from overflow. Gradients must survive being split into two TF32 numbers.
constexpr float kLargestValue = 0x1p32F;
constexpr float kLargestGradient = 0x1p126F;

struct TensorToPrepare {
  ConstView view;
  PreparedTensor result;
  std::int64_t heads = 0;
  std::int64_t length = 0;
  std::int64_t dims = 0;
  float limit = 0;  // of magnitudes
  bool exponentials = false;
  bool keys = false;  // only those of key_range() exist

  __host__ __device__ std::int64_t blocks(const AttentionProblem& p) const {
    return p.batch * heads * result.tiles;
  }
};

struct Preparation {
  TensorToPrepare tensors[4];

  // `grad_out`: null in forward.
  static Preparation of(const AttentionProblem& p, const PreparedOperands& to,
                        const ConstView* grad_out) {
    Preparation result;
    result.tensors[0] = {p.query,    to.query,         p.heads, p.query_length,
                         p.head_dim, kLargestExponent, true,    false};
    result.tensors[1] = {p.key,      to.key,           p.kv_heads, p.key_length,
                         p.head_dim, kLargestExponent, true,       true};
    result.tensors[2] = {p.value,     to.value,      p.kv_heads, p.key_length,
                         p.value_dim, kLargestValue, false,      true};
    if (grad_out != nullptr) {
      result.tensors[3] = {*grad_out,   to.grad_out,      p.heads, p.query_length,
                           p.value_dim, kLargestGradient, false,   false};
    }
    return result;
  }
  std::int64_t blocks(const AttentionProblem& p) const {
    std::int64_t sum = 0;
    for (const TensorToPrepare& tensor : tensors) sum += tensor.blocks(p);
    return sum;
  }
};

// Elements d ... d + 3 of a token, zeros beyond `dims`.
template <typename T>
__device__ __forceinline__ float4 load_four(const Tokens<T>& tokens, std::int64_t token,
                                            std::int64_t d, std::int64_t dims) {
  const T* const from = tokens.data + token * tokens.token_stride;
  float x[4];
  if (tokens.vectorized && d + 4 <= dims) {
    struct alignas(4 * sizeof(T)) Four {
      T value[4];
    };
    const Four four = *reinterpret_cast<const Four*>(from + d);
#pragma unroll
    for (int e = 0; e < 4; ++e) x[e] = to_acc(four.value[e]);
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      x[e] = d + e < dims ? to_acc(from[(d + e) * tokens.dim_stride]) : 0.0F;
    }
  }
  return {x[0], x[1], x[2], x[3]};
}

__device__ __forceinline__ float largest_of(float4 x) {  // NaN counts as infinite
  const bool numbers = x.x == x.x && x.y == x.y && x.z == x.z && x.w == x.w;
  const float largest = fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(x.z), fabsf(x.w)));
  return numbers ? largest : kInfinity<float>;
}

__global__ void __launch_bounds__(kThreads)
    additive_exponential_prepare_kernel(const __grid_constant__ AttentionProblem p,
                                        const __grid_constant__ Preparation call) {
  std::int64_t index = blockIdx.x;
  int which = 0;
  while (index >= call.tensors[which].blocks(p)) index -= call.tensors[which++].blocks(p);
  const TensorToPrepare& tensor = call.tensors[which];
  const std::int64_t tile = index % tensor.result.tiles;
  const std::int64_t row = index / tensor.result.tiles;
  const std::int64_t batch = row / tensor.heads;
  const KeyRange range = tensor.keys ? key_range(p, batch) : KeyRange{0, tensor.length};
  float* const to = tensor.result.data + index * kTileTokens * tensor.result.columns;
  const int vectors = tensor.result.columns / 4;
  float largest = 0;
  with_element(p.dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    const auto tokens = Tokens<T>::of(tensor.view, batch, row % tensor.heads);
#pragma unroll 2
    for (int n = static_cast<int>(threadIdx.x); n < kTileTokens * vectors; n += kThreads) {
      const int slot = n / vectors;
      const std::int64_t token =
          tile * kTileTokens + (tensor.exponentials ? Tile<float>::token_of_slot(slot) : slot);
      float4 x = {0, 0, 0, 0};
      if (token >= range.begin && token < range.end) {
        x = load_four(tokens, token, n % vectors * 4, tensor.dims);
        largest = fmaxf(largest, largest_of(x));
        if (tensor.exponentials) {
          x = {expf(2 * x.x), expf(2 * x.y), expf(2 * x.z), expf(2 * x.w)};
        }
      }
      put(to + 4 * std::int64_t{n}, x);
    }
  });
  // Maxima of lanes, then of warps.
  float* const maxima = shared_at<float>(0, kThreads / 32);
  if (!(largest <= tensor.limit)) largest = kInfinity<float>;
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(~0U, largest, lanes));
  }
  if (threadIdx.x % 32 == 0) maxima[threadIdx.x / 32] = largest;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kThreads / 32; ++warp) largest = fmaxf(largest, maxima[warp]);
    tensor.result.largest[index] = largest;
  }
}

}  // namespace

cudaError_t prepare_operands(const AttentionProblem& p, const PreparedOperands& to,
                             const ConstView* grad_out, cudaStream_t stream) {
  const auto preparation = Preparation::of(p, to, grad_out);
  const std::int64_t blocks = preparation.blocks(p);
  if (blocks == 0) return cudaSuccess;
  return launch(additive_exponential_prepare_kernel, dim3(static_cast<unsigned>(blocks)),
                dim3(kThreads), kThreads / 32 * sizeof(float), stream, p, preparation);
}

}  // namespace torch_selfattn::kernels::cuda::sm80
