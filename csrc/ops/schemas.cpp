#include <ATen/core/enum_tag.h>

#include <string>
#include <vector>

#include "ops/registration.h"

// Every schema of the package. Tensors are positional; whatever can carry a size is a SymInt.
// Operators that begin with an underscore are the forward and backward layers: canonical shapes
// only, no defaults (docs/adding_an_op.md).
namespace {

// The arguments that every dense attention operator shares. attention_shared_tail are those that
// F.scaled_dot_product_attention does not have.
const std::string sdpa_arguments =
    "Tensor? attn_mask=None, float dropout_p=0.0, bool is_causal=False, float? scale=None, "
    "bool enable_gqa=False, ";
const std::string shared_tail =
    "Tensor? key_lengths=None, Tensor? key_starts=None, SymInt window_left=-1, "
    "SymInt window_right=-1, SymInt query_offset=0, Tensor? query_offsets=None, "
    "Tensor? alibi_slopes=None";
// Of the additive score, at the end: files that were saved before know nothing of them.
const std::string activation = ", str activation=\"tanh\", float negative_slope=0.2";

// What the forward and backward layers get: no is_causal (it is window_right = 0) and no GQA flag
// (it is read off the head counts); negative_slope is the activation (None: tanh).
const std::string canonical_inputs =
    "Tensor query, Tensor key, Tensor value, Tensor? weight, Tensor? attn_mask, "
    "Tensor? key_lengths, Tensor? key_starts, Tensor? query_offsets, Tensor? alibi_slopes";
const std::string canonical_options =
    "float? scale, float? negative_slope, float dropout_p, SymInt window_left, "
    "SymInt window_right, SymInt query_offset";

}  // namespace

TORCH_SELFATTN_SCHEMAS(library) {
  // Library::def takes a literal only.
  const auto def = [&library](const std::string& schema, const std::vector<at::Tag>& tags) {
    library.def(schema.c_str(), tags);
  };
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  const std::vector<at::Tag> random_tags = {at::Tag::pt2_compliant_tag,
                                            at::Tag::nondeterministic_seeded};

  // Attention, public layer.
  const std::string dot_inputs = "(Tensor query, Tensor key, Tensor value, ";
  const std::string additive_inputs = "(Tensor query, Tensor key, Tensor value, Tensor weight, ";
  const std::string tail = sdpa_arguments + shared_tail + ") -> ";
  const std::string additive_tail = sdpa_arguments + shared_tail + activation + ") -> ";
  def("dot_product_attention" + dot_inputs + tail + "Tensor", random_tags);
  def("dot_product_attention_with_lse" + dot_inputs + tail + "(Tensor output, Tensor lse)",
      random_tags);
  def("additive_attention" + additive_inputs + additive_tail + "Tensor", random_tags);
  def("additive_attention_with_lse" + additive_inputs + additive_tail +
          "(Tensor output, Tensor lse)",
      random_tags);
  def("attention_weights(Tensor query, Tensor key, Tensor? weight=None, Tensor? rows=None, "
      "Tensor? heads=None, Tensor? attn_mask=None, bool is_causal=False, float? scale=None, "
      "bool enable_gqa=False, " +
          shared_tail + ", bool average_heads=False" + activation + ") -> Tensor",
      tags);
  def("multi_head_attention(Tensor query, Tensor key, Tensor value, SymInt num_heads, "
      "Tensor[] in_proj_weight, Tensor[] in_proj_bias, Tensor out_proj_weight, "
      "Tensor? out_proj_bias=None, Tensor? score_weight=None, SymInt? num_kv_heads=None, "
      "Tensor? attn_mask=None, float dropout_p=0.0, bool is_causal=False, float? scale=None, " +
          shared_tail + activation + ") -> Tensor",
      random_tags);
  def("explain" + dot_inputs + "Tensor? weight=None, " + additive_tail + "str", tags);

  // Attention, forward and backward layers. weight is None for the dot-product score.
  def("_attention_forward(" + canonical_inputs + ", " + canonical_options +
          ") -> (Tensor output, Tensor lse, Tensor philox_state)",
      random_tags);
  def("_attention_backward(Tensor grad_output, Tensor? grad_lse, " + canonical_inputs +
          ", Tensor output, Tensor lse, Tensor philox_state, " + canonical_options +
          ", bool attn_mask_grad, bool alibi_slopes_grad) -> (Tensor grad_query, Tensor grad_key, "
          "Tensor grad_value, Tensor grad_weight, Tensor grad_attn_mask, "
          "Tensor grad_alibi_slopes)",
      tags);
  def("_attention_dropout_factors(Tensor philox_state, SymInt batch, SymInt heads, "
      "SymInt query_length, SymInt key_length, float dropout_p, ScalarType dtype) -> Tensor",
      tags);

  // Of multi_head_attention, with its projections as they come (ops/packed_attention.h).
  const std::string packed_inputs =
      "Tensor packed, Tensor? query, Tensor? weight, Tensor? attn_mask, Tensor? key_lengths, "
      "Tensor? key_starts, Tensor? query_offsets, Tensor? alibi_slopes";
  const std::string packed_options = "SymInt num_heads, SymInt num_kv_heads, " + canonical_options;
  def("_packed_attention_forward(" + packed_inputs + ", " + packed_options +
          ") -> (Tensor output, Tensor lse, Tensor philox_state)",
      random_tags);
  def("_packed_attention_backward(Tensor grad_output, Tensor? grad_lse, " + packed_inputs +
          ", Tensor output, Tensor lse, Tensor philox_state, " + packed_options +
          ", bool attn_mask_grad, bool alibi_slopes_grad) -> (Tensor grad_packed, "
          "Tensor grad_query, Tensor grad_weight, Tensor grad_attn_mask, "
          "Tensor grad_alibi_slopes)",
      tags);

  // Of attention_weights. query_indices: what the queries count as where they are rows of others.
  const std::string weights_arguments =
      "Tensor query, Tensor key, Tensor? weight, Tensor? attn_mask, Tensor? key_lengths, "
      "Tensor? key_starts, Tensor? query_offsets, Tensor? alibi_slopes, Tensor? query_indices, "
      "float? scale, float? negative_slope, SymInt window_left, SymInt window_right, SymInt "
      "query_offset, "
      "bool average_heads";
  def("_attention_weights_forward(" + weights_arguments + ") -> Tensor", tags);
  def("_attention_weights_backward(Tensor grad, " + weights_arguments +
          ", bool attn_mask_grad, bool alibi_slopes_grad) -> (Tensor grad_query, Tensor grad_key, "
          "Tensor grad_weight, Tensor grad_attn_mask, Tensor grad_alibi_slopes)",
      tags);

  // Positional encodings, public layer.
  def("sinusoidal_encoding(SymInt length, SymInt dim, float base=10000.0, SymInt offset=0, "
      "ScalarType? dtype=None, Device? device=None) -> Tensor",
      tags);
  def("add_sinusoidal_encoding(Tensor x, float scale=1.0, float base=10000.0, SymInt offset=0, "
      "Tensor? positions=None) -> Tensor",
      tags);
  def("add_learned_encoding(Tensor x, Tensor table, SymInt offset=0, Tensor? positions=None) "
      "-> Tensor",
      tags);
  def("rotary_embedding(Tensor x, Tensor cos, Tensor sin, bool interleaved=False, "
      "SymInt? rotary_dim=None, Tensor? position_ids=None) -> Tensor",
      tags);
  def("rotary_tables(SymInt length, SymInt dim, float base=10000.0, SymInt offset=0, "
      "float scaling=1.0, ScalarType? dtype=None, Device? device=None) "
      "-> (Tensor cos, Tensor sin)",
      tags);

  // Positional encodings, forward and backward layers. `like` only gives a dtype and a device.
  def("_sinusoidal_encoding_forward(Tensor like, SymInt length, SymInt dim, float base, "
      "SymInt offset) -> Tensor",
      tags);
  def("_rotary_tables_forward(Tensor like, SymInt length, SymInt dim, float base, SymInt offset, "
      "float scaling) -> (Tensor cos, Tensor sin)",
      tags);
  def("_add_sinusoidal_encoding_forward(Tensor x, Tensor? positions, float scale, float base, "
      "SymInt offset) -> Tensor",
      tags);
  def("_add_learned_encoding_forward(Tensor x, Tensor table, Tensor? positions, SymInt offset) "
      "-> Tensor",
      tags);
  def("_add_learned_encoding_backward(Tensor grad, Tensor? positions, SymInt offset, SymInt rows, "
      "ScalarType dtype) -> Tensor",
      tags);
  // conjugate: by minus the angles, which is the transpose and so the backward.
  def("_rotary_embedding_forward(Tensor x, Tensor cos, Tensor sin, Tensor? position_ids, "
      "bool interleaved, bool conjugate) -> Tensor",
      tags);
}
