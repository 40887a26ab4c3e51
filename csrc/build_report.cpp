// The module `_C`: says how the compiled part of the package was built. Holds no date and no folder of a build, so that builds
// can be compared.
#include <pybind11/pybind11.h>

namespace {

pybind11::dict build_report() {
  pybind11::dict report;
  report["torch"] = RSLOSS_TORCH;
  report["compiler"] = __VERSION__;
  report["c++ flags"] = RSLOSS_CXX_FLAGS;
  report["cuda"] = RSLOSS_CUDA;
  report["cuda architectures"] = RSLOSS_CUDA_ARCHITECTURES;
  report["nvcc flags"] = RSLOSS_NVCC_FLAGS;
  return report;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) { module.def("build_report", &build_report); }
