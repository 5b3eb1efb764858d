// The kernel cache between real processes.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <deque>
#include <filesystem>
#include <memory>
#include <string>

#include "runtime/support/file_descriptor.h"
#include "runtime/support/file_io.h"
#include "tests/support/child_process.h"
#include "tests/support/fake_driver.h"
#include "tests/support/fake_nvrtc.h"
#include "tests/support/kernel_cache_fixture.h"
#include "tests/support/temp_dir.h"

namespace treeattn {
namespace {

namespace fs = std::filesystem;
using test::cache_over;
using test::fake_spec;
using test::FakeDriver;
using test::FakeNvrtc;
using test::files_below;
using test::TempDir;
using testing::Not;

/// One rank on a cold store; appends a byte to `tally` for each of its compiles.
int work_of_a_rank(const fs::path& root, const fs::path& tally) {
  const FakeDriver driver;
  FakeNvrtc nvrtc;
  nvrtc.on_compile = [&] {
    const FileDescriptor file(open(tally.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0600));
    if (write(file.get(), "x", 1) != 1) _exit(3);
  };
  const auto kernels = cache_over({{root, true, false}});
  for (const int head_dim : {64, 128}) {
    if (kernels->get(fake_spec(head_dim), nullptr).entries().size() != 2) return 1;
  }
  const Stats stats = kernels->stats();
  return stats.disk_hits + stats.compiles == 2 && stats.rejected == 0 ? 0 : 2;
}

TEST(KernelCacheProcesses, SixteenOnAColdStoreAllSucceedWithFewCompiles) {
  const TempDir folder;
  const fs::path root = folder / "cache";
  const fs::path tally = folder / "tally";
  test::ProcessGate gate;
  std::deque<test::ChildProcess> children;
  for (int rank = 0; rank < 16; ++rank) {
    children.emplace_back([&] {
      gate.wait();
      return work_of_a_rank(root, tally);
    });
  }
  gate.open();
  for (test::ChildProcess& child : children) EXPECT_EQ(child.wait(), 0);
  const std::size_t compiles = test::read_text(tally).size();
  EXPECT_GE(compiles, 2u);
  EXPECT_LE(compiles, 4u) << "one or two a kernel";
  std::size_t entries = 0;
  for (const fs::path& file : files_below(root)) {
    EXPECT_THAT(file.filename().string(), Not(testing::StartsWith(std::string(kTempPrefix))));
    if (file.extension() == ".cubin") ++entries;
  }
  EXPECT_EQ(entries, 2u);
}

// Those of one folder waited for those of the other, found nothing and compiled all at once.
TEST(KernelCacheProcesses, RanksOfAnotherFolderAreNotWaitedFor) {
  const TempDir folder;
  test::ProcessGate gate;
  std::deque<test::ChildProcess> children;
  for (int rank = 0; rank < 32; ++rank) {
    children.emplace_back([&folder, &gate, name = rank % 2 == 0 ? "a" : "b"] {
      gate.wait();
      return work_of_a_rank(folder / name, folder / (std::string(name) + ".tally"));
    });
  }
  gate.open();
  for (test::ChildProcess& child : children) EXPECT_EQ(child.wait(), 0);
  for (const char* tally : {"a.tally", "b.tally"}) {
    EXPECT_LE(test::read_text(folder / tally).size(), 4u) << "one or two a kernel";
  }
}

/// A rank that builds two kernels ahead of time.
int build_of_a_rank(const fs::path& root, const fs::path& tally) {
  FakeNvrtc nvrtc;
  nvrtc.on_compile = [&] {
    const FileDescriptor file(open(tally.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0600));
    if (write(file.get(), "x", 1) != 1) _exit(3);
  };
  ArtifactSource source(CubinStore({{root, true, false}}), std::make_unique<NvrtcCompiler>(""),
                        test::options().source);
  for (const int head_dim : {64, 128}) {
    const BuildReport report = source.build(fake_spec(head_dim), false);
    if (report.kept == report.published) return 1;
  }
  return 0;
}

TEST(KernelCacheProcesses, SixteenThatPrecompileShareTheWork) {
  const TempDir folder;
  const fs::path tally = folder / "tally";
  test::ProcessGate gate;
  std::deque<test::ChildProcess> children;
  for (int rank = 0; rank < 16; ++rank) {
    children.emplace_back([&] {
      gate.wait();
      return build_of_a_rank(folder / "cache", tally);
    });
  }
  gate.open();
  for (test::ChildProcess& child : children) EXPECT_EQ(child.wait(), 0);
  const std::size_t compiles = test::read_text(tally).size();
  EXPECT_GE(compiles, 2u);
  EXPECT_LE(compiles, 4u) << "one or two a kernel";
}

}  // namespace
}  // namespace treeattn
