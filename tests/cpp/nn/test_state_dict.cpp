#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "module_checks.h"

namespace {

using namespace module_checks;

// A path in the folder of temporary files, removed at the end.
class TemporaryFile {
 public:
  TemporaryFile()
      : path_(std::filesystem::temp_directory_path() /
              ("torch_selfattn_" + std::to_string(::getpid()) + ".pt")) {}
  ~TemporaryFile() { std::filesystem::remove(path_); }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;
  std::string path() const { return path_.string(); }

 private:
  std::filesystem::path path_;
};

}  // namespace

// Files that Python wrote or reads: tests/python/test_cpp_modules.py.
TEST_CASE("a saved module can be loaded", "[nn]") {
  torch::manual_seed(6);
  const TemporaryFile file;
  nn::TransformerEncoderLayer layer(8, 2);
  randomize(*layer);
  nn::save_state_dict(*layer, file.path());
  nn::TransformerEncoderLayer other(8, 2);
  nn::load_state_dict(*other, file.path());
  const auto expected = nn::state_dict(*layer);
  for (const auto& item : nn::state_dict(*other)) {
    REQUIRE(same(item.value(), expected[item.key()]));
  }
  for (const auto& parameter : other->parameters()) REQUIRE(parameter.requires_grad());
}

TEST_CASE("dtypes, shapes and shared memory in a file", "[nn]") {
  const TemporaryFile file;
  const Tensor base = torch::arange(12).to(torch::kBFloat16).view({3, 4});
  nn::StateDict state;
  state.insert("whole", base);
  state.insert("transposed", base.t());
  state.insert("part", base.slice(0, 1));
  state.insert("flags", base > 4);
  state.insert("number", torch::tensor(7));
  state.insert("empty", torch::empty({0, 3}));
  nn::write_state_dict(state, file.path());
  const auto read = nn::read_state_dict(file.path());
  REQUIRE(read.keys() == state.keys());
  for (const auto& item : state) REQUIRE(same(read[item.key()], item.value()));
}

TEST_CASE("buffers belong to the state dict, and dtypes are converted", "[nn]") {
  torch::nn::BatchNorm1d norm(3);
  REQUIRE(keys_of(*norm) == std::vector<std::string>{"weight", "bias", "running_mean",
                                                     "running_var", "num_batches_tracked"});
  nn::StateDict state;
  for (const auto& item : nn::state_dict(*norm)) {
    state.insert(item.key(), item.value().to(torch::kDouble) + 2);
  }
  nn::load_state_dict(*norm, state);
  REQUIRE(same(norm->running_mean, torch::full({3}, 2.0F)));
  REQUIRE(norm->num_batches_tracked.dtype() == torch::kLong);
}

TEST_CASE("a state dict that does not fit is refused as a whole", "[nn]") {
  torch::nn::Linear linear(3, 2);
  const Tensor weight = linear->weight.clone();
  nn::StateDict state;
  state.insert("weight", torch::zeros({2, 3}));
  state.insert("bias_", torch::zeros({2}));
  state.insert("more", torch::zeros({2}));
  REQUIRE(message_of<c10::Error>([&] { nn::load_state_dict(*linear, state); }) ==
          "Error(s) in loading state_dict for torch::nn::LinearImpl:\n"
          "\tMissing key(s) in state_dict: \"bias\". \n"
          "\tUnexpected key(s) in state_dict: \"bias_\", \"more\". ");
  REQUIRE(same(linear->weight, weight));

  nn::StateDict other_shape;
  other_shape.insert("weight", torch::zeros({2, 3}));
  other_shape.insert("bias", torch::zeros({3}));
  REQUIRE(message_of<c10::Error>([&] { nn::load_state_dict(*linear, other_shape); }) ==
          "Error(s) in loading state_dict for torch::nn::LinearImpl:\n"
          "\tsize mismatch for bias: copying a param with shape torch.Size([3]) from checkpoint, "
          "the shape in current model is torch.Size([2]).");
  REQUIRE(same(linear->weight, weight));
}

TEST_CASE("files that hold no state dict", "[nn]") {
  torch::nn::Linear linear(3, 2);
  const TemporaryFile file;
  REQUIRE_THROWS_AS(nn::load_state_dict(*linear, file.path()), c10::Error);  // there is none
  std::ofstream(file.path()) << "no archive";
  REQUIRE_THROWS_AS(nn::load_state_dict(*linear, file.path()), c10::Error);
  const auto bytes = torch::pickle_save(torch::IValue(std::vector<int64_t>{1, 2}));
  std::ofstream(file.path(), std::ios::binary).write(bytes.data(), std::ssize(bytes));
  REQUIRE(message_of<c10::Error>([&] { nn::load_state_dict(*linear, file.path()); }) ==
          "load_state_dict: the file must hold a dict of tensors, as "
          "torch.save(module.state_dict(), path) writes it (got GenericList)");
}
