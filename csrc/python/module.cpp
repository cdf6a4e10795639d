#include <pybind11/pybind11.h>
#include <torch_selfattn/version.h>

// Importing this module loads libtorch_selfattn.so, which registers the operators; every tensor
// operation then goes through torch.ops.torch_selfattn. The module itself knows the build.
PYBIND11_MODULE(_C, m) {
  const torch_selfattn::BuildInfo info = torch_selfattn::build_info();
  m.attr("version") = info.version;
  m.attr("torch_version") = info.torch_version;
  m.attr("cuda") = info.cuda;
  m.attr("cuda_archs") = info.cuda_archs;
}
