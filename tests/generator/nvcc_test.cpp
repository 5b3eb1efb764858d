// What `treeattn emit` prints is ordinary CUDA: nvcc takes it as it takes NVRTC's users' own files.
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "generator/generate.h"
#include "tests/support/temp_dir.h"

namespace treeattn {
namespace {

namespace fs = std::filesystem;

/// The first nvcc of CUDA_HOME, the usual place and PATH; empty: none.
std::string find_nvcc() {
  const char* home = std::getenv("CUDA_HOME");
  for (const std::string folder : {home != nullptr ? home : "", "/usr/local/cuda"}) {
    const fs::path nvcc = fs::path(folder) / "bin" / "nvcc";
    if (!folder.empty() && fs::exists(nvcc)) return nvcc.string();
  }
  return std::system("nvcc --version >/dev/null 2>&1") == 0 ? "nvcc" : "";
}

class NvccSlow : public ::testing::TestWithParam<const char*> {};

TEST_P(NvccSlow, TakesEmittedSource) {
  const std::string nvcc = find_nvcc();
  if (nvcc.empty()) GTEST_SKIP() << "no nvcc on this machine";
  const KernelSpec spec = parse_kernel_spec(GetParam());
  const test::TempDir folder;
  const fs::path source = folder.path() / "kernel.cu";
  const fs::path log = folder.path() / "log";
  std::ofstream(source) << generate(spec).text;
  // The line that the source itself names.
  const std::string command =
      nvcc + " -std=c++17 -arch=" + to_string(spec.problem.target) + " -cubin " + source.string() +
      " -o " + (folder.path() / "kernel.cubin").string() + " >" + log.string() + " 2>&1";
  const int status = std::system(command.c_str());
  std::ifstream said(log);
  const std::string text{std::istreambuf_iterator<char>(said), {}};
  if (text.find("Value 'sm_") != std::string::npos) GTEST_SKIP() << text;
  EXPECT_EQ(status, 0) << text;
  EXPECT_EQ(text, "") << "a warning";
}

INSTANTIATE_TEST_SUITE_P(EveryKernelFile, NvccSlow,
                         ::testing::Values("plan/sm80@sm_80", "fwd/sm80@sm_80/bf16/d64v64",
                                           "fwd/sm90@sm_90a/bf16/d64v64",
                                           "bwd/sm80@sm_80/bf16/d64v64",
                                           "bwd/sm80@sm_90/f16/d64v64/softcap",
                                           "bwd/sm90@sm_90a/bf16/d128v128",
                                           "bwd_dq/sm80@sm_80/bf16/d64v64"));

}  // namespace
}  // namespace treeattn
