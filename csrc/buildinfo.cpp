// A host module that needs neither torch nor CUDA: how the extension was built, and constants that tests compare.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "patch_rows_index.h"

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
  m.doc() = "How the extension was built, and constants of its CUDA kernel.";
  m.def("facts", &facts, "Versions of the compiler and pybind11, and the GPU architectures.");
  m.attr("pixel_centre") = xclip_fast::kPixelCentre;
  m.attr("longest_side") = xclip_fast::kLongestSide;
  m.def("patch_row_columns", &xclip_fast::patch_row_columns, pybind11::arg("patch"));
}
