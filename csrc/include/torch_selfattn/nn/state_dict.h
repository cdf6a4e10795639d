#pragma once

#include <torch/nn/module.h>
#include <torch_selfattn/export.h>

#include <string>

// Checkpoints that Python and C++ exchange, of any torch::nn::Module.
namespace torch_selfattn::nn {

using StateDict = torch::OrderedDict<std::string, torch::Tensor>;

// Parameters and buffers under the names, and in the order, of Python's module.state_dict(). The
// tensors are detached and share memory with the module.
TORCH_SELFATTN_API StateDict state_dict(const torch::nn::Module& module);

// Copies the tensors into the module, whatever their device and floating dtype. All names and
// shapes must be those of the module, else the error lists all that are not, in the words of
// Python's load_state_dict, and nothing is copied.
TORCH_SELFATTN_API void load_state_dict(torch::nn::Module& module, const StateDict& state);

// The dict of tensors in a file that torch.save(module.state_dict(), path) wrote in Python (or
// torch.save of a dict of tensors, or write_state_dict), on the CPU. Like torch.load with
// weights_only=True it runs no code of the file.
TORCH_SELFATTN_API StateDict read_state_dict(const std::string& path);

// Writes such a file; torch.load(path) makes a dict of it.
TORCH_SELFATTN_API void write_state_dict(const StateDict& state, const std::string& path);

// load_state_dict(*model, "model.pt"): what torch.save(model.state_dict(), "model.pt") wrote.
TORCH_SELFATTN_API void load_state_dict(torch::nn::Module& module, const std::string& path);

// save_state_dict(*model, "model.pt"): for model.load_state_dict(torch.load("model.pt")) in Python,
// and for load_state_dict.
TORCH_SELFATTN_API void save_state_dict(const torch::nn::Module& module, const std::string& path);

}  // namespace torch_selfattn::nn
