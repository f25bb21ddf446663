// A host module that needs neither torch nor CUDA: how the extension was built, and the kernel's index maths for tests.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "patch_embed_index.h"

namespace {

std::map<std::string, std::string> facts() {
  return {
      {"compiler", __VERSION__},
      {"pybind11", PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_MINOR)},
      {"architectures", XCLIP_FAST_ARCHITECTURES},
  };
}

}  // namespace

PYBIND11_MODULE(_buildinfo, m) {
  m.doc() = "How the extension was built, and the index maths of its CUDA kernels.";
  m.def("facts", &facts, "Versions of the compiler and pybind11, and the GPU architectures.");
  m.def("packed_weight_elements", &xclip_fast::packed_weight_elements, pybind11::arg("patch"),
        pybind11::arg("token_width"));
  m.def("packed_weight_index", &xclip_fast::packed_weight_index, pybind11::arg("patch"), pybind11::arg("token_width"),
        pybind11::arg("token_column"), pybind11::arg("channel"), pybind11::arg("y"), pybind11::arg("x"),
        "Where weight[token_column, channel, y, x] stands in the packed weights.");
  m.def("uses_large_tile", &xclip_fast::uses_large_tile, pybind11::arg("patches"), pybind11::arg("token_width"));
  m.attr("weight_scale") = xclip_fast::kWeightScale;
}
