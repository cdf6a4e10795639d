#include <pybind11/pybind11.h>
#include <torch_selfattn/ops.h>
#include <torch_selfattn/version.h>

// Importing this module loads libtorch_selfattn.so, which registers the operators; every tensor
// operation then goes through torch.ops.torch_selfattn. The module itself knows the build and the
// choice of implementation, nothing about tensors.
PYBIND11_MODULE(_C, m) {
  const torch_selfattn::BuildInfo info = torch_selfattn::build_info();
  m.attr("version") = info.version;
  m.attr("torch_version") = info.torch_version;
  m.attr("cuda") = info.cuda;
  m.attr("cuda_archs") = info.cuda_archs;
  m.def("forced_implementation", &torch_selfattn::forced_implementation);
  m.def("set_forced_implementation", &torch_selfattn::set_forced_implementation,
        pybind11::arg("name"));
}
