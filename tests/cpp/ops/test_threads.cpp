#include <ATen/Parallel.h>
#include <torch/torch.h>
#include <torch_selfattn/ops.h>

#include <thread>
#include <vector>

#include "catch2_any.h"

// Calls inside PyTorch's parallel regions and from several threads of the program.

namespace {

using torch::Tensor;

// Output and gradients of both scores on a problem that several threads share out.
std::vector<Tensor> attend_and_differentiate(const std::vector<Tensor>& data) {
  std::vector<Tensor> leaves;
  for (const Tensor& t : data) leaves.push_back(t.detach().requires_grad_());
  const Tensor out = torch_selfattn::dot_product_attention(leaves[0], leaves[1], leaves[2]) +
                     torch_selfattn::additive_attention(leaves[0], leaves[1], leaves[2], leaves[3]);
  std::vector<Tensor> results = torch::autograd::grad({out}, leaves, {torch::ones_like(out)});
  results.push_back(out.detach());
  return results;
}

std::vector<Tensor> data_of(int64_t query_length, int64_t key_length) {
  return {torch::randn({2, 2, query_length, 16}), torch::randn({2, 2, key_length, 16}),
          torch::randn({2, 2, key_length, 16}), torch::randn({2, 16})};
}

void require_same(const std::vector<Tensor>& got, const std::vector<Tensor>& want) {
  REQUIRE(got.size() == want.size());
  for (size_t i = 0; i < got.size(); ++i) {
    INFO("result " << i);
    REQUIRE(torch::equal(got[i], want[i]));
  }
}

struct Threads {
  explicit Threads(int count) : before(at::get_num_threads()) { at::set_num_threads(count); }
  ~Threads() { at::set_num_threads(before); }
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;
  int before;
};

}  // namespace

TEST_CASE("attention inside at::parallel_for", "[ops]") {
  torch::manual_seed(1);
  const auto data = GENERATE(0, 1) == 0 ? data_of(90, 70) : data_of(3, 2100);
  const Threads threads(GENERATE(1, 2, 4));
  const std::vector<Tensor> want = attend_and_differentiate(data);
  std::vector<std::vector<Tensor>> got(8);
  std::vector<int> nested(got.size(), 0);
  at::parallel_for(0, static_cast<int64_t>(got.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto task = static_cast<size_t>(i);
      nested[task] = at::in_parallel_region() ? 1 : 0;
      got[task] = attend_and_differentiate(data);
    }
  });
  for (const auto& results : got) require_same(results, want);
  if (at::get_num_threads() > 1) REQUIRE(nested == std::vector<int>(got.size(), 1));
}

TEST_CASE("attention from several threads of the program at once", "[ops]") {
  torch::manual_seed(2);
  const auto data = data_of(120, 130);
  const Threads threads(2);
  const std::vector<Tensor> want = attend_and_differentiate(data);
  std::vector<std::vector<Tensor>> got(4);
  std::vector<std::thread> callers;
  callers.reserve(got.size());
  for (auto& results : got) {
    callers.emplace_back([&] {
      for (int i = 0; i < 5; ++i) results = attend_and_differentiate(data);
    });
  }
  for (auto& caller : callers) caller.join();
  for (const auto& results : got) require_same(results, want);
}
