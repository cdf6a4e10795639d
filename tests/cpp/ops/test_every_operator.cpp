#include <torch/torch.h>
#include <torch_selfattn/ops.h>

#include <cmath>
#include <functional>
#include <tuple>
#include <vector>

#include "catch2_any.h"

// Every public operator as a C++ function: results and gradients against a composition of ATen's
// operators. The test cases have the names of the operators: tests/python/test_cpp_operators.py
// runs them one by one for the table of the README.

namespace {

using torch::Tensor;
namespace ours = torch_selfattn;

Tensor leaf(at::IntArrayRef shape) {
  return torch::randn(shape, torch::dtype(torch::kFloat64)).requires_grad_(true);
}

struct Inputs {
  Inputs() { torch::manual_seed(3); }
  Tensor q = leaf({2, 3, 5, 4});
  Tensor k = leaf({2, 3, 6, 4});
  Tensor v = leaf({2, 3, 6, 2});
  Tensor w = leaf({3, 4});
};

Tensor dot_scores(const Tensor& q, const Tensor& k) {
  return torch::matmul(q, k.mT()) / std::sqrt(static_cast<double>(q.size(-1)));
}
Tensor additive_scores(const Tensor& q, const Tensor& k, const Tensor& w) {
  const Tensor features = torch::tanh(q.unsqueeze(-2) + k.unsqueeze(-3));
  return (features * w.unsqueeze(-2).unsqueeze(-2)).sum(-1);
}

using Results = std::vector<Tensor>;
Results list(const std::tuple<Tensor, Tensor>& pair) {
  return {std::get<0>(pair), std::get<1>(pair)};
}

void require_same(const Results& got, const Results& want, const Results& inputs) {
  REQUIRE(got.size() == want.size());
  for (size_t n = 0; n < got.size(); ++n) {
    INFO("result " << n);
    REQUIRE(torch::allclose(got[n], want[n]));
    if (!want[n].requires_grad()) continue;
    const Results upstream = {torch::randn_like(want[n])};
    const auto grads = [&](const Tensor& y) {
      return torch::autograd::grad({y}, inputs, upstream, true, false, true);
    };
    const Results got_grads = grads(got[n]);
    const Results want_grads = grads(want[n]);
    for (size_t i = 0; i < inputs.size(); ++i) {
      INFO("gradient " << i);
      if (!want_grads[i].defined()) continue;
      REQUIRE(torch::allclose(got_grads[i], want_grads[i]));
    }
  }
}

}  // namespace

TEST_CASE("dot_product_attention", "[ops]") {
  const Inputs x;
  const Tensor p = torch::softmax(dot_scores(x.q, x.k), -1);
  require_same({ours::dot_product_attention(x.q, x.k, x.v)}, {torch::matmul(p, x.v)},
               {x.q, x.k, x.v});
}

TEST_CASE("dot_product_attention_with_lse", "[ops]") {
  const Inputs x;
  const Tensor s = dot_scores(x.q, x.k);
  require_same(list(ours::dot_product_attention_with_lse(x.q, x.k, x.v)),
               {torch::matmul(torch::softmax(s, -1), x.v), torch::logsumexp(s, -1)},
               {x.q, x.k, x.v});
}

TEST_CASE("additive_attention", "[ops]") {
  const Inputs x;
  const Tensor p = torch::softmax(additive_scores(x.q, x.k, x.w), -1);
  require_same({ours::additive_attention(x.q, x.k, x.v, x.w)}, {torch::matmul(p, x.v)},
               {x.q, x.k, x.v, x.w});
}

TEST_CASE("additive_attention_with_lse", "[ops]") {
  const Inputs x;
  const Tensor s = additive_scores(x.q, x.k, x.w);
  require_same(list(ours::additive_attention_with_lse(x.q, x.k, x.v, x.w)),
               {torch::matmul(torch::softmax(s, -1), x.v), torch::logsumexp(s, -1)},
               {x.q, x.k, x.v, x.w});
}

TEST_CASE("attention_weights", "[ops]") {
  const Inputs x;
  const Tensor rows = torch::tensor({4, 0}, torch::kInt64);
  const Tensor want = torch::softmax(additive_scores(x.q, x.k, x.w), -1).index_select(-2, rows);
  require_same({ours::attention_weights(x.q, x.k, x.w, rows)}, {want}, {x.q, x.k, x.w});
}

TEST_CASE("multi_head_attention", "[ops]") {
  torch::manual_seed(4);
  const Tensor x = leaf({2, 5, 6});
  const Tensor in_weight = leaf({18, 6});
  const Tensor in_bias = leaf({18});
  const Tensor out_weight = leaf({6, 6});
  const Tensor out_bias = leaf({6});
  const auto heads = [](const Tensor& t) { return t.unflatten(-1, {2, 3}).transpose(1, 2); };
  const auto projected = torch::linear(x, in_weight, in_bias).chunk(3, -1);
  const Tensor p = torch::softmax(dot_scores(heads(projected[0]), heads(projected[1])), -1);
  const Tensor joined = torch::matmul(p, heads(projected[2])).transpose(1, 2).flatten(2);
  require_same(
      {ours::multi_head_attention(x, x, x, 2, {in_weight}, {in_bias}, out_weight, out_bias)},
      {torch::linear(joined, out_weight, out_bias)}, {x, in_weight, in_bias, out_weight, out_bias});
}

namespace {

// Angles (L, D / 2) of the positions offset, offset + 1, ...
Tensor angles(int64_t length, int64_t dim, int64_t offset) {
  const auto doubles = torch::dtype(torch::kFloat64);
  const Tensor position = torch::arange(offset, offset + length, doubles).unsqueeze(-1);
  return position / torch::pow(10000.0, 2.0 * torch::arange(dim / 2, doubles) / dim);
}
Tensor sinusoids(int64_t length, int64_t dim, int64_t offset) {
  const Tensor a = angles(length, dim, offset);
  return torch::stack({a.sin(), a.cos()}, -1).flatten(-2);
}

}  // namespace

TEST_CASE("sinusoidal_encoding", "[ops]") {
  require_same({ours::sinusoidal_encoding(7, 6, 10000.0, 3, torch::kFloat64)}, {sinusoids(7, 6, 3)},
               {});
}

TEST_CASE("add_sinusoidal_encoding", "[ops]") {
  const Tensor x = leaf({2, 5, 6});
  require_same({ours::add_sinusoidal_encoding(x, 0.5, 10000.0, 2)}, {x + 0.5 * sinusoids(5, 6, 2)},
               {x});
}

TEST_CASE("add_learned_encoding", "[ops]") {
  const Tensor x = leaf({2, 5, 6});
  const Tensor table = leaf({9, 6});
  require_same({ours::add_learned_encoding(x, table, 2)}, {x + table.slice(0, 2, 7)}, {x, table});
}

TEST_CASE("rotary_tables", "[ops]") {
  const Tensor a = angles(7, 6, 3);
  require_same(list(ours::rotary_tables(7, 6, 10000.0, 3, 1.0, torch::kFloat64)),
               {a.cos(), a.sin()}, {});
}

TEST_CASE("rotary_embedding", "[ops]") {
  const Tensor x = leaf({2, 3, 5, 6});
  const Tensor cos = leaf({5, 3});
  const Tensor sin = leaf({5, 3});
  const auto halves = x.chunk(2, -1);
  const Tensor want =
      torch::cat({halves[0] * cos - halves[1] * sin, halves[1] * cos + halves[0] * sin}, -1);
  require_same({ours::rotary_embedding(x, cos, sin)}, {want}, {x, cos, sin});
}
