#include "runtime/jit/kernel_cache.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <filesystem>
#include <thread>
#include <vector>

#include "runtime/support/advisory_lock.h"
#include "tests/support/fake_driver.h"
#include "tests/support/fake_nvrtc.h"
#include "tests/support/kernel_cache_fixture.h"
#include "tests/support/log_capture.h"
#include "tests/support/temp_dir.h"

namespace treeattn {
namespace {

namespace fs = std::filesystem;
using test::cache_over;
using test::error_of;
using test::fake_source;
using test::fake_spec;
using test::FakeDriver;
using test::FakeNvrtc;
using test::files_below;
using test::LogCapture;
using test::NoCompiler;
using test::options;
using test::TempDir;
using testing::AllOf;
using testing::Each;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::Not;
using testing::SizeIs;

class KernelCacheTest : public testing::Test {
 protected:
  fs::path root() const { return folder_ / "cache"; }
  std::unique_ptr<KernelCache> cache(KernelCacheOptions with = options()) const {
    return cache_over({{root(), true, false}}, std::move(with));
  }
  /// Compiles `spec` into a folder with a compiler of this version.
  static void precompile(const fs::path& folder, int nvrtc_major,
                         const KernelSpec& spec = fake_spec()) {
    const FakeNvrtc nvrtc(nvrtc_major, 0, 7);
    const BuildReport report = cache_over({{folder, true, false}})->build_artifact(spec);
    ASSERT_TRUE(report.published) << report.problem;
  }

  TempDir folder_;
  LogCapture log_;
  FakeDriver driver_{2};
};

TEST_F(KernelCacheTest, CompilesOnceThenAnswersFromMemory) {
  const FakeNvrtc nvrtc;
  const auto kernels = cache();
  const LoadedKernel& kernel = kernels->get(fake_spec(), nullptr);
  EXPECT_EQ(kernel.entry(1).name, "kernel_d128_1");
  EXPECT_EQ(driver_.smem_limit("kernel_d128_1", 0), 2000);
  EXPECT_EQ(&kernels->get(fake_spec(), nullptr), &kernel);
  EXPECT_NE(&kernels->get(fake_spec(64), nullptr), &kernel);
  const Stats stats = kernels->stats();
  EXPECT_EQ(stats.compiles, 2u);
  EXPECT_EQ(stats.memory_hits, 1u);
  EXPECT_EQ(stats.disk_hits + stats.rejected, 0u);
  EXPECT_GT(stats.compile_ms, 0);
  EXPECT_GT(stats.load_ms, 0);
  EXPECT_EQ(log_.text(), "");
}

TEST_F(KernelCacheTest, TheNextProcessNeedsNoCompiler) {
  precompile(root(), 13);
  int asked = 0;
  KernelCache kernels(CubinStore({{root(), true, false}}), std::make_unique<NoCompiler>(asked),
                      options());
  EXPECT_EQ(kernels.get(fake_spec(), nullptr).entries().size(), 2u);
  EXPECT_EQ(kernels.prepare(fake_spec()).origin, "memory");
  EXPECT_EQ(asked, 0);
  EXPECT_EQ(kernels.stats().disk_hits, 1u);
  EXPECT_EQ(kernels.stats().compiles, 0u);
}

TEST_F(KernelCacheTest, PrepareTellsWhereAKernelCameFrom) {
  const FakeNvrtc nvrtc;
  const auto kernels = cache();
  const PreparedKernel first = kernels->prepare(fake_spec());
  EXPECT_EQ(first.spec, to_string(fake_spec()));
  EXPECT_EQ(first.origin, "compiled");
  EXPECT_GT(first.ms, 0);
  EXPECT_EQ(kernels->prepare(fake_spec()).origin, "memory");
  EXPECT_EQ(cache()->prepare(fake_spec()).origin, "disk");
}

TEST_F(KernelCacheTest, SixteenThreadsShareOneCompile) {
  constexpr int kThreads = 16;
  FakeNvrtc nvrtc;
  const auto kernels = cache();
  std::atomic<int> arrived{0};
  nvrtc.on_compile = [&] {  // until everyone is on the way to the same miss
    while (arrived < kThreads) std::this_thread::yield();
  };
  std::vector<const LoadedKernel*> seen(kThreads);
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] {
      driver_.make_current(driver_.context(i % 2));
      ++arrived;
      seen[static_cast<std::size_t>(i)] = &kernels->get(fake_spec(), nullptr);
      EXPECT_TRUE(seen[static_cast<std::size_t>(i)]->ready_on(i % 2));
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_THAT(seen, Each(seen[0]));
  EXPECT_EQ(nvrtc.compiles(), 1);
  EXPECT_EQ(driver_.loads(), 1);
  EXPECT_EQ(kernels->stats().memory_hits, kThreads - 1u);
}

TEST_F(KernelCacheTest, SixteenThreadsShareOneFailure) {
  constexpr int kThreads = 16;
  FakeNvrtc nvrtc;
  nvrtc.fail_log = "x.cu(1): error: no";
  const auto kernels = cache();
  std::atomic<int> arrived{0}, failed{0};
  nvrtc.on_compile = [&] {
    while (arrived < kThreads) std::this_thread::yield();
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&] {
      driver_.make_current(driver_.context(0));
      ++arrived;
      const Error error = error_of([&] { kernels->get(fake_spec(), nullptr); });
      if (std::string(error.what()).find(nvrtc.fail_log) != std::string::npos) ++failed;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(failed, kThreads);
  EXPECT_EQ(nvrtc.compiles(), 1);
}

TEST_F(KernelCacheTest, FailuresAreRememberedUntilReset) {
  FakeNvrtc nvrtc;
  nvrtc.fail_log = "x.cu(1): error: no";
  const auto kernels = cache();
  const Error first = error_of([&] { kernels->get(fake_spec(), nullptr); });
  const Error second = error_of([&] { kernels->prepare(fake_spec()); });
  EXPECT_EQ(first.code(), ErrorCode::kCompileFailed);
  EXPECT_THAT(first.what(), HasSubstr(nvrtc.fail_log));
  EXPECT_STREQ(first.what(), second.what());
  EXPECT_EQ(nvrtc.compiles(), 1);
  nvrtc.fail_log.clear();
  EXPECT_THROW(kernels->get(fake_spec(), nullptr), Error);
  const LoadedKernel& other = kernels->get(fake_spec(64), nullptr);
  kernels->reset();
  EXPECT_NO_THROW(kernels->get(fake_spec(), nullptr));
  EXPECT_EQ(&kernels->get(fake_spec(64), nullptr), &other) << "loaded ones stay";
}

TEST_F(KernelCacheTest, TroubleOfTheMomentIsNotRemembered) {
  const FakeNvrtc nvrtc;
  const auto kernels = cache();
  driver_.on_load = [](std::string_view) { return CUDA_ERROR_OUT_OF_MEMORY; };
  EXPECT_EQ(error_of([&] { kernels->get(fake_spec(), nullptr); }).code(), ErrorCode::kCudaError);
  driver_.on_load = nullptr;
  EXPECT_NO_THROW(kernels->get(fake_spec(), nullptr));
  EXPECT_EQ(nvrtc.compiles(), 1) << "what was compiled was kept";
}

TEST_F(KernelCacheTest, WithoutAContextNothingIsLoaded) {
  const FakeNvrtc nvrtc;
  const auto kernels = cache();
  driver_.make_current(nullptr);
  const Error error = error_of([&] { kernels->get(fake_spec(), nullptr); });
  EXPECT_THAT(error.what(), HasSubstr("no CUDA context is current"));
  EXPECT_EQ(nvrtc.compiles(), 0);
  driver_.make_current(driver_.context(0));
  EXPECT_NO_THROW(kernels->get(fake_spec(), nullptr));
}

// --- policy

TEST_F(KernelCacheTest, JitOffExplainsAMiss) {
  const FakeNvrtc nvrtc;
  const auto kernels = cache_over({{folder_ / "pack", false, false}, {root(), true, false}},
                                  options(JitPolicy::kOff));
  const Error error = error_of([&] { kernels->get(fake_spec(), nullptr); });
  EXPECT_EQ(error.code(), ErrorCode::kNotFound);
  EXPECT_THAT(error.what(),
              AllOf(HasSubstr(to_string(fake_spec())), HasSubstr((folder_ / "pack").string()),
                    HasSubstr(root().string()), HasSubstr("TREEATTN_JIT=off")));
  EXPECT_THAT(error.hint(), HasSubstr(precompile_command(fake_spec())));
  EXPECT_THAT(precompile_command(fake_spec()), HasSubstr(to_string(fake_spec())));
  EXPECT_EQ(nvrtc.compiles(), 0);
  precompile(root(), 13);
  EXPECT_THROW(kernels->get(fake_spec(), nullptr), Error) << "remembered";
  kernels->reset();
  EXPECT_NO_THROW(kernels->get(fake_spec(), nullptr));
}

TEST_F(KernelCacheTest, AMissingCompilerExplainsAMiss) {
  int asked = 0;
  KernelCache kernels(CubinStore({{root(), true, false}}), std::make_unique<NoCompiler>(asked),
                      options());
  const Error error = error_of([&] { kernels.get(fake_spec(), nullptr); });
  EXPECT_EQ(error.code(), ErrorCode::kNotFound);
  EXPECT_THAT(error.what(), AllOf(HasSubstr("libnvrtc.so.13: not here"), HasSubstr(root().string()),
                                  HasSubstr("treeattn precompile")));
}

TEST_F(KernelCacheTest, JitForceCompilesWhatIsCached) {
  precompile(root(), 13);
  const FakeNvrtc nvrtc;
  const auto kernels = cache(options(JitPolicy::kForce));
  EXPECT_EQ(kernels->prepare(fake_spec()).origin, "compiled");
  EXPECT_EQ(nvrtc.compiles(), 1);
  EXPECT_EQ(kernels->prepare(fake_spec()).origin, "memory");
}

TEST_F(KernelCacheTest, NothingWritableStillServes) {
  test::write_text(root(), "a file where the folder should be");
  const FakeNvrtc nvrtc;
  EXPECT_NO_THROW(cache()->get(fake_spec(), nullptr));
  EXPECT_NO_THROW(cache_over({})->get(fake_spec(), nullptr));
  EXPECT_EQ(nvrtc.compiles(), 2);
}

// --- code the driver refuses

TEST_F(KernelCacheTest, ARefusedPackFallsThroughToTheCompiler) {
  const fs::path pack = folder_ / "pack";
  precompile(pack, 12);
  std::string first_image;
  driver_.on_load = [&](std::string_view image) {
    if (first_image.empty()) first_image = image;
    return image == first_image ? CUDA_ERROR_INVALID_IMAGE : CUDA_SUCCESS;
  };
  const FakeNvrtc nvrtc;
  const auto kernels = cache_over({{pack, false, false}, {root(), true, false}});
  EXPECT_EQ(kernels->prepare(fake_spec()).origin, "compiled");
  EXPECT_EQ(kernels->stats().rejected, 1u);
  EXPECT_EQ(log_.count("CUDA_ERROR_INVALID_IMAGE"), 1u);
  EXPECT_THAT(files_below(pack), SizeIs(2)) << "the pack is as it was: an entry and the tag";
}

TEST_F(KernelCacheTest, EachNodeFindsTheCodeOfItsOwnToolchain) {
  precompile(root(), 13);
  precompile(root(), 12);
  EXPECT_THAT(files_below(root()), SizeIs(3)) << "neither replaced the other";
  int asked = 0;
  const auto load_with = [&](int cuda_version) {
    driver_.cuda_version = cuda_version;
    std::string loaded;
    driver_.on_load = [&](std::string_view image) {
      loaded += image;
      return CUDA_SUCCESS;
    };
    KernelCache kernels(CubinStore({{root(), true, false}}), std::make_unique<NoCompiler>(asked),
                        options());
    kernels.get(fake_spec(), nullptr);
    driver_.on_load = nullptr;
    return loaded;
  };
  const std::string on_12 = load_with(12'020);
  const std::string on_13 = load_with(13'000);
  EXPECT_NE(on_12, on_13);
  EXPECT_EQ(load_with(12'080), on_12);
  EXPECT_EQ(load_with(14'000), on_13) << "the newest there is";
}

TEST_F(KernelCacheTest, OlderCodeIsTriedWhenNewerIsRefused) {
  precompile(root(), 13);
  precompile(root(), 12);
  int loads = 0;
  driver_.on_load = [&](std::string_view) {
    return ++loads == 1 ? CUDA_ERROR_UNSUPPORTED_PTX_VERSION : CUDA_SUCCESS;
  };
  int asked = 0;
  KernelCache kernels(CubinStore({{root(), true, false}}), std::make_unique<NoCompiler>(asked),
                      options());
  EXPECT_NO_THROW(kernels.get(fake_spec(), nullptr));
  EXPECT_EQ(loads, 2);
  EXPECT_EQ(kernels.stats().rejected, 1u);
}

TEST_F(KernelCacheTest, ADriverOlderThanTheCompilerIsExplained) {
  driver_.cuda_version = 12'040;
  driver_.on_load = [](std::string_view) { return CUDA_ERROR_INVALID_IMAGE; };
  const FakeNvrtc nvrtc(13, 0, 88);
  const Error error = error_of([&] { cache()->get(fake_spec(), nullptr); });
  EXPECT_EQ(error.code(), ErrorCode::kUnsupported);
  EXPECT_THAT(error.what(), AllOf(HasSubstr("compiled with NVRTC 13.0.88"), HasSubstr("CUDA 12"),
                                  HasSubstr("CUDA_ERROR_INVALID_IMAGE")));
  EXPECT_EQ(driver_.live_libraries(), 0);
}

TEST_F(KernelCacheTest, ADamagedEntryCountsAsRejected) {
  precompile(root(), 13);
  for (const fs::path& file : files_below(root())) {
    if (file.extension() == ".cubin") fs::resize_file(file, fs::file_size(file) - 1);
  }
  const FakeNvrtc nvrtc;
  const auto kernels = cache();
  EXPECT_EQ(kernels->prepare(fake_spec()).origin, "compiled");
  EXPECT_EQ(kernels->stats().rejected, 1u);
  EXPECT_EQ(cache()->prepare(fake_spec()).origin, "disk") << "it was replaced";
}

// --- devices

TEST_F(KernelCacheTest, FurtherDevicesShareTheLoadedCode) {
  const FakeNvrtc nvrtc;
  const auto kernels = cache();
  const LoadedKernel& kernel = kernels->get(fake_spec(), nullptr);
  EXPECT_EQ(driver_.smem_limit("kernel_d128_0", 1), -1);
  driver_.make_current(driver_.context(1));
  EXPECT_EQ(&kernels->get(fake_spec(), nullptr), &kernel);
  EXPECT_EQ(driver_.smem_limit("kernel_d128_0", 1), 1000);
  const int calls = driver_.attribute_calls();
  kernels->get(fake_spec(), nullptr);
  EXPECT_EQ(driver_.attribute_calls(), calls) << "once per device";
  EXPECT_EQ(driver_.loads(), 1);
}

TEST_F(KernelCacheTest, ADeviceThatIsTooSmallIsToldSo) {
  driver_.devices[1].smem_optin_bytes = 500;
  const FakeNvrtc nvrtc;
  const auto kernels = cache();
  kernels->get(fake_spec(), nullptr);
  driver_.make_current(driver_.context(1));
  const Error error = error_of([&] { kernels->get(fake_spec(), nullptr); });
  EXPECT_EQ(error.code(), ErrorCode::kUnsupported);
  EXPECT_THAT(error.what(), HasSubstr("offers 500"));
  driver_.make_current(driver_.context(0));
  EXPECT_NO_THROW(kernels->get(fake_spec(), nullptr));
}

TEST_F(KernelCacheTest, PrepareLoadsIntoEveryContextItIsCalledIn) {
  const FakeNvrtc nvrtc;
  const auto kernels = cache();
  kernels->prepare(fake_spec());
  driver_.make_current(driver_.context(1));
  kernels->prepare(fake_spec());
  EXPECT_GE(driver_.functions_loaded(driver_.context(0)), 2);
  EXPECT_GE(driver_.functions_loaded(driver_.context(1)), 2);
}

TEST_F(KernelCacheTest, UnloadsWithTheCache) {
  const FakeNvrtc nvrtc;
  cache()->get(fake_spec(), nullptr);
  EXPECT_EQ(driver_.loads(), 1);
  EXPECT_EQ(driver_.unloads(), 1);
}

// --- capture

class CaptureTest : public KernelCacheTest {
 protected:
  CaptureTest() { driver_.set_capturing(stream_, true); }
  static KernelCacheOptions with(CaptureMiss miss) {
    KernelCacheOptions chosen = options();
    chosen.capture_miss = miss;
    return chosen;
  }

  int tag_ = 0;
  CUstream stream_ = reinterpret_cast<CUstream>(&tag_);
  FakeNvrtc nvrtc_;
};

TEST_F(CaptureTest, AMissLoadsWithAWarning) {
  const auto kernels = cache(with(CaptureMiss::kLoad));
  kernels->get(fake_spec(80), stream_);
  kernels->get(fake_spec(80), stream_);
  EXPECT_FALSE(driver_.capture_broken());
  EXPECT_EQ(log_.count("was not loaded before a stream was captured"), 1u);
  EXPECT_THAT(log_.text(), AllOf(HasSubstr(to_string(fake_spec(80))), HasSubstr("prepare()")));
}

TEST_F(CaptureTest, AMissOfTheDefaultStreamIsOneTooWhileAnotherIsCaptured) {
  cache(with(CaptureMiss::kLoad))->get(fake_spec(88), nullptr);
  EXPECT_FALSE(driver_.capture_broken());
  EXPECT_EQ(log_.count("was not loaded before a stream was captured"), 1u);
}

TEST_F(CaptureTest, AStreamThatIsNotCapturedLoadsInSilence) {
  int other = 0;
  const auto kernels = cache(with(CaptureMiss::kError));
  kernels->get(fake_spec(), reinterpret_cast<CUstream>(&other));
  EXPECT_FALSE(driver_.capture_broken());
  EXPECT_EQ(log_.text(), "");
}

TEST_F(CaptureTest, StrictPolicyFailsBeforeAnythingIsTouched) {
  const auto kernels = cache(with(CaptureMiss::kError));
  const Error error = error_of([&] { kernels->get(fake_spec(), stream_); });
  EXPECT_EQ(error.code(), ErrorCode::kNotFound);
  EXPECT_THAT(error.what(), HasSubstr("TREEATTN_CAPTURE_MISS=error"));
  EXPECT_THAT(error.hint(), HasSubstr("prepare()"));
  EXPECT_EQ(driver_.loads() + nvrtc_.compiles(), 0);
  EXPECT_FALSE(driver_.capture_broken());

  driver_.set_capturing(stream_, false);
  kernels->prepare(fake_spec());
  driver_.set_capturing(stream_, true);
  EXPECT_NO_THROW(kernels->get(fake_spec(), stream_));
  EXPECT_EQ(kernels->stats().memory_hits, 1u);
}

TEST_F(CaptureTest, PrepareOnAnotherThreadDoesNotBreakIt) {
  const auto kernels = cache(with(CaptureMiss::kError));
  std::thread([&] {
    driver_.make_current(driver_.context(0));
    kernels->prepare(fake_spec());
  }).join();
  EXPECT_FALSE(driver_.capture_broken());
}

// --- explain and precompile

TEST_F(KernelCacheTest, ExplainsWithoutDoingAnything) {
  const FakeNvrtc nvrtc;
  const auto kernels = cache_over({{folder_ / "pack", false, false}, {root(), true, false}});
  const KernelExplanation miss = kernels->explain(fake_spec());
  EXPECT_EQ(miss.text, to_string(fake_spec()));
  EXPECT_EQ(miss.key, artifact_key(fake_source(fake_spec(), 2), compile_options(fake_spec())));
  EXPECT_THAT(miss.entries, SizeIs(2));
  EXPECT_THAT(miss.probes, Not(IsEmpty()));
  EXPECT_FALSE(miss.artifact);
  EXPECT_TRUE(miss.compiler.available);
  EXPECT_EQ(miss.remedy, precompile_command(fake_spec()));
  precompile(root(), 13);
  const KernelExplanation hit = cache()->explain(fake_spec());
  ASSERT_TRUE(hit.artifact);
  EXPECT_EQ(hit.artifact->nvrtc, "13.0.7");
  EXPECT_EQ(hit.probes.back().outcome, "hit");
  EXPECT_EQ(driver_.loads() + nvrtc.compiles(), 0);
}

TEST_F(KernelCacheTest, BuildsWithoutTheDriver) {
  driver_.on_load = [](std::string_view) {
    ADD_FAILURE() << "loaded";
    return CUDA_ERROR_INVALID_IMAGE;
  };
  driver_.make_current(nullptr);
  const FakeNvrtc nvrtc;
  const auto kernels = cache();
  const BuildReport built = kernels->build_artifact(fake_spec());
  EXPECT_FALSE(built.kept);
  EXPECT_TRUE(built.published) << built.problem;
  EXPECT_THAT(built.log, HasSubstr("Compiling entry function"));
  const BuildReport kept = kernels->build_artifact(fake_spec());
  EXPECT_TRUE(kept.kept);
  EXPECT_EQ(kept.artifact, built.artifact);
  EXPECT_EQ(nvrtc.compiles(), 1);
  EXPECT_FALSE(kernels->build_artifact(fake_spec(), true).kept);
  EXPECT_EQ(nvrtc.compiles(), 2);
}

TEST_F(KernelCacheTest, ABuildKeepsOnlyItsOwnToolchainsEntries) {
  precompile(root(), 12);
  const FakeNvrtc nvrtc(13);
  EXPECT_FALSE(cache()->build_artifact(fake_spec()).kept);
  EXPECT_THAT(files_below(root()), SizeIs(3));
  int asked = 0;
  KernelCache without(CubinStore({{root(), true, false}}), std::make_unique<NoCompiler>(asked),
                      options());
  EXPECT_TRUE(without.build_artifact(fake_spec()).kept) << "any serves where none can be made";
}

TEST_F(KernelCacheTest, ABuildThatCannotBeKeptSaysWhy) {
  const FakeNvrtc nvrtc;
  const BuildReport report = cache_over({})->build_artifact(fake_spec());
  EXPECT_FALSE(report.published);
  EXPECT_THAT(report.problem, HasSubstr("no writable"));
}

// --- several processes

TEST_F(KernelCacheTest, ALockThatIsNeverReleasedDelaysButDoesNotBlock) {
  const ArtifactKey key = artifact_key(fake_source(fake_spec(), 2), compile_options(fake_spec()));
  const FakeNvrtc nvrtc;
  const ArtifactSource other(CubinStore({{root(), true, false}}),
                             std::make_unique<NvrtcCompiler>(""), options().source);
  const AdvisoryLock held = AdvisoryLock::acquire(other.lock_name(key), 0);
  if (!held.held()) GTEST_SKIP() << "no folder for locks here";
  KernelCacheOptions impatient = options();
  impatient.source.lock_timeout_ms = 20;
  EXPECT_EQ(cache(std::move(impatient))->prepare(fake_spec()).origin, "compiled");
}

}  // namespace
}  // namespace treeattn
