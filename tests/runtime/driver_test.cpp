#include "runtime/cuda/driver.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <numeric>
#include <thread>
#include <vector>

#include "runtime/cuda/device.h"
#include "runtime/cuda/device_memory.h"
#include "tests/support/fake_driver.h"

namespace treeattn {
namespace {

using test::FakeDriver;
using testing::Each;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::Not;

template <typename Body>
Error error_of(Body&& body) {
  try {
    body();
  } catch (const Error& error) {
    return error;
  }
  return {ErrorCode::kOk, "nothing was thrown"};
}

TEST(Driver, AMissingLibraryIsExplained) {
  const std::array<std::string, 2> candidates = {"/no/such/folder/libcuda.so.1",
                                                 "libno-such-driver.so.9"};
  DriverProblem problem;
  EXPECT_EQ(open_driver(candidates, problem), nullptr);
  EXPECT_EQ(problem.code, ErrorCode::kNotFound);
  for (const std::string& candidate : candidates) {
    EXPECT_THAT(problem.message, HasSubstr(candidate));
  }
  EXPECT_THAT(problem.hint, HasSubstr("install the NVIDIA driver"));
}

TEST(Driver, ALibraryWithoutTheEntryPointsIsTooOld) {
  const std::array<std::string, 1> candidates = {"libm.so.6"};
  DriverProblem problem;
  EXPECT_EQ(open_driver(candidates, problem), nullptr);
  EXPECT_EQ(problem.code, ErrorCode::kNotFound);
  EXPECT_THAT(problem.message, HasSubstr("cuGetProcAddress_v2"));
  EXPECT_THAT(problem.hint, HasSubstr("525"));
}

TEST(Driver, AFakeTakesItsPlace) {
  const unsigned before = driver_generation();
  {
    const FakeDriver fake;
    EXPECT_EQ(&driver(), &fake.table);
    EXPECT_EQ(try_driver(), &fake.table);
    EXPECT_EQ(driver_if_in_use(), &fake.table);
    EXPECT_EQ(driver_cuda_major(driver()), 13);
    EXPECT_GT(driver_generation(), before);
  }
  EXPECT_GT(driver_generation(), before + 1);
  std::string why;
  const DriverTable* real = try_driver(&why);
  EXPECT_EQ(real == nullptr, !why.empty());
  if (real == nullptr) {
    EXPECT_THROW(driver(), Error);
  }
}

TEST(Driver, CheckNamesTheStepAndTheResult) {
  const FakeDriver fake;
  EXPECT_NO_THROW(check(CUDA_SUCCESS, "nothing"));
  const Error error = error_of([] { check(CUDA_ERROR_INVALID_IMAGE, "loading a kernel"); });
  EXPECT_EQ(error.code(), ErrorCode::kCudaError);
  EXPECT_STREQ(error.what(),
               "loading a kernel: CUDA_ERROR_INVALID_IMAGE (200): device kernel image is invalid");
}

TEST(Device, ReportsWhatTheDriverSaysOfEach) {
  FakeDriver fake(2);
  fake.devices[1] = {"Small GPU", 8, 6, 28, 101'376, 1024, 65'536, 2 << 20};
  const DeviceInfo& first = device_info(0);
  const DeviceInfo& second = device_info(1);
  EXPECT_EQ(first.name, "Fake GPU");
  EXPECT_EQ(second.name, "Small GPU");
  EXPECT_EQ(second.ordinal, 1);
  EXPECT_EQ(second.major * 10 + second.minor, 86);
  EXPECT_EQ(second.sm_count, 28);
  EXPECT_EQ(second.smem_optin_bytes, 101'376);
  EXPECT_EQ(second.l2_bytes, 2 << 20);
  EXPECT_EQ(second.memory_bytes, std::int64_t{80} << 30);
  fake.devices[1].sm_count = 1;
  EXPECT_EQ(device_info(1).sm_count, 28) << "read once";
  EXPECT_EQ(&device_info(0), &first);
}

TEST(Device, AnotherDriversAnswersAreNotReused) {
  {
    const FakeDriver fake;
    EXPECT_EQ(device_info(0).sm_count, 132);
  }
  FakeDriver fake;
  fake.devices[0].sm_count = 7;
  EXPECT_EQ(device_info(0).sm_count, 7);
}

TEST(Context, ScopeMakesAnotherContextCurrentAndRestores) {
  FakeDriver fake(2);
  {
    const ContextScope same(fake.context(0));
    EXPECT_EQ(fake.context_depth(), 1u) << "already current";
    const ContextScope other(fake.context(1));
    EXPECT_EQ(fake.current(), fake.context(1));
    EXPECT_EQ(current_device(), 1);
    const ContextScope none(nullptr);
    EXPECT_EQ(fake.current(), fake.context(1));
  }
  EXPECT_EQ(fake.current(), fake.context(0));
}

TEST(Context, ThreadsWithoutOneGetAnErrorOrAScope) {
  FakeDriver fake;
  std::thread([&] {
    const Error error = error_of([] { current_device(); });
    EXPECT_THAT(error.what(), HasSubstr("no CUDA context is current"));
    const ContextScope scope(fake.context(0));
    EXPECT_EQ(current_device(), 0);
  }).join();
}

TEST(Context, PrimaryContextIsCurrentWhileItLives) {
  FakeDriver fake(2);
  {
    const PrimaryContext primary(1);
    EXPECT_EQ(fake.current(), primary.get());
    EXPECT_EQ(primary.device(), 1);
  }
  EXPECT_EQ(fake.current(), fake.context(0));
  const Error error = error_of([] { const PrimaryContext missing(2); });
  EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
  EXPECT_THAT(error.what(), HasSubstr("device is 2, but this machine has devices 0 to 1"));
}

TEST(DeviceBuffer, CarriesValuesThereAndBack) {
  const FakeDriver fake;
  std::vector<int> values(100);
  std::iota(values.begin(), values.end(), 0);
  DeviceBuffer buffer = DeviceBuffer::copy_of(values);
  EXPECT_EQ(buffer.bytes(), 400u);
  EXPECT_EQ(buffer.download_all<int>(), values);
  EXPECT_THAT(buffer.download<int>(3, 40), ElementsAre(10, 11, 12));
  const std::array<int, 2> patch = {-1, -2};
  buffer.upload(std::span<const int>(patch), 4);
  EXPECT_THAT(buffer.download<int>(4), ElementsAre(0, -1, -2, 3));
  buffer.fill(0xff);
  EXPECT_THAT(buffer.download_all<int>(), Each(-1));
  buffer.fill_words(7);
  EXPECT_THAT(buffer.download_all<int>(), Each(7));
  DeviceBuffer moved = std::move(buffer);
  EXPECT_EQ(fake.live_allocations(), 1u);
  moved = DeviceBuffer();
  EXPECT_EQ(DeviceBuffer(0).address(), 0u);
}

TEST(DeviceBuffer, RefusesToCopyPastItsEnd) {
  const FakeDriver fake;
  DeviceBuffer buffer(8);
  const std::array<int, 3> values = {1, 2, 3};
  EXPECT_THROW(buffer.upload(std::span<const int>(values)), Error);
  EXPECT_THROW(buffer.upload(std::span<const int>(values).first(1), 8), Error);
  const Error error = error_of([&] { (void)buffer.download<int>(1, 6); });
  EXPECT_THAT(error.what(), HasSubstr("4 bytes at offset 6 of a device buffer of 8 bytes"));
}

TEST(DeviceBuffer, SaysHowMuchItCouldNotAllocate) {
  FakeDriver fake;
  fake.alloc_result = CUDA_ERROR_OUT_OF_MEMORY;
  const Error error = error_of([] { const DeviceBuffer buffer(12345); });
  EXPECT_EQ(error.code(), ErrorCode::kCudaError);
  EXPECT_THAT(error.what(), HasSubstr("allocating 12345 bytes"));
  EXPECT_THAT(error.what(), HasSubstr("CUDA_ERROR_OUT_OF_MEMORY (2)"));
}

TEST(DeviceMemory, NothingIsLeftBehind) {
  const FakeDriver fake;
  {
    const DeviceBuffer buffer(64);
    const StreamOwner stream;
    Event start;
    Event stop;
    start.record(stream.get());
    stop.record(stream.get());
    stop.synchronize();
    stream.synchronize();
    EXPECT_EQ(stop.ms_since(start), 1.5F);
    EXPECT_EQ(fake.live_allocations(), 4u);
  }
  EXPECT_EQ(fake.live_allocations(), 0u);
}

}  // namespace
}  // namespace treeattn
