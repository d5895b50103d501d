// Python entry of the compiled parts. No torch header here: importing the module runs the op registrations of the
// other files, and this one only tells how they were built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#ifdef CLASSFAIR_CUDA_MODULE
namespace classfair {
std::string why_unusable();  // cuda/probe.cu
}
#else
#include "cpu/isa/isa.h"
#endif

namespace {

std::string compiler() {
#if defined(__clang__)
  return std::string("clang ") + __clang_version__;
#elif defined(__GNUC__)
  return std::string("gcc ") + __VERSION__;
#else
  return "unknown";
#endif
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = compiler();
  info["torch_target"] = "2.10";
  info["cuda"] = CLASSFAIR_CUDA_VERSION;
  info["cuda_archs"] = CLASSFAIR_CUDA_ARCHS;
#ifndef CLASSFAIR_CUDA_MODULE
  info["cpu_instruction_sets"] = classfair::compiled_isas();
  info["cpu_instruction_set"] = classfair::selected_isa();
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("build_info", &build_info, "How this module was compiled, as a dict of strings.");
#ifdef CLASSFAIR_CUDA_MODULE
  m.def("why_unusable", &classfair::why_unusable,
        "Why these kernels cannot run on the current GPU; empty where they can.");
#endif
}
