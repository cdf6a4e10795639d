#pragma once

#include "kernels/cuda/launch_sequence.h"
#include "kernels/cuda/sm80/additive_sines_features.cuh"

// Which fit of tanh each element of each head takes, and the vectors that the features are made
// with. Two kernels: moments of the tokens, in parts, and the plan.
// Moments: a block of 8 warps owns a part of the tokens of one (batch, head) of q or of k; a warp
// reads every eighth of them, a lane one element of 32. Padding is not read. Traffic: q and k once.
// Bound: memory. At B H = 64, L = 1024, E = 64: 16.8 MB.
// Plan: a block for each (batch, head), a thread for each element, then for each word. All heads
// of a key head take the same fits and means, so that they share the features of its keys.
namespace torch_selfattn::kernels::cuda::sm80 {

constexpr int kMomentsThreads = 256;
constexpr int kPlanThreads = 256;
static_assert(kPlanThreads >= kMostSineElements);

// Beyond this an element has more turns than sines are good for.
constexpr float kMostInput = 512;
// Of a score, by the fits, as the root of the sum of its squares: that, or for bfloat16 so much
// relative to scale |w|_2 (of which the rounding of the features costs 3.5e-4 at normal inputs, as
// a mean). And of its derivative, relative to w.
constexpr float kMostScoreError = 2e-3f;
constexpr float kMostRelativeError = 1.5e-3f;
constexpr float kMostDerivativeError = 8e-3f;
// The rounding of the features costs about 2^-9 |scale| |w|_2: docs/tolerances.md.
constexpr float kMostWeightNorm = 16;

// A weight that is less than this part of all counts as that, so that its gradient can be found by
// dividing by it.
constexpr float kLeastWeight = 0x1p-40f;

constexpr std::int64_t kMomentsBytes = 4 * kMomentsThreads * sizeof(float);

// Of the numbers of an element.
struct Moments {
  float least = kInfinity<float>;
  float largest = -kInfinity<float>;
  float sum = 0;
  float squares = 0;  // NaN, where a number is: the extremes pass it over

  __device__ __forceinline__ void add(float x) { join({x, x, x, x * x}); }
  __device__ __forceinline__ void join(const Moments& other) {
    least = fminf(least, other.least);
    largest = fmaxf(largest, other.largest);
    sum += other.sum;
    squares += other.squares;
  }
  __device__ __forceinline__ void store(float* to, std::int64_t stride) const {
    to[0] = least;
    to[stride] = largest;
    to[2 * stride] = sum;
    to[3 * stride] = squares;
  }
  static __device__ __forceinline__ Moments load(const float* from, std::int64_t stride) {
    return {from[0], from[stride], from[2 * stride], from[3 * stride]};
  }
  __device__ __forceinline__ bool is_usable() const {
    return squares <= kLargest<float> && fmaxf(fabsf(least), fabsf(largest)) <= kMostInput;
  }
};

// Blocks for the queries, then blocks for the keys.
template <typename T>
__global__ void __launch_bounds__(kMomentsThreads)
    additive_sines_moments_kernel(const __grid_constant__ AttentionProblem p,
                                  const __grid_constant__ SineWorkspace workspace) {
  constexpr int kWarps = kMomentsThreads / 32;
  float* const shared = shared_at<float>(0, 4 * kMomentsThreads);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = thread / 32;
  const std::int64_t query_blocks = p.batch * p.heads * workspace.query_parts;
  const bool is_query = blockIdx.x < query_blocks;
  const std::int64_t index = is_query ? blockIdx.x : blockIdx.x - query_blocks;
  const std::int64_t parts = is_query ? workspace.query_parts : workspace.key_parts;
  const std::int64_t heads = is_query ? p.heads : p.kv_heads;
  const std::int64_t length = is_query ? p.query_length : p.key_length;
  const std::int64_t batch = index / parts / heads;
  const auto tokens = Tokens<T>::of(is_query ? p.query : p.key, batch, index / parts % heads);
  const KeyRange range = is_query ? KeyRange{0, length} : key_range(p, batch);
  const std::int64_t size = (length + parts - 1) / parts;
  const std::int64_t part = index % parts;
  const std::int64_t begin = max(range.begin, part * size);
  const std::int64_t end = min(range.end, (part + 1) * size);
  float* const result =
      (is_query ? workspace.query_moments : workspace.key_moments) + index * 4 * p.head_dim;

  for (std::int64_t first = 0; first < p.head_dim; first += 32) {
    const std::int64_t d = first + lane;
    Moments moments;
    if (d < p.head_dim) {
#pragma unroll 8
      for (std::int64_t j = begin + warp; j < end; j += kWarps) {
        moments.add(to_acc(tokens.data[j * tokens.token_stride + d * tokens.dim_stride]));
      }
    }
    moments.store(shared + thread, kMomentsThreads);
    __syncthreads();
    if (warp == 0 && d < p.head_dim) {
#pragma unroll
      for (int other = 1; other < kWarps; ++other) {
        moments.join(Moments::load(shared + other * 32 + lane, kMomentsThreads));
      }
      moments.store(result + d, p.head_dim);
    }
    __syncthreads();
  }
}

// The sums of each number over the threads of a block, for all of them.
template <int kThreads, int kNumbers>
__device__ __forceinline__ void sum_over_block(float (&numbers)[kNumbers], float* shared) {
#pragma unroll
  for (int n = 0; n < kNumbers; ++n) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      numbers[n] += __shfl_xor_sync(~0u, numbers[n], lanes);
    }
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32 * kNumbers + n] = numbers[n];
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kNumbers; ++n) {
    numbers[n] = 0;
    for (int warp = 0; warp < kThreads / 32; ++warp) numbers[n] += shared[warp * kNumbers + n];
  }
}

// What a thread of the plan leaves of its element for the threads of the words.
struct SineElement {
  float weight;  // times scale
  float query_mean, query_variance;
  float key_mean, key_variance;
  int fit;
};

constexpr int kPlanSums = 4;
constexpr std::int64_t kPlanBytes =
    kMostSineElements * sizeof(SineElement) + kPlanThreads / 32 * kPlanSums * sizeof(float);

// The mean of sin and cos of f x over a normal distribution, or what is near to it.
struct SineMeans {
  float sine, cosine;
  static __device__ __forceinline__ SineMeans of(float frequency, float mean, float variance) {
    const float shrinks = __expf(-0.5f * frequency * frequency * variance);
    SineMeans means;
    sine_and_cosine_of_turns(frequency * kTurnsOfRadian * mean, means.sine, means.cosine);
    return {shrinks * means.sine, shrinks * means.cosine};
  }
};

template <typename T>
__global__ void __launch_bounds__(kPlanThreads)
    additive_sines_plan_kernel(const __grid_constant__ AttentionProblem p,
                               const __grid_constant__ SineFits fits,
                               const __grid_constant__ SineWorkspace workspace) {
  SineElement* const elements = shared_at<SineElement>(0, kMostSineElements);
  float* const sums =
      shared_at<float>(kMostSineElements * sizeof(SineElement), kPlanThreads / 32 * kPlanSums);
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t batch_head = blockIdx.x;
  const std::int64_t batch = batch_head / p.heads;
  const std::int64_t head = batch_head % p.heads;
  const std::int64_t kv_head = head / p.group_size();
  const auto scale = static_cast<float>(p.scale);

  float norms[kPlanSums] = {0, 0, 0, 0};  // squares of w, its magnitudes, squares of either error
  bool usable = true;
  if (thread < p.head_dim) {
    const std::int64_t first_head = batch * p.heads + kv_head * p.group_size();
    Moments query;
    for (std::int64_t part = first_head * workspace.query_parts;
         part < (first_head + p.group_size()) * workspace.query_parts; ++part) {
      query.join(
          Moments::load(workspace.query_moments + part * 4 * p.head_dim + thread, p.head_dim));
    }
    Moments key;
    const std::int64_t kv_row = batch * p.kv_heads + kv_head;
    for (std::int64_t part = kv_row * workspace.key_parts;
         part < (kv_row + 1) * workspace.key_parts; ++part) {
      key.join(Moments::load(workspace.key_moments + part * 4 * p.head_dim + thread, p.head_dim));
    }
    SineElement element{};
    element.weight = scale * Weight<T>::of(p, batch, head).at(thread);
    element.fit = 0;
    const KeyRange range = key_range(p, batch);
    if (range.begin < range.end) {  // else nobody asks
      const auto find = [](const Moments& of, std::int64_t count, float& mean, float& variance) {
        const float each = 1.0f / static_cast<float>(count);
        mean = of.sum * each;
        variance = fmaxf(of.squares * each - mean * mean, 0.0f);
      };
      find(query, p.group_size() * p.query_length, element.query_mean, element.query_variance);
      find(key, range.end - range.begin, element.key_mean, element.key_variance);
      const float limit = fmaxf(fabsf(query.least + key.least), fabsf(query.largest + key.largest));
      while (element.fit < fits.count - 1 && !(limit <= fits.fit[element.fit].limit)) ++element.fit;
      usable = query.is_usable() && key.is_usable() && limit <= fits.fit[element.fit].limit;
    }
    const TanhSines& fit = fits.fit[element.fit];
    const float w = element.weight;
    norms[0] = w * w;
    norms[1] = fabsf(w);
    norms[2] = w * w * fit.error * fit.error;
    norms[3] = w * w * fit.derivative_error * fit.derivative_error;
    elements[thread] = element;
  }
  sum_over_block<kPlanThreads>(norms, sums);
  // The score does not know.
  const float least_weight = kLeastWeight * fmaxf(1.0f, sqrtf(norms[0]));
  if (thread < p.head_dim && fabsf(elements[thread].weight) < least_weight) {
    elements[thread].weight = least_weight;
  }
  constexpr float relative = std::is_same_v<T, __nv_bfloat16> ? kMostRelativeError : 0.0f;
  const float most_squares =
      fmaxf(kMostScoreError * kMostScoreError, relative * relative * norms[0]);
  // A NaN is not less than anything.
  usable = usable && norms[0] <= kMostWeightNorm * kMostWeightNorm && norms[2] <= most_squares &&
           norms[3] <= kMostDerivativeError * kMostDerivativeError * norms[0];
  usable = __syncthreads_and(usable) != 0;
  if (thread == 0) workspace.heads[batch_head] = {norms[1], usable ? 0u : 1u};

  float* const vectors = workspace.vectors + batch_head * kSineVectors * workspace.words;
  const int width = static_cast<int>(p.head_dim);
  for (int word = thread; word < workspace.words; word += kPlanThreads) {
    const auto put = [&](SineVector which, float x) {
      vectors[which * workspace.words + word] = x;
    };
    const int term = word / kChunkWords % kSineTerms;
    const int d = word / (kChunkWords * kSineTerms) * kChunkWords + word % kChunkWords;
    if (d >= width) {  // features that are 0
      for (int which = 0; which < kSineVectors; ++which) {
        put(static_cast<SineVector>(which),
            which == kKeyCosine || which == kOfElement ? 1.0f : 0.0f);
      }
      continue;
    }
    const SineElement& element = elements[d];
    const TanhSines& fit = fits.fit[element.fit];
    const float frequency = fit.frequency[term];
    const float weight = element.weight * fit.amplitude[term];
    const auto query = SineMeans::of(frequency, element.query_mean, element.query_variance);
    const auto key = SineMeans::of(frequency, element.key_mean, element.key_variance);
    put(kTurns, frequency * kTurnsOfRadian);
    put(kLine, term == 0 ? element.weight * fit.slope : 0.0f);
    put(kWeight, weight);
    put(kQuerySine, weight * query.sine);
    put(kQueryCosine, weight * query.cosine);
    put(kKeyCosine, key.cosine);
    put(kKeySine, key.sine);
    put(kOfSine, weight * key.cosine);
    put(kOfCosine, weight * key.sine);
    put(kOfElement, element.weight);
    put(kKeyMean, element.key_mean);
  }
}

// Moments, plan and the features of the keys, and of the queries if wanted.
template <typename T>
void prepare_sines(LaunchSequence& launches, const AttentionProblem& p,
                   const SineWorkspace& workspace, bool queries) {
  constexpr SineFits fits = SineFits::of(kSineTerms);
  const std::int64_t heads = p.batch * p.heads;
  launches.run(additive_sines_moments_kernel<T>,
               heads * workspace.query_parts + p.batch * p.kv_heads * workspace.key_parts,
               kMomentsThreads, kMomentsBytes, p, workspace);
  launches.run(additive_sines_plan_kernel<T>, heads, kPlanThreads, kPlanBytes, p, fits, workspace);
  launches.run(additive_sines_features_kernel<T, false>,
               heads * workspace.padded_keys / kFeaturesRows, kFeaturesThreads, 0, p, workspace);
  if (!queries) return;
  launches.run(additive_sines_features_kernel<T, true>,
               heads * workspace.padded_queries / kFeaturesRows, kFeaturesThreads, 0, p, workspace);
}

}  // namespace torch_selfattn::kernels::cuda::sm80
