#include <caffe2/serialize/inline_container.h>
#include <torch/csrc/jit/serialization/pickler.h>
#include <torch/csrc/jit/serialization/unpickler.h>
#include <torch/types.h>
#include <torch_selfattn/nn/state_dict.h>

#include <algorithm>
#include <cstring>
#include <sstream>
#include <string_view>

#include "nn/common.h"

namespace torch_selfattn::nn {

using torch::Tensor;

namespace {

void collect(const torch::nn::Module& module, const std::string& prefix, StateDict& state) {
  for (const auto& item : module.named_parameters(/*recurse=*/false)) {
    state.insert(prefix + item.key(), item.value().detach());
  }
  for (const auto& item : module.named_buffers(/*recurse=*/false)) {
    state.insert(prefix + item.key(), item.value().detach());
  }
  for (const auto& child : module.named_children()) {
    collect(*child.value(), prefix + child.key() + '.', state);
  }
}

// "a", "b"
std::string quoted(const std::vector<std::string>& names) {
  std::string list;
  for (const auto& name : names) list += (list.empty() ? "\"" : ", \"") + name + '"';
  return list;
}

// torch.save(module.state_dict()) pickles an OrderedDict with an attribute, _metadata. torch's
// unpickler for C++ reads all of such a file but makes None of every OrderedDict. So the pickle is
// changed to one of the tuple (None, dict): the dict begins behind the OrderedDict, and ends where
// the attribute begins. Python writes both always in the same way. Another pickle is left alone.
std::string without_ordered_dict(std::string pickle) {
  using std::string_view_literals::operator""sv;
  // PROTO 2; GLOBAL; BINPUT 0; EMPTY_TUPLE; REDUCE; BINPUT 1
  constexpr auto begin =
      "\x80\x02"
      "ccollections\nOrderedDict\nq\0)Rq\x01"sv;
  // BINUNICODE of 9 bytes, behind EMPTY_DICT and BINPUT (q, 1 byte) or LONG_BINPUT (r, 4 bytes)
  constexpr auto attribute = "X\x09\0\0\0_metadata"sv;
  if (!pickle.starts_with(begin)) return pickle;
  size_t end = pickle.find(attribute);
  if (end == std::string::npos) {
    end = pickle.size() - 1;  // STOP
  } else {
    end -= pickle[end - 2] == 'q' ? 3 : 6;
  }
  pickle.resize(end);
  pickle += "\x86.";                 // TUPLE2, STOP
  pickle.insert(begin.size(), "}");  // EMPTY_DICT
  return pickle;
}

constexpr const char* kExpected =
    "load_state_dict: the file must hold a dict of tensors, as torch.save(module.state_dict(), "
    "path) writes it (got ";

}  // namespace

StateDict state_dict(const torch::nn::Module& module) {
  StateDict state;
  collect(module, "", state);
  return state;
}

void load_state_dict(torch::nn::Module& module, const StateDict& state) {
  StateDict own = state_dict(module);
  std::vector<std::string> missing;
  std::vector<std::string> unexpected;
  std::ostringstream errors;
  for (const auto& item : own) {
    if (!state.contains(item.key())) missing.push_back(item.key());
  }
  if (!missing.empty()) errors << "\n\tMissing key(s) in state_dict: " << quoted(missing) << ". ";
  for (const auto& item : state) {
    if (!own.contains(item.key())) unexpected.push_back(item.key());
  }
  if (!unexpected.empty()) {
    errors << "\n\tUnexpected key(s) in state_dict: " << quoted(unexpected) << ". ";
  }
  for (const auto& item : own) {
    const Tensor* value = state.find(item.key());
    if (value != nullptr && value->sizes() != item.value().sizes()) {
      errors << "\n\tsize mismatch for " << item.key() << ": copying a param with shape "
             << shape(*value) << " from checkpoint, the shape in current model is "
             << shape(item.value()) << '.';
    }
  }
  TORCH_CHECK(errors.str().empty(), "Error(s) in loading state_dict for ", module.name(), ':',
              errors.str());
  const torch::NoGradGuard no_grad;
  for (auto& item : own) item.value().copy_(state[item.key()]);
}

StateDict read_state_dict(const std::string& path) {
  caffe2::serialize::PyTorchStreamReader reader(path);
  const auto bytes_of = [&reader](const std::string& name) {
    const auto [data, size] = reader.getRecord(name);
    return std::string(static_cast<const char*>(data.get()), size);
  };
  TORCH_CHECK(reader.hasRecord("data.pkl"), kExpected, "an archive without data.pkl, ", path, ")");
  if (reader.hasRecord("byteorder")) {
    const std::string order = bytes_of("byteorder");
    TORCH_CHECK(order == "little", kExpected, "numbers in the byte order ", order, ")");
  }

  const std::string pickle = without_ordered_dict(bytes_of("data.pkl"));
  size_t position = 0;
  torch::jit::Unpickler unpickler(
      [&](char* buffer, size_t length) {
        const size_t count = std::min(length, pickle.size() - position);
        std::memcpy(buffer, pickle.data() + position, count);
        position += count;
        return count;
      },
      [](const c10::QualifiedName& name) -> c10::StrongTypePtr {
        TORCH_CHECK(false, kExpected, "an object of class ", name.qualifiedName(), ")");
      },
      nullptr,
      [&reader](const std::string& name) { return std::get<0>(reader.getRecord("data/" + name)); },
      torch::kCPU);
  unpickler.set_version(reader.version());
  torch::IValue root = unpickler.parse_ivalue();
  if (root.isTuple() && root.toTupleRef().size() == 2) root = root.toTupleRef().elements()[1];
  TORCH_CHECK(root.isGenericDict(), kExpected, root.tagKind(), ")");

  StateDict state;
  for (const auto& item : root.toGenericDict()) {
    TORCH_CHECK(item.key().isString(), kExpected, "a key that is no string, ", item.key(), ")");
    TORCH_CHECK(item.value().isTensor(), kExpected, "an entry '", item.key().toStringRef(),
                "' that is a ", item.value().tagKind(), ")");
    state.insert(item.key().toStringRef(), item.value().toTensor());
  }
  return state;
}

void load_state_dict(torch::nn::Module& module, const std::string& path) {
  load_state_dict(module, read_state_dict(path));
}

void write_state_dict(const StateDict& state, const std::string& path) {
  c10::Dict<std::string, Tensor> dict;
  for (const auto& item : state) dict.insert(item.key(), item.value().detach());

  std::string pickle;
  // Without the names of types, which torch.load(weights_only=True) refuses.
  torch::jit::Pickler pickler(
      [&pickle](const char* bytes, size_t size) { pickle.append(bytes, size); }, nullptr, nullptr,
      nullptr, nullptr, /*tag_aggregates=*/false);
  pickler.protocol();
  pickler.pushIValue(dict);
  pickler.stop();

  caffe2::serialize::PyTorchStreamWriter writer(path);
  writer.writeRecord("data.pkl", pickle.data(), pickle.size());
  writer.writeRecord("byteorder", "little", 6);
  size_t index = 0;
  for (const auto& tensor : pickler.tensorData()) {
    const auto data = torch::jit::getWriteableTensorData(tensor);
    writer.writeRecord("data/" + std::to_string(index++), data.data(), data.sizeInBytes());
  }
  writer.writeEndOfFile();
}

void save_state_dict(const torch::nn::Module& module, const std::string& path) {
  write_state_dict(state_dict(module), path);
}

}  // namespace torch_selfattn::nn
