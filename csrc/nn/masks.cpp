#include "nn/masks.h"

#include <array>
#include <limits>
#include <string>

#include "nn/common.h"

namespace torch_selfattn::nn {

using torch::Tensor;

namespace {

constexpr const char* module = "MultiHeadAttention: ";

void check_dtype(const char* name, const Tensor& mask) {
  TORCH_CHECK(mask.scalar_type() == torch::kBool || mask.is_floating_point(), module,
              "only bool and floating types of ", name, " are supported (got ", name,
              ".dtype=torch.", c10::getDtypeNames(mask.scalar_type()).first, ")");
}

void check_dims(const Tensor& query, const Tensor& key, const Tensor& value,
                const Tensor& key_padding_mask, const Tensor& attn_mask) {
  const int64_t dim = query.dim();
  TORCH_CHECK(dim == 2 || dim == 3, module,
              "query should be unbatched 2D or batched 3D tensor but received ", dim,
              "-D query tensor (got query=", shape(query), ")");
  const std::string for_query = std::string("For ") +
                                (dim == 3 ? "batched (3-D)" : "unbatched (2-D)") +
                                " `query`, expected ";
  TORCH_CHECK(key.dim() == dim && value.dim() == dim, module, for_query, "`key` and `value` to be ",
              dim, "-D but found ", key.dim(), "-D and ", value.dim(),
              "-D tensors respectively (got query=", shape(query), ", key=", shape(key),
              ", value=", shape(value), ")");
  if (key_padding_mask.defined()) {
    TORCH_CHECK(key_padding_mask.dim() == dim - 1, module, for_query,
                "`key_padding_mask` to be `None` or ", dim - 1, "-D but found ",
                key_padding_mask.dim(),
                "-D tensor instead (got key_padding_mask=", shape(key_padding_mask),
                ", query=", shape(query), ")");
  }
  if (attn_mask.defined()) {
    TORCH_CHECK(attn_mask.dim() == 2 || attn_mask.dim() == 3, module, for_query,
                "`attn_mask` to be `None`, 2-D or 3-D but found ", attn_mask.dim(),
                "-D tensor instead (got attn_mask=", shape(attn_mask), ")");
  }
}

// Batch, queries and keys of inputs that agree in their dimensions.
struct Sizes {
  bool is_batched;
  int64_t batch;
  int64_t query_length;
  int64_t key_length;
};

void check_attn_mask(const Tensor& mask, int64_t num_heads, const Sizes& sizes) {
  const int64_t queries = sizes.query_length;
  const int64_t keys = sizes.key_length;
  const bool fits = (mask.size(-2) == queries || mask.size(-2) == 1) &&
                    (mask.size(-1) == keys || mask.size(-1) == 1);
  const auto got = [&] {
    return c10::str("(got attn_mask=", shape(mask), ", B=", sizes.batch, ", num_heads=", num_heads,
                    ", Lq=", queries, ", Lk=", keys, ")");
  };
  if (mask.dim() == 2) {
    TORCH_CHECK(fits, module, "The shape of the 2D attn_mask is ", shape(mask), ", but should be (",
                queries, ", ", keys, "). ", got());
    return;
  }
  const int64_t matrices = sizes.batch * num_heads;
  const bool good = fits && mask.size(0) == matrices;
  TORCH_CHECK(good || !sizes.is_batched, module, "The shape of the 3D attn_mask is ", shape(mask),
              ", but should be (", matrices, ", ", queries, ", ", keys, "). ", got());
  TORCH_CHECK(good, module, "Expected `attn_mask` shape to be (", num_heads, ", ", queries, ", ",
              keys, ") but got ", shape(mask), " ", got());
}

void check_key_padding_mask(const Tensor& mask, const Tensor& query, const Tensor& key,
                            const Sizes& sizes) {
  const std::array<int64_t, 2> found{sizes.is_batched ? mask.size(0) : 1, mask.size(-1)};
  const std::array<int64_t, 2> expected{sizes.batch, sizes.key_length};
  for (size_t axis = 0; axis < 2; ++axis) {
    TORCH_CHECK(found[axis] == expected[axis] || found[axis] == 1, module,
                "Expected key_padded_mask.shape[", axis, "] to be ", expected[axis], ", but got ",
                found[axis], " (got key_padding_mask=", shape(mask), ", query=", shape(query),
                ", key=", shape(key), ")");
  }
}

}  // namespace

void check_inputs(const Tensor& query, const Tensor& key, const Tensor& value,
                  const Tensor& key_padding_mask, const Tensor& attn_mask, int64_t embed_dim,
                  int64_t num_heads, bool packed, bool batch_first) {
  if (key_padding_mask.defined()) check_dtype("key_padding_mask", key_padding_mask);
  if (attn_mask.defined()) check_dtype("attn_mask", attn_mask);
  check_dims(query, key, value, key_padding_mask, attn_mask);
  TORCH_CHECK(query.size(-1) == embed_dim, module, "was expecting embedding dimension of ",
              embed_dim, ", but got ", query.size(-1), " (got query=", shape(query), ")");
  TORCH_CHECK(!packed || key.sizes() == value.sizes(), module, "key shape ", shape(key),
              " does not match value shape ", shape(value), " (got key=", shape(key),
              ", value=", shape(value), ")");
  const auto key_rows = key.sizes().slice(0, key.dim() - 1);
  const auto value_rows = value.sizes().slice(0, value.dim() - 1);
  TORCH_CHECK(key_rows == value_rows, module, "key's sequence and batch dims ", shape(key_rows),
              " do not match value's ", shape(value_rows), " (got key=", shape(key),
              ", value=", shape(value), ")");
  const bool is_batched = query.dim() == 3;
  const int64_t along = is_batched && batch_first ? 1 : 0;
  const Sizes sizes{is_batched, is_batched ? query.size(1 - along) : 1, query.size(along),
                    key.size(along)};
  if (attn_mask.defined()) check_attn_mask(attn_mask, num_heads, sizes);
  if (key_padding_mask.defined()) check_key_padding_mask(key_padding_mask, query, key, sizes);
}

Tensor merge_masks(const Tensor& attn_mask, const Tensor& key_padding_mask, int64_t batch) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  Tensor mask = attn_mask;
  if (mask.defined() && mask.dim() == 3) {  // (B * H, Lq, Lk)
    mask = mask.view({batch, -1, mask.size(1), mask.size(2)});
  }
  if (key_padding_mask.defined()) {
    const Tensor padding = key_padding_mask.unsqueeze(1).unsqueeze(1);  // (B, 1, 1, Lk)
    const bool boolean = padding.scalar_type() == torch::kBool;
    if (!mask.defined()) {
      mask = padding;
    } else if (mask.scalar_type() == torch::kBool) {
      mask = boolean ? mask.logical_or(padding) : padding.masked_fill(mask, -infinity);
    } else {
      mask = boolean ? mask.masked_fill(padding, -infinity) : mask + padding;
    }
  }
  if (mask.defined() && mask.scalar_type() == torch::kBool) mask = mask.logical_not();
  return mask;
}

Tensor window_mask(int64_t query_length, int64_t key_length, torch::Device device,
                   const Tensor& key_lengths, const Tensor& key_starts, int64_t window_left,
                   int64_t window_right, int64_t query_offset, const Tensor& query_offsets) {
  const auto per_sample = [](const Tensor& x) { return x.view({-1, 1, 1, 1}); };
  const Tensor j = torch::arange(key_length, device);
  Tensor position = torch::arange(query_length, device).view({1, 1, -1, 1}) + query_offset;
  if (query_offsets.defined()) position = position + per_sample(query_offsets);
  Tensor allowed = torch::ones({1, 1, query_length, key_length},
                               torch::TensorOptions().dtype(torch::kBool).device(device));
  if (window_left >= 0) allowed = allowed.logical_and(j >= position - window_left);
  if (window_right >= 0) allowed = allowed.logical_and(j <= position + window_right);
  if (key_lengths.defined()) allowed = allowed.logical_and(j < per_sample(key_lengths));
  if (key_starts.defined()) allowed = allowed.logical_and(j >= per_sample(key_starts));
  return allowed;
}

}  // namespace torch_selfattn::nn
