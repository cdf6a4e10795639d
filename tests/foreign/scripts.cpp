// scripts <folder> <name>...: calls modules that Python scripted and saved, for
// test_scripted_in_cpp of tests/python/test_modules_transforms.py. Of each name the folder holds
// <name>.pt, the module, and <name>.call.pt, a tuple of the positional arguments and a dict of the
// others. Writes a dict to <name>.results.pt: out.0, out.1, ... and of their sum of squares the
// gradients grad.<parameter> and grad.0, grad.1, ... of the arguments.
#include <ATen/Parallel.h>
#include <torch/script.h>
#include <torch_selfattn/version.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

namespace {

std::vector<char> read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

void call(const std::string& path) {
  auto module = torch::jit::load(path + ".pt");
  module.eval();
  const auto both = torch::jit::pickle_load(read(path + ".call.pt")).toTuple();
  const auto arguments = both->elements()[0].toTuple();
  torch::jit::Stack args = arguments->elements().vec();
  for (auto& argument : args) argument.toTensor().set_requires_grad(true);
  torch::jit::Kwargs kwargs;
  for (const auto& entry : both->elements()[1].toGenericDict()) {
    kwargs.emplace(entry.key().toStringRef(), entry.value());
  }

  const auto result = module.forward(args, kwargs);
  torch::jit::Stack outputs = {result};
  if (result.isTuple()) outputs = result.toTuple()->elements().vec();
  c10::Dict<std::string, torch::Tensor> results;
  auto loss = torch::zeros({}, torch::kDouble);
  for (const auto& output : outputs) {
    if (output.isNone()) continue;
    results.insert("out." + std::to_string(results.size()), output.toTensor().detach());
    loss = loss + output.toTensor().square().sum();
  }
  loss.backward();
  for (const auto& parameter : module.named_parameters()) {
    results.insert("grad." + parameter.name, parameter.value.grad());
  }
  for (std::size_t n = 0; n < args.size(); ++n) {
    results.insert("grad." + std::to_string(n), args[n].toTensor().grad());
  }
  const auto bytes = torch::jit::pickle_save(results);
  std::ofstream(path + ".results.pt", std::ios::binary)
      .write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  std::puts(path.c_str());
}

}  // namespace

int main(int argc, char** argv) {
  at::set_num_threads(1);  // as the tests: PyTorch's sums are rounded as theirs
  for (int n = 2; n < argc; ++n) call(std::string(argv[1]) + '/' + argv[n]);
}
