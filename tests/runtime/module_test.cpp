#include "runtime/jit/module.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <thread>
#include <vector>

#include "tests/support/fake_artifact.h"
#include "tests/support/fake_driver.h"
#include "tests/support/fake_nvrtc.h"

namespace treeattn {
namespace {

using test::FakeDriver;
using testing::HasSubstr;
using testing::SizeIs;

class ModuleTest : public testing::Test {
 protected:
  ModuleTest() : fake_(2), source_(test::fake_source(test::fake_spec(), 2)) {
    artifact_ = test::fake_artifact();
    artifact_.entries.clear();
    std::vector<std::string> names;
    for (const KernelEntry& entry : source_.entries) {
      artifact_.entries.push_back({entry.name, entry.threads, entry.smem_bytes, 40, 0, 0, 100});
      names.push_back(entry.name);
    }
    artifact_.cubin = test::fake_image(names, source_.text);
  }

  std::unique_ptr<LoadedKernel> load() {
    refused_.clear();
    return LoadedKernel::load(source_, artifact_, refused_);
  }
  std::string unsupported(const LoadedKernel& kernel, int device) {
    try {
      kernel.make_ready(device_info(device));
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kUnsupported);
      return error.what();
    }
    return "ready";
  }

  FakeDriver fake_;
  GeneratedSource source_;
  Artifact artifact_;
  std::string refused_;
};

TEST_F(ModuleTest, FindsEveryEntryInOrder) {
  const auto kernel = load();
  ASSERT_NE(kernel, nullptr) << refused_;
  ASSERT_THAT(kernel->entries(), SizeIs(2));
  for (std::size_t i = 0; i < 2; ++i) {
    EXPECT_EQ(kernel->entry(i).name, source_.entries[i].name);
    EXPECT_EQ(kernel->entry(i).smem_bytes, source_.entries[i].smem_bytes);
    EXPECT_EQ(kernel->entry(i).threads, 128);
    EXPECT_NE(kernel->entry(i).function, nullptr);
  }
  EXPECT_EQ(kernel->facts(), artifact_.entries);
  EXPECT_THROW((void)kernel->entry(2), std::out_of_range);
}

TEST_F(ModuleTest, RefusedCodeIsAValueAndLeavesNothingLoaded) {
  fake_.on_load = [](std::string_view) { return CUDA_ERROR_INVALID_IMAGE; };
  EXPECT_EQ(load(), nullptr);
  EXPECT_THAT(refused_, HasSubstr("CUDA_ERROR_INVALID_IMAGE"));
  fake_.on_load = nullptr;
  artifact_.cubin = test::fake_image({source_.entries[0].name}, "lacks the second entry");
  EXPECT_EQ(load(), nullptr);
  EXPECT_THAT(refused_, HasSubstr("cuLibraryGetKernel(kernel_d128_1)"));
  EXPECT_EQ(fake_.live_libraries(), 0);
}

TEST_F(ModuleTest, FactsOfOtherEntriesAreRefused) {
  artifact_.entries[1].smem_bytes += 16;
  EXPECT_EQ(load(), nullptr);
  EXPECT_THAT(refused_, HasSubstr("other entries"));
  EXPECT_EQ(fake_.loads(), 0);
}

TEST_F(ModuleTest, TroubleThatIsNotTheCodesIsThrown) {
  fake_.on_load = [](std::string_view) { return CUDA_ERROR_OUT_OF_MEMORY; };
  try {
    load();
    FAIL() << "loaded";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kCudaError);
    EXPECT_THAT(error.what(), HasSubstr("CUDA_ERROR_OUT_OF_MEMORY"));
  }
}

TEST_F(ModuleTest, IsMadeReadyDeviceByDevice) {
  const auto kernel = load();
  EXPECT_FALSE(kernel->ready_on(0));
  EXPECT_EQ(kernel->make_ready(device_info(0)), std::nullopt);
  EXPECT_TRUE(kernel->ready_on(0));
  EXPECT_FALSE(kernel->ready_on(1));
  EXPECT_EQ(fake_.smem_limit("kernel_d128_1", 0), 2000);
  EXPECT_EQ(fake_.smem_limit("kernel_d128_1", 1), -1);
  EXPECT_EQ(fake_.functions_loaded(fake_.context(0)), 2);

  fake_.make_current(fake_.context(1));
  EXPECT_EQ(kernel->make_ready(device_info(1)), std::nullopt);
  EXPECT_TRUE(kernel->ready_on(0) && kernel->ready_on(1));
  EXPECT_EQ(fake_.smem_limit("kernel_d128_0", 1), 1000);
  EXPECT_FALSE(kernel->ready_on(-1) || kernel->ready_on(1000));
}

TEST_F(ModuleTest, OldDriversWithoutFuncLoadServe) {
  fake_.table.cuFuncLoad = nullptr;
  const auto kernel = load();
  EXPECT_EQ(kernel->make_ready(device_info(0)), std::nullopt);
  EXPECT_TRUE(kernel->ready_on(0));
}

TEST_F(ModuleTest, CodeThatDoesNotFitTheDeviceIsRefusedOnLoadingLazily) {
  fake_.on_get_function = [](std::string_view) { return CUDA_ERROR_NO_BINARY_FOR_GPU; };
  const auto kernel = load();
  const auto refused = kernel->make_ready(device_info(0));
  ASSERT_TRUE(refused);
  EXPECT_THAT(*refused, HasSubstr("kernel_d128_0 on device 0"));
  EXPECT_FALSE(kernel->ready_on(0));
}

TEST_F(ModuleTest, LimitsOfTheDeviceAreNamed) {
  fake_.devices[0].smem_optin_bytes = 2'000;
  fake_.devices[1].max_threads = 64;
  const auto kernel = load();
  EXPECT_THAT(unsupported(*kernel, 0),
              HasSubstr("kernel_d128_1 needs 2100 bytes of shared memory per block, but device 0 "
                        "(Fake GPU, compute capability 9.0) offers 2000"));
  EXPECT_THAT(unsupported(*kernel, 1), HasSubstr("needs 128 threads per block"));
  EXPECT_FALSE(kernel->ready_on(0) || kernel->ready_on(1));
  EXPECT_EQ(fake_.attribute_calls(), 0);
}

TEST_F(ModuleTest, RegistersAreALimitToo) {
  artifact_.entries[0].registers = 600;
  const auto kernel = load();
  EXPECT_THAT(unsupported(*kernel, 0), HasSubstr("needs 76800 registers"));
}

TEST_F(ModuleTest, UnloadsOnceAndMindsNoResult) {
  fake_.unload_result = CUDA_ERROR_DEINITIALIZED;
  load().reset();
  EXPECT_EQ(fake_.unloads(), 1);
}

TEST_F(ModuleTest, NeverUnloadsFromAnotherDriver) {
  auto kernel = load();
  set_driver_for_testing(&fake_.table);  // the same table, but everything of the old one is gone
  kernel.reset();
  EXPECT_EQ(fake_.unloads(), 0);
}

TEST_F(ModuleTest, ThreadsMayMakeItReadyTogether) {
  const auto kernel = load();
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&, device = i % 2] {
      fake_.make_current(fake_.context(device));
      EXPECT_EQ(kernel->make_ready(device_info(device)), std::nullopt);
      EXPECT_TRUE(kernel->ready_on(device));
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_TRUE(kernel->ready_on(0) && kernel->ready_on(1));
}

}  // namespace
}  // namespace treeattn
