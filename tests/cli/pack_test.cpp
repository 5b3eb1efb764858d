// A pack that was compiled for a GPU serves an engine on it that may not compile.
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

#include "runtime/support/config.h"
#include "tests/cli/run_cli.h"
#include "tests/support/fake_driver.h"
#include "treeattn/treeattn.h"

namespace treeattn::test {
namespace {

/// The configuration is read once, so this happens before main(). The command line that the tests
/// run has an environment of its own.
class PackedEnvironment : public ::testing::Environment {
 public:
  PackedEnvironment() {
    setenv("TREEATTN_CACHE_PATH", pack().c_str(), 1);
    setenv("TREEATTN_CACHE_DIR", (dir_ / "cache").c_str(), 1);
    setenv("TREEATTN_JIT", "off", 1);
    for (const char* name : {"TREEATTN_FAMILY", "TREEATTN_TEMPLATE_DIR"}) unsetenv(name);
  }
  std::string pack() const { return (dir_ / "pack").string(); }

 private:
  TempDir dir_;
};
const auto* const environment = static_cast<const PackedEnvironment*>(
    ::testing::AddGlobalTestEnvironment(new PackedEnvironment));  // NOLINT(cert-err58-cpp)

/// Takes any image and finds any entry in it: what is compiled here is real.
void accept_all(DriverTable& table) {
  static FakeDriver::Kernel kernel;
  table.cuLibraryLoadData = [](CUlibrary* library, auto...) {
    *library = reinterpret_cast<CUlibrary>(&kernel);
    return CUDA_SUCCESS;
  };
  table.cuLibraryGetKernel = [](CUkernel* found, CUlibrary, const char*) {
    *found = reinterpret_cast<CUkernel>(&kernel);
    return CUDA_SUCCESS;
  };
}

TEST(Pack, OfATargetServesItsGpuWithoutCompiling) {
  if (!has_nvrtc()) GTEST_SKIP() << "no NVRTC here";
  ASSERT_EQ(config().cache_path, std::vector<std::string>{environment->pack()});
  const Cli cli;
  const CliResult built = cli.run({"precompile", "--arch", "sm_90", "--head-dim", "16", "--pass",
                                   "fwd,bwd", "--out", environment->pack()});
  ASSERT_EQ(built.status, 0) << built.err;
  FakeDriver driver;  // compute capability 9.0
  accept_all(driver.table);
  Engine engine;
  Shape shape{DType::kBF16, 2, 2, 16};
  shape.backward = true;
  std::vector<std::string> specs;
  for (const PreparedKernel& kernel : engine.prepare({&shape, 1})) {
    EXPECT_EQ(kernel.origin, "disk") << kernel.spec;
    specs.push_back(kernel.spec.substr(0, kernel.spec.find("/bf16")));
  }
  EXPECT_EQ(specs, (std::vector<std::string>{"plan/sm80@sm_90", "fwd/sm90@sm_90a", "bwd/sm80@sm_90",
                                             "bwd_dq/sm80@sm_90"}));
  EXPECT_EQ(engine.stats().compiles, 0U);
  // What is not in the pack names the command that adds it.
  shape.head_dim = shape.head_dim_v = 24;
  try {
    engine.prepare({&shape, 1});
    FAIL() << "compiled in spite of TREEATTN_JIT=off";
  } catch (const Error& error) {
    EXPECT_TRUE(contains(std::string(error.what()) + error.hint(),
                         "treeattn precompile --spec fwd/sm90@sm_90a/bf16/d24v24"))
        << error.what() << error.hint();
  }
}

}  // namespace
}  // namespace treeattn::test
