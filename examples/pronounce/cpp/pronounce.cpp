// usage: pronounce MODEL.pt WORD...
//
// Prints a line "word  P H O N E S" for each word, without Python: MODEL.pt is the TorchScript file
// that export.py writes. With "-" as the only word, words are read from standard input.
// The exit status is 1 if a word could not be pronounced, 2 if there is no usable model.
#include <torch/csrc/jit/runtime/jit_exception.h>
#include <torch/script.h>
#include <torch_selfattn/ops.h>  // links the operators that the model calls

#include <filesystem>
#include <iostream>
#include <optional>
#include <string>
#include <vector>

namespace {

std::optional<torch::jit::Module> load_model(const std::string& path) {
  if (!std::filesystem::is_regular_file(path)) {
    std::cerr << "error: no model file at " << path << '\n';
    return std::nullopt;
  }
  try {
    torch::jit::Module model = torch::jit::load(path);
    model.eval();
    return model;
  } catch (const c10::Error& error) {
    std::cerr << "error: " << path
              << " is not a TorchScript model: " << error.what_without_backtrace() << '\n';
    return std::nullopt;
  }
}

// The phones of a word; an error that the model raises is printed.
std::optional<std::vector<std::string>> pronounce(torch::jit::Module& model,
                                                  const std::string& word) {
  try {
    const c10::InferenceMode no_gradients;
    const auto phones_and_attention = model.forward({word}).toTuple();
    std::vector<std::string> phones;
    for (const c10::IValue& phone : phones_and_attention->elements()[0].toListRef()) {
      phones.push_back(phone.toStringRef());
    }
    return phones;
  } catch (const torch::jit::JITException& error) {  // a Python exception inside the script
    std::cerr << "error: " << error.getOriginalMsg().value_or(error.what()) << '\n';
  } catch (const std::exception& error) {
    std::cerr << "error: cannot pronounce '" << word << "': " << error.what() << '\n';
  }
  return std::nullopt;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::cerr << "usage: " << argv[0]
              << " MODEL.pt WORD...   (- reads words from standard input)\n";
    return 2;
  }
  auto model = load_model(argv[1]);
  if (!model) {
    return 2;
  }
  std::vector<std::string> words(argv + 2, argv + argc);
  if (words == std::vector<std::string>{"-"}) {
    words.clear();
    for (std::string word; std::cin >> word;) {
      words.push_back(word);
    }
  }
  bool all_pronounced = true;
  for (const std::string& word : words) {
    const auto phones = pronounce(*model, word);
    all_pronounced &= phones.has_value();
    if (phones) {
      std::cout << word << " ";
      for (const std::string& phone : *phones) {
        std::cout << ' ' << phone;
      }
      std::cout << '\n';
    }
  }
  return all_pronounced ? 0 : 1;
}
