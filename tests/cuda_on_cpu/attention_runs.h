#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/sm80/additive_exponential.h"
#include "kernels/cuda/sm80/additive_exponential_shape.h"
#include "kernels/cuda/sm80/additive_group.h"
#include "kernels/cuda/sm80/additive_group_gradients_workspace.h"
#include "kernels/cuda/sm80/additive_group_workspace.h"
#include "kernels/cuda/sm80/additive_sines.h"
#include "kernels/cuda/sm80/additive_sines_gradients_workspace.h"
#include "testing.h"

// What a test of attention runs: the description of a problem, and the kernels that leave a part of
// their work to the generic ones.
namespace attention_testing {

using namespace torch_selfattn::kernels;

enum class Layout { kHeadsOutside, kHeadsInside, kEveryOther, kSharedBatch };
enum class Special {
  kNone,
  kNanBehindMask,     // keys that nobody may see, and gradients of rows that see nothing, are NaN
  kInfBehindMask,     // the same with infinities
  kNanInside,         // a key that some rows see is NaN
  kLowestMask,        // the mask of some rows is the lowest number everywhere
  kHugeScores,        // scores that overflow float32
  kLargeScores,       // the softmax is all but one-hot, lse in the thousands
  kOneHugeKey,        // additive: one tile is beyond the range of the exponential form
  kHiddenBlocks,      // the mask hides keys 60 ... 199 from all queries
  kSaturatedQueries,  // queries are 30 and more above the keys
  kNanMask,           // row 3 of the mask has a NaN
  kRange,        // additive: all features of key 0 are -magnitude, of the last one +magnitude, and
                 // evenly spaced between; queries the other way round
  kZeroWeights,  // additive: those of every other feature
};

// What is run: attention forward and backward, the weights by themselves, or the forward kernels of
// the group method, by themselves, with the generic backward, or with the group method's after
// them; that after the generic forward. Likewise the exponential form, forward and both passes; and
// its backward after the forward of the group method. And the kernels of the sines as those of
// the group method.
enum class What {
  kAttention,
  kWeights,
  kMeanWeights,
  kGroup,
  kGroupAndBackward,
  kGroupGradients,
  kGroupGradientsAlone,
  kExponential,
  kExponentialGradients,
  kGroupAndExponential,
  kSines,
  kSinesAndBackward,
  kSinesGradients,
  kSinesGradientsAlone
};

// How many tiles of queries a method leaves to the generic kernel; in backward how many (batch, key
// head)s. In both, of what has both passes.
enum class Redo { kNone, kSome, kAll, kAny };

struct Case {
  const char* name = nullptr;
  What what = What::kAttention;
  DType dtype = DType::kFloat32;
  ScoreKind score = ScoreKind::kDotProduct;
  Activation activation = Activation::kTanh;
  double negative_slope = 0.2;
  std::int64_t batch = 1, heads = 2, kv_heads = 2;
  std::int64_t query_length = 37, key_length = 41, head_dim = 19, value_dim = 23;
  Layout layout = Layout::kHeadsOutside;
  MaskKind mask = MaskKind::kNone;
  bool mask_broadcast[4] = {true, true, false, false};
  bool float32_mask = false;
  bool lengths = false, starts = false, offsets = false;
  bool slopes = false, slopes_per_batch = false, float32_slopes = false;
  std::int64_t window_left = -1, window_right = -1, query_offset = 0;
  double dropout_p = 0.0;
  bool grad_lse = false;
  bool weight_per_batch = false, weight_per_head = true;
  double magnitude = 1.0;
  double query_mean = 0.0, key_mean = 0.0;
  double value_magnitude = 1.0;
  double weight_magnitude = 1.0, scale = 0.7;  // additive
  Special special = Special::kNone;
  double largest_term = 0.1;      // of the sums in gradients: what their rounding errors go by
  bool query_indices = false;     // weights only: the queries are rows of others, in no order
  Redo redo = Redo::kNone;        // not of the generic kernels
  double out_error = 0;           // if not 0: bound of the norm of out's error, relative to out's
  double gradient_error = 0;      // the same of each gradient
  std::int64_t shared_kib = 160;  // of the device, for the methods of the additive score
};

inline bool is_group(const Case& c) {
  return c.what == What::kGroup || c.what == What::kGroupAndBackward ||
         c.what == What::kGroupGradients || c.what == What::kGroupAndExponential;
}
inline bool has_group_gradients(const Case& c) {
  return c.what == What::kGroupGradients || c.what == What::kGroupGradientsAlone;
}

inline bool is_sines(const Case& c) {
  return c.what == What::kSines || c.what == What::kSinesAndBackward ||
         c.what == What::kSinesGradients;
}
inline bool has_sines_gradients(const Case& c) {
  return c.what == What::kSinesGradients || c.what == What::kSinesGradientsAlone;
}

inline bool is_exponential(const Case& c) {
  return c.what == What::kExponential || c.what == What::kExponentialGradients;
}

inline bool has_exponential_gradients(const Case& c) {
  return c.what == What::kExponentialGradients || c.what == What::kGroupAndExponential;
}

inline void check_redo(const Case& c, std::int64_t redone, std::int64_t of) {
  if (c.redo == Redo::kAny) return;
  CHECK((c.redo == Redo::kNone) == (redone == 0));
  CHECK((c.redo == Redo::kAll) == (redone == of));
}

// The sum of `count` flags in device memory, of which `memory` is a part.
template <typename T>
std::int64_t count_flags(const testing::DeviceArray<char>& memory, const T* flags,
                         std::int64_t count) {
  const std::vector<char> bytes = memory.copy();
  std::vector<T> copied(static_cast<std::size_t>(count));
  std::memcpy(copied.data(), bytes.data() + (reinterpret_cast<const char*>(flags) - memory.data()),
              copied.size() * sizeof(T));
  std::int64_t sum = 0;
  for (const T flag : copied) sum += flag;
  return sum;
}

// The kernels of the exponential form, and what they leave to the generic ones.
class ExponentialRun {
 public:
  explicit ExponentialRun(const Case& c) : case_(c), device_{8, c.shared_kib * 1024} {}

  void forward(const AttentionForward& call) const {
    const AttentionProblem& p = call.problem;
    CHECK(cuda::sm80::additive_exponential_not_supported(p, device_) == nullptr);
    const testing::DeviceArray<char> workspace(
        static_cast<std::size_t>(cuda::sm80::additive_exponential_workspace_bytes(p)));
    CHECK(cuda::sm80::additive_exponential_forward(call, workspace.data(), nullptr) == cudaSuccess);
    const auto memory = cuda::sm80::ExponentialForwardWorkspace::of(p, workspace.data());
    if (case_.what == What::kExponential) {
      const std::int64_t tiles = p.batch * p.heads * memory.operands.query.tiles;
      check_redo(case_, count_flags(workspace, memory.redo, tiles), tiles);
    }
  }

  void backward(const AttentionBackward& call) const {
    const AttentionProblem& p = call.problem;
    CHECK(cuda::sm80::additive_exponential_backward_not_supported(p, device_) == nullptr);
    const testing::DeviceArray<char> workspace(
        static_cast<std::size_t>(cuda::sm80::additive_exponential_backward_workspace_bytes(p)));
    CHECK(cuda::sm80::additive_exponential_backward(call, workspace.data(), nullptr) ==
          cudaSuccess);
    const auto memory = cuda::sm80::ExponentialBackwardWorkspace::of(p, workspace.data(), 0);
    const std::int64_t heads = p.batch * p.kv_heads;
    check_redo(case_, count_flags(workspace, memory.redo, heads), heads);
  }

 private:
  const Case& case_;
  cuda::sm80::DeviceLimits device_;
};

// The kernels of the sines, and what they leave to the generic ones.
class SinesRun {
 public:
  explicit SinesRun(const Case& c) : case_(c), device_{8, c.shared_kib * 1024} {}

  void forward(const AttentionForward& call) const {
    const AttentionProblem& p = call.problem;
    CHECK(cuda::sm80::additive_sines_not_supported(p, device_) == nullptr);
    const testing::DeviceArray<char> workspace(
        static_cast<std::size_t>(cuda::sm80::additive_sines_workspace_bytes(p, device_)));
    CHECK(cuda::sm80::additive_sines_forward(call, device_, workspace.data(), nullptr) ==
          cudaSuccess);
    const bool stay = cuda::sm80::additive_sines_queries_stay(p, device_);
    const auto memory = cuda::sm80::SineWorkspace::of(p, !stay, workspace.data());
    const std::int64_t tiles = p.batch * p.heads * memory.query_tiles;
    check_redo(case_, count_flags(workspace, memory.redo, tiles), tiles);
  }

  void backward(const AttentionBackward& call) const {
    const AttentionProblem& p = call.problem;
    CHECK(cuda::sm80::additive_sines_backward_not_supported(p, false, device_) == nullptr);
    const testing::DeviceArray<char> workspace(
        static_cast<std::size_t>(cuda::sm80::additive_sines_backward_workspace_bytes(p)));
    CHECK(cuda::sm80::additive_sines_backward(call, device_, workspace.data(), nullptr) ==
          cudaSuccess);
    const auto memory = cuda::sm80::SineGradientWorkspace::of(p, workspace.data(), 0);
    const std::int64_t heads = p.batch * p.kv_heads;
    check_redo(case_, count_flags(workspace, memory.redo, heads), heads);
  }

 private:
  const Case& case_;
  cuda::sm80::DeviceLimits device_;
};

// The kernels of the group method, and what they leave to the generic ones.
class GroupRun {
 public:
  explicit GroupRun(const Case& c) : case_(c), device_{8, c.shared_kib * 1024} {}

  void forward(const AttentionForward& call) const {
    const AttentionProblem& p = call.problem;
    CHECK(cuda::sm80::additive_group_not_supported(p, device_) == nullptr);
    const testing::DeviceArray<char> workspace(
        static_cast<std::size_t>(cuda::sm80::additive_group_workspace_bytes(p)));
    CHECK(cuda::sm80::additive_group_forward(call, workspace.data(), nullptr) == cudaSuccess);
    const auto memory = cuda::sm80::GroupWorkspace::of(p, workspace.data());
    const std::int64_t tiles = p.batch * p.heads * memory.query_tiles;
    // What is beyond the range of num / den in forward is so in backward.
    if (!has_group_gradients(case_) && !has_exponential_gradients(case_)) {
      check_redo(case_, count_flags(workspace, memory.redo, tiles), tiles);
    }
  }

  void backward(const AttentionBackward& call) const {
    const AttentionProblem& p = call.problem;
    CHECK(cuda::sm80::additive_group_backward_not_supported(p, false, device_) == nullptr);
    const testing::DeviceArray<char> workspace(
        static_cast<std::size_t>(cuda::sm80::additive_group_backward_workspace_bytes(p)));
    CHECK(cuda::sm80::additive_group_backward(call, device_, workspace.data(), nullptr) ==
          cudaSuccess);
    const auto memory = cuda::sm80::GradientWorkspace::of(p, workspace.data(), 0);
    const std::int64_t heads = p.batch * p.kv_heads;
    check_redo(case_, count_flags(workspace, memory.redo, heads), heads);
  }

 private:
  const Case& case_;
  cuda::sm80::DeviceLimits device_;
};

}  // namespace attention_testing
