#include "ops/canonical.h"

#include <ATen/autocast_mode.h>
#include <ATen/ops/repeat_interleave.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <initializer_list>
#include <utility>

#include "ops/checks.h"
#include "ops/known_equal.h"

namespace torch_selfattn::ops {

namespace {

using at::Tensor;
using c10::MaybeOwned;
using c10::SymDimVector;
using c10::SymInt;

bool is_one(const SymInt& a) { return known_equal(a, 1); }

// For either device: fake tensors say that theirs is Meta. The forward operator's own check, after
// its Autocast kernel, finds what was not cast.
bool is_autocast_on() {
  return at::autocast::is_autocast_enabled(at::kCPU) ||
         at::autocast::is_autocast_enabled(at::kCUDA);
}

// The size at `from_end` (-1 is the last), 1 where the tensor has no such dimension.
SymInt size_or_one(const Tensor& t, int64_t from_end) {
  const c10::SymIntArrayRef sizes = t.sym_sizes();
  const int64_t d = static_cast<int64_t>(sizes.size()) + from_end;
  return d >= 0 ? sizes[static_cast<size_t>(d)] : SymInt(1);
}

struct Shapes {
  const char* op;
  const AttentionTensors& tensors;

  [[noreturn]] void refuse(const char* rule) const {
    TORCH_CHECK(false, op, ": ", rule, " (got query=", tensors.query.sym_sizes(),
                ", key=", tensors.key.sym_sizes(), ", value=", tensors.value.sym_sizes(), ")");
  }
};

// The common size of one leading dimension.
SymInt broadcast(const Shapes& shapes, std::initializer_list<SymInt> sizes) {
  SymInt common = 1;
  for (const SymInt& size : sizes) {
    if (is_one(size) || known_equal(size, common)) continue;
    if (!is_one(common)) shapes.refuse("leading dimensions must be broadcastable");
    common = size;
  }
  return common;
}

// (..., H, L, D) of any rank as (batch_shape..., H, L, D). Three dimensions are samples of one
// head.
Tensor with_rank(const Tensor& t, int64_t rank) {
  Tensor result = t;
  if (rank <= 3) {
    if (result.dim() == 2) result = result.unsqueeze(0);
    return result.unsqueeze(1);
  }
  while (result.dim() < rank) result = result.unsqueeze(0);
  return result;
}

// Expands the dimensions before the last three to `batch` and merges them into one.
Tensor merge_batch(const Tensor& t, const SymDimVector& batch) {
  const size_t leading = batch.size();
  bool expand = false;
  SymDimVector size(t.sym_sizes());
  for (size_t d = 0; d < leading; ++d) {
    expand = expand || !known_equal(size[d], batch[d]);
    size[d] = batch[d];
  }
  Tensor result = expand ? t.expand_symint(size) : t;
  if (leading != 1) {
    SymInt merged = 1;
    for (const SymInt& b : batch) merged = merged * b;
    result = result.reshape_symint({merged, size[leading], size[leading + 1], size[leading + 2]});
  }
  return result;
}

// Query, key or value as (B, H, L, D): itself if it is that already.
MaybeOwned<Tensor> canonical_tensor(const Tensor& t, int64_t rank, const SymDimVector& batch) {
  if (rank == 4 && t.dim() == 4 && known_equal(t.sym_sizes()[0], batch[0])) {
    return MaybeOwned<Tensor>::borrowed(t);
  }
  return MaybeOwned<Tensor>::owned(merge_batch(with_rank(t, rank), batch));
}

// A mask keeps its broadcast dimensions as size 1: its gradient has the shape it was given in.
Tensor canonical_mask(const Shapes& shapes, const Tensor& given, int64_t rank,
                      const SymDimVector& batch, const SymInt& heads) {
  const auto refuse = [&] {
    SymDimVector full = batch;
    if (rank == 2) full.clear();
    if (rank > 3) full.push_back(heads);
    full.push_back(shapes.tensors.query.sym_size(-2));
    full.push_back(shapes.tensors.key.sym_size(-2));
    TORCH_CHECK(false, shapes.op, ": attn_mask must be broadcastable to ",
                c10::SymIntArrayRef(full), " (got attn_mask=", given.sym_sizes(), ")");
  };
  if (given.dim() > std::max<int64_t>(rank, 2)) refuse();
  Tensor mask = given;
  while (mask.dim() < 2) mask = mask.unsqueeze(0);
  mask = with_rank(mask, rank);
  const int64_t leading = static_cast<int64_t>(batch.size());
  bool all_one = true;
  for (int64_t d = 0; d < leading; ++d) {
    const SymInt size = mask.sym_size(d);
    if (!is_one(size) && !known_equal(size, batch[d])) refuse();
    all_one = all_one && is_one(size);
  }
  const SymInt mask_heads = mask.sym_size(leading);
  const SymInt rows = mask.sym_size(leading + 1);
  const SymInt columns = mask.sym_size(leading + 2);
  if ((!is_one(mask_heads) && !known_equal(mask_heads, heads)) ||
      (!is_one(rows) && !known_equal(rows, shapes.tensors.query.sym_size(-2))) ||
      (!is_one(columns) && !known_equal(columns, shapes.tensors.key.sym_size(-2)))) {
    refuse();
  }
  if (leading == 1) return mask;
  if (all_one) return mask.reshape_symint({1, mask_heads, rows, columns});
  return merge_batch(mask, batch);
}

OptionalTensor canonical_index(const Shapes& shapes, const char* name, const OptionalTensor& index,
                               int64_t rank, const SymDimVector& batch) {
  if (!index.has_value()) return index;
  bool fits =
      index->dim() == static_cast<int64_t>(batch.size()) || (rank == 2 && index->dim() == 0);
  for (int64_t d = 0; fits && d < index->dim(); ++d)
    fits = known_equal(index->sym_size(d), batch[d]);
  TORCH_CHECK(fits, shapes.op, ": ", name, " must have one element per sample, shape ",
              c10::SymIntArrayRef(batch), " (got ", name, "=", index->sym_sizes(), ")");
  return index->dim() == 1 ? *index : index->reshape({-1});
}

// (H) as (1, H), (..., H) as (B, H).
Tensor canonical_slopes(const Shapes& shapes, const Tensor& slopes, const SymDimVector& batch,
                        const SymInt& heads) {
  SymDimVector full = batch;
  full.push_back(heads);
  const int64_t missing = static_cast<int64_t>(full.size()) - slopes.dim();
  bool fits = slopes.dim() == 1 || missing == 0;
  for (int64_t d = 0; fits && d < slopes.dim(); ++d) {
    fits = known_equal(slopes.sym_size(d), full[static_cast<size_t>(d + missing)]);
  }
  TORCH_CHECK(fits, shapes.op, ": alibi_slopes must have the shape ",
              c10::SymIntArrayRef(&heads, 1), " or ", c10::SymIntArrayRef(full),
              " (got alibi_slopes=", slopes.sym_sizes(), ")");
  return slopes.dim() == 1 ? slopes.unsqueeze(0) : slopes.flatten(0, -2);
}

// Key or value heads: as many as the query's, or a divisor of them with enable_gqa.
void check_heads(const Shapes& shapes, const SymInt& heads, const SymInt& kv_heads,
                 bool enable_gqa) {
  if (known_equal(kv_heads, heads)) return;
  if (!enable_gqa) {
    if (!is_one(kv_heads)) {
      shapes.refuse(
          "query, key and value must have the same number of heads or one, unless enable_gqa");
    }
    return;
  }
  if (!(kv_heads > 0) || !known_equal(heads % kv_heads, 0)) {
    shapes.refuse("Number of heads in key and value must divide the number of heads in query");
  }
}

}  // namespace

Tensor CanonicalProblem::restore(const Tensor& result) const {
  if (rank == 4) return result;
  if (rank == 3) return result.squeeze(1);
  if (rank == 2) return result.squeeze(1).squeeze(0);
  SymDimVector size = batch_shape;
  for (int64_t d = 1; d < result.dim(); ++d) size.push_back(result.sym_size(d));
  return result.reshape_symint(size);
}

CanonicalProblem canonicalize(const char* op, const AttentionTensors& t,
                              AttentionOptions<SymInt> options, bool is_causal, bool enable_gqa) {
  check_attention_arguments(op, t, options, is_autocast_on());
  TORCH_CHECK(
      !(is_causal && t.attn_mask.has_value()), op,
      ": Explicit attn_mask should not be set when is_causal=True; a mask and causal is the "
      "mask and window_right=0 (got attn_mask=",
      t.attn_mask->sym_sizes(), ", is_causal=True)");
  const Shapes shapes{op, t};
  CanonicalProblem c;
  c.options = std::move(options);
  if (is_causal) c.options.window_right = 0;

  const int64_t rank = std::max({t.query.dim(), t.key.dim(), t.value.dim()});
  c.rank = rank;
  SymDimVector batch;
  for (int64_t from_end = -rank; from_end < (rank == 3 ? -2 : -3); ++from_end) {
    batch.push_back(broadcast(shapes, {size_or_one(t.query, from_end), size_or_one(t.key, from_end),
                                       size_or_one(t.value, from_end)}));
  }
  if (rank == 2) batch.emplace_back(1);
  c.query = canonical_tensor(t.query, rank, batch);
  c.key = canonical_tensor(t.key, rank, batch);
  c.value = canonical_tensor(t.value, rank, batch);
  if (rank > 4) c.batch_shape = batch;

  SymInt heads = c.query->sym_sizes()[1];
  const SymInt key_heads = c.key->sym_sizes()[1];
  const SymInt value_heads = c.value->sym_sizes()[1];
  if (!enable_gqa && is_one(heads) && !(is_one(key_heads) && is_one(value_heads))) {
    heads = broadcast(shapes, {key_heads, value_heads});
    c.query = MaybeOwned<Tensor>::owned(c.query->expand_symint({-1, heads, -1, -1}));
  }
  check_heads(shapes, heads, key_heads, enable_gqa);
  check_heads(shapes, heads, value_heads, enable_gqa);
  if (!known_equal(key_heads, value_heads)) {  // rare: bring both to the query's heads
    const auto repeated = [&heads](const Tensor& t, const SymInt& from) {
      return MaybeOwned<Tensor>::owned(at::repeat_interleave_symint(t, heads / from, 1));
    };
    c.key = repeated(*c.key, key_heads);
    c.value = repeated(*c.value, value_heads);
  }

  if (t.weight.has_value()) {
    const Tensor& w = *t.weight;
    TORCH_CHECK(w.dim() == 1 || (w.dim() == 2 && known_equal(w.sym_sizes()[0], heads)), op,
                ": weight must have the shape (E) or (H, E) (got weight=", w.sym_sizes(),
                ", query=", t.query.sym_sizes(), ")");
    c.weight = w;
  }
  if (t.attn_mask.has_value()) {
    c.attn_mask = canonical_mask(shapes, *t.attn_mask, rank, batch, heads);
  }
  c.key_lengths = canonical_index(shapes, "key_lengths", t.key_lengths, rank, batch);
  c.key_starts = canonical_index(shapes, "key_starts", t.key_starts, rank, batch);
  c.query_offsets = canonical_index(shapes, "query_offsets", t.query_offsets, rank, batch);
  if (t.alibi_slopes.has_value()) {
    c.alibi_slopes = canonical_slopes(shapes, *t.alibi_slopes, batch, heads);
  }
  return c;
}

}  // namespace torch_selfattn::ops
