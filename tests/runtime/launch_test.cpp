#include "runtime/jit/launch.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>

#include "runtime/jit/module.h"
#include "tests/support/fake_artifact.h"
#include "tests/support/fake_driver.h"
#include "tests/support/fake_nvrtc.h"

namespace treeattn {
namespace {

using test::FakeDriver;
using testing::HasSubstr;
using testing::SizeIs;

struct Params {
  const void* pointer;
  int numbers[20];
};

class LaunchTest : public testing::Test {
 protected:
  LaunchTest() {
    const GeneratedSource source = test::fake_source(test::fake_spec());
    Artifact artifact = test::fake_artifact();
    const KernelEntry& entry = source.entries[0];
    artifact.entries = {{entry.name, entry.threads, entry.smem_bytes, 40, 0, 0, 0}};
    artifact.cubin = test::fake_image({entry.name}, source.text);
    std::string refused;
    kernel_ = LoadedKernel::load(source, artifact, refused);
    plan_.kernel = kernel_->entry(0).function;
    plan_.grid = {5, 6, 7};
    plan_.threads = 128;
    plan_.smem_bytes = 70'000;
    plan_.params = &params_;
    plan_.params_bytes = sizeof params_;
    plan_.name = kernel_->entry(0).name;
    fake_.launch_params_bytes = sizeof params_;
  }

  FakeDriver fake_;
  std::unique_ptr<LoadedKernel> kernel_;
  Params params_{this, {3, 1, 4, 1, 5}};
  LaunchPlan plan_;
};

TEST_F(LaunchTest, PassesThePlanAsItIs) {
  int tag = 0;
  const auto stream = reinterpret_cast<CUstream>(&tag);
  launch(plan_, stream);
  const auto launches = fake_.launches();
  ASSERT_THAT(launches, SizeIs(1));
  const FakeDriver::Launch& seen = launches[0];
  EXPECT_EQ(seen.entry, "kernel_d128_0");
  EXPECT_EQ(seen.config.gridDimX, 5u);
  EXPECT_EQ(seen.config.gridDimY, 6u);
  EXPECT_EQ(seen.config.gridDimZ, 7u);
  EXPECT_EQ(seen.config.blockDimX * seen.config.blockDimY * seen.config.blockDimZ, 128u);
  EXPECT_EQ(seen.config.sharedMemBytes, 70'000u);
  EXPECT_EQ(seen.config.hStream, stream);
  EXPECT_EQ(seen.config.numAttrs, 0u);
  ASSERT_THAT(seen.params, SizeIs(sizeof params_));
  EXPECT_EQ(std::memcmp(seen.params.data(), &params_, sizeof params_), 0);
}

TEST_F(LaunchTest, AnErrorNamesTheKernelAndTheShape) {
  fake_.launch_result = CUDA_ERROR_OUT_OF_MEMORY;
  try {
    launch(plan_, nullptr);
    FAIL() << "launched";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kCudaError);
    EXPECT_THAT(error.what(), HasSubstr("launching kernel_d128_0 with 5 x 6 x 7 blocks of 128 "
                                        "threads and 70000 bytes"));
    EXPECT_THAT(error.what(), HasSubstr("CUDA_ERROR_OUT_OF_MEMORY"));
  }
}

}  // namespace
}  // namespace treeattn
