#pragma once

#include <cstdint>

#include "kernels/common/attention_problem.h"
#include "kernels/common/parallel.h"
#include "kernels/cpu/tile.h"

// The gradient of a floating mask, for backward.h: the sum of the scores' gradients G over the
// batches, heads, queries and keys that share an element.
//
// Tasks own sets of batches and of key heads, and groups of blocks of keys. Where tasks share
// elements each adds to a part of its own, and the parts are added up in their order at the end;
// the number of parts depends on the problem only. Where queries and keys have elements of their
// own, the first tile that comes to an element stores it, zeros as well, and only others add: a
// gradient of Lq Lk elements is neither cleared nor read, and not copied if no other tile comes.
namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA {

template <typename T>
class MaskGradient {
 public:
  // The task that writes, and the first batch and head that it owns.
  struct Task {
    std::int64_t batch_set, head_set, group;
    std::int64_t first_batch, first_head;
  };

  explicit MaskGradient(const AttentionBackward& call) : call_(call), p_(call.problem) {}

  bool wanted() const { return wanted_; }

  // Limits the sets of batches and key heads that share the mask, which each have a part.
  void plan_sets(std::int64_t& batch_sets, std::int64_t& head_sets) {
    wanted_ = call_.grad_mask != nullptr && p_.mask_kind == MaskKind::kFloat &&
              p_.batch * p_.heads * p_.query_length * p_.key_length > 0;
    if (!wanted_) return;
    const bool shared_batch = p_.mask_size[0] == 1 && p_.batch > 1;
    const bool shared_heads = p_.mask_size[1] == 1 && p_.kv_heads > 1;
    if (shared_batch) batch_sets = smaller<std::int64_t>(p_.batch, 4);
    if (shared_heads) head_sets = smaller<std::int64_t>(p_.kv_heads, shared_batch ? 2 : 4);
    parts_[0] = shared_batch ? batch_sets : 1;
    parts_[1] = shared_heads ? head_sets : 1;
    for (int dim = 3; dim >= 0; --dim) {
      stride_[dim] = p_.mask_size[dim] == 1 ? 0 : elements_;
      elements_ *= p_.mask_size[dim];
    }
  }
  void plan_groups(std::int64_t groups) {
    if (!wanted_) return;
    parts_[2] = p_.mask_size[3] == 1 ? groups : 1;
    stored_ = stride_[2] != 0 && stride_[3] != 0;
    const bool once =
        stored_ && (stride_[0] != 0 || p_.batch == 1) && (stride_[1] != 0 || p_.heads == 1);
    direct_ = parts() == 1 && (once || p_.mask_dtype == dtype_of<T>());
    dtype_ = direct_ ? p_.mask_dtype : dtype_of<T>();
  }
  void carve(Carver& carver) {
    if (!wanted_) return;
    data_ = direct_ ? call_.grad_mask : carver.take<T>(parts() * elements_);
  }

  // Before the tiles of a task, the blocks of keys group, group + groups, ...; heads are query
  // heads.
  void clear(const Task& task, KeyRange batches, KeyRange heads, std::int64_t block_keys,
             std::int64_t groups) const {
    if (!wanted_ || stored_) return;
    for (std::int64_t b = batches.begin; b < batches.end; ++b) {
      for (std::int64_t h = heads.begin; h < heads.end; ++h) {
        for (std::int64_t i = 0; i < p_.mask_size[2]; ++i) {
          T* const to = static_cast<T*>(data_) + at(task, b, h, i, 0);
          if (stride_[3] == 0) {
            *to = T(0);
            continue;
          }
          for (std::int64_t first = task.group * block_keys; first < p_.key_length;
               first += groups * block_keys) {
            fill_zero(to + first, smaller(block_keys, p_.key_length - first));
          }
        }
      }
    }
  }

  // The tile of `rows` queries from i0 and `keys` keys from `first`: gradient[rows][ld].
  template <int kGroupRows>
  void add(const Task& task, const TileRanges<T>& tile, std::int64_t b, std::int64_t h,
           std::int64_t i0, std::int64_t rows, std::int64_t first, std::int64_t keys,
           const T* gradient, std::int64_t ld) const {
    if (!wanted_) return;
    const bool stores = stored_ && (stride_[0] != 0 || b == task.first_batch) &&
                        (stride_[1] != 0 || h == task.first_head);
    for (std::int64_t r = 0; r < rows; ++r, gradient += ld) {
      const std::int64_t to = at(task, b, h, i0 + r, first);
      const std::int64_t g = r / kGroupRows;
      std::int64_t done = 0;
      for (KeyRange s = tile.span(g, 0); s.begin < s.end; s = tile.span(g, s.end)) {
        if (stores) {
          store_zeros(dtype_, data_, to + done, s.begin - done);
          store_row(dtype_, data_, to + s.begin, 1, s.end - s.begin, gradient + s.begin);
          done = s.end;
        } else {
          add_row(gradient + s.begin, s.end - s.begin,
                  static_cast<T*>(data_) + to + s.begin * stride_[3]);
        }
      }
      if (stores) store_zeros(dtype_, data_, to + done, keys - done);
    }
  }

  // The parts become the result; zeros if nothing contributes to it.
  void reduce(const Parallel& parallel) const {
    if (call_.grad_mask == nullptr || (wanted_ && direct_)) return;
    const std::int64_t elements =
        p_.mask_size[0] * p_.mask_size[1] * p_.mask_size[2] * p_.mask_size[3];
    constexpr std::int64_t chunk = 4096;
    constexpr std::int64_t strip = 256;
    parallel.run((elements + chunk - 1) / chunk, [&](std::int64_t t, int) {
      const std::int64_t end = smaller((t + 1) * chunk, elements);
      for (std::int64_t e = t * chunk; e < end; e += strip) {
        const std::int64_t n = smaller(strip, end - e);
        T sum[strip] = {};
        for (std::int64_t part = 0; wanted_ && part < parts(); ++part) {
          const T* const from = static_cast<const T*>(data_) + part * elements + e;
          for (std::int64_t x = 0; x < n; ++x) sum[x] += from[x];
        }
        store_row(p_.mask_dtype, call_.grad_mask, e, 1, n, sum);
      }
    });
  }

 private:
  std::int64_t parts() const { return parts_[0] * parts_[1] * parts_[2]; }

  // Index of (b, h, i, key) in the part of a task.
  std::int64_t at(const Task& task, std::int64_t b, std::int64_t h, std::int64_t i,
                  std::int64_t key) const {
    std::int64_t part = parts_[0] > 1 ? task.batch_set : 0;
    part = part * parts_[1] + (parts_[1] > 1 ? task.head_set : 0);
    part = part * parts_[2] + (parts_[2] > 1 ? task.group : 0);
    return part * elements_ + b * stride_[0] + h * stride_[1] + i * stride_[2] + key * stride_[3];
  }

  // to[j] += from[j], or all of them into to[0] if keys share an element.
  void add_row(const T* from, std::int64_t n, T* to) const {
    Vec<T> sum{};
    for (std::int64_t j = 0; j < n; j += kLanes<T>) {
      const Vec<T> x = load_up_to(from + j, n - j);
      if (stride_[3] == 0) {
        sum += x;
      } else {
        store_up_to(to + j, load_up_to(to + j, n - j) + x, n - j);
      }
    }
    if (stride_[3] == 0) *to += sum_lanes<T>(sum);
  }

  const AttentionBackward& call_;
  const AttentionProblem& p_;
  bool wanted_ = false;
  bool stored_ = false;  // by the first tile
  bool direct_ = false;  // into the result, else into parts
  DType dtype_ = dtype_of<T>();
  std::int64_t parts_[3] = {1, 1, 1};  // over batches, heads, groups of keys
  std::int64_t stride_[4] = {0, 0, 0, 0};
  std::int64_t elements_ = 1;
  void* data_ = nullptr;  // [part][mask elements] of dtype_
};

}  // namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA
