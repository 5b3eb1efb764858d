// The store between real processes: cold starts in a crowd, writers that die, disks that fill up.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <unistd.h>

#include <csignal>
#include <deque>
#include <string>
#include <vector>

#include "runtime/cache/cubin_store.h"
#include "runtime/support/file_io.h"
#include "tests/support/child_process.h"
#include "tests/support/fake_artifact.h"
#include "tests/support/log_capture.h"
#include "tests/support/temp_dir.h"

namespace treeattn {
namespace {

namespace fs = std::filesystem;
using test::ChildProcess;
using test::fake_artifact;
using test::files_below;
using test::ProcessGate;
using test::TempDir;
using testing::ElementsAre;

CubinStore store_at(const fs::path& root) {
  return CubinStore({{root, true, false}});
}

std::size_t temp_files_below(const fs::path& root) {
  std::size_t count = 0;
  for (const fs::path& file : files_below(root)) {
    if (file.filename().string().starts_with(kTempPrefix)) ++count;
  }
  return count;
}

Artifact large_artifact(std::uint32_t seed) {
  Artifact artifact = fake_artifact(seed);
  artifact.cubin = test::fake_cubin(seed, 400'000);
  return artifact;
}

// What each of 16 ranks does at once on a cold cache. Zero, or the step that failed.
int work_of_a_rank(const fs::path& root, std::uint32_t rank) {
  CubinStore store = store_at(root);
  const Artifact own = large_artifact(100 + rank);
  const Artifact common = large_artifact(1);
  std::string why;
  for (int round = 0; round < 5; ++round) {
    // Others are writing these very entries: absent or whole, never in between.
    for (const Artifact& artifact : {common, large_artifact(100 + (rank + 1) % 16)}) {
      const auto found = store.find(artifact.key, artifact.spec, 13);
      if (found && *found != artifact) return 1;
    }
    if (!store.publish(common, why) || !store.publish(own, why)) return 2;
    if (store.find(common.key, common.spec, 13) != common) return 3;
    if (store.find(own.key, own.spec, 13) != own) return 4;
  }
  const StoreCounters counters = store.counters();
  return counters.rejected == 0 && counters.publish_failures == 0 ? 0 : 5;
}

TEST(StoreRace, SixteenProcessesOnAColdStoreAllSucceed) {
  const TempDir folder;
  const fs::path root = folder / "home" / "cache";  // even its parent is made in the race
  ProcessGate gate;
  std::deque<ChildProcess> children;
  for (std::uint32_t rank = 0; rank < 16; ++rank) {
    children.emplace_back([&, rank] {
      gate.wait();
      return work_of_a_rank(root, rank);
    });
  }
  gate.open();
  for (ChildProcess& child : children) EXPECT_EQ(child.wait(), 0);
  EXPECT_EQ(temp_files_below(root), 0u);
  EXPECT_EQ(files_below(root).size(), 1u + 16u + 1u);  // the common one, one each, the tag
  for (const StoreEntry& entry : store_at(root).list()) EXPECT_EQ(entry.damage, "");
}

TEST(StoreRace, AWriterKilledBeforeItsRenameHarmsNobody) {
  const TempDir folder;
  const Artifact artifact = large_artifact(1);
  const fs::path root = folder / "cache";
  {  // so that the hook meets the entry and not the tag
    CubinStore store = store_at(root);
    std::string why;
    ASSERT_TRUE(store.publish(fake_artifact(2), why)) << why;
  }
  ChildProcess child([&] {
    set_before_rename_hook([](const char*) { kill(getpid(), SIGKILL); });
    CubinStore store = store_at(root);
    std::string why;
    store.publish(artifact, why);
    return 0;
  });
  EXPECT_EQ(child.wait(), -SIGKILL);
  ASSERT_EQ(temp_files_below(root), 1u);

  test::LogCapture log;
  CubinStore store = store_at(root);
  EXPECT_EQ(store.find(artifact.key, artifact.spec, 13), std::nullopt);
  EXPECT_EQ(store.list().size(), 1u);
  std::string why;
  EXPECT_TRUE(store.publish(artifact, why)) << why;
  EXPECT_EQ(store.find(artifact.key, artifact.spec, 13), artifact);
  EXPECT_EQ(temp_files_below(root), 1u);  // it might be of a writer that still lives

  for (const fs::path& file : files_below(root)) {
    if (file.filename().string().starts_with(kTempPrefix)) {
      fs::last_write_time(file, fs::file_time_type::clock::now() - std::chrono::hours(2));
    }
  }
  EXPECT_TRUE(store.publish(artifact, why)) << why;
  EXPECT_EQ(temp_files_below(root), 0u);
  EXPECT_EQ(log.text(), "");
}

TEST(StoreRace, AWriterKilledAnywhereLeavesAWholeEntryOrNone) {
  const TempDir folder;
  const fs::path root = folder / "cache";
  const Artifact artifact = large_artifact(1);
  for (int round = 0; round < 10; ++round) {
    ProcessGate started;
    ChildProcess child([&] {
      CubinStore store = store_at(root);
      std::string why;
      started.open();
      while (store.publish(artifact, why)) {
      }
      return 1;
    });
    started.wait();
    // However far the child came, the next process must not notice.
    for (int i = 0; i < 300 * round; ++i) sched_yield();
    child.send(SIGKILL);
    EXPECT_EQ(child.wait(), -SIGKILL);
    CubinStore store = store_at(root);
    const auto found = store.find(artifact.key, artifact.spec, 13);
    EXPECT_TRUE(!found || *found == artifact);
    EXPECT_EQ(store.counters().rejected, 0u);
    std::string why;
    EXPECT_TRUE(store.publish(artifact, why)) << why;
    EXPECT_EQ(store.find(artifact.key, artifact.spec, 13), artifact);
  }
}

// Zero if publishing fails as it should and leaves no trace; else the step.
int publish_must_fail(const fs::path& root, const std::string& reason) {
  set_log_level(LogLevel::kError);
  CubinStore store = store_at(root);
  const std::size_t files = files_below(root).size();
  const Artifact artifact = large_artifact(7);
  std::string why;
  if (store.publish(artifact, why)) return 1;
  if (why.find(reason) == std::string::npos) return 2;
  if (store.counters().publish_failures != 1) return 3;
  if (store.find(artifact.key, artifact.spec, 13)) return 4;
  if (store.counters().rejected != 0) return 5;
  return temp_files_below(root) == 0 && files_below(root).size() == files ? 0 : 6;
}

TEST(StoreRace, AFileSizeLimitFailsThePublishAndLeavesNothing) {
  for (const auto disposition : {SIG_IGN, SIG_DFL}) {
    const TempDir folder;
    const fs::path root = folder / "cache";
    std::string why;
    CubinStore store = store_at(root);
    ASSERT_TRUE(store.publish(fake_artifact(1), why)) << why;
    ChildProcess child([&] {
      signal(SIGXFSZ, disposition);
      const rlimit limit{100'000, 100'000};
      if (setrlimit(RLIMIT_FSIZE, &limit) != 0) return 10;
      return publish_must_fail(root, "File too large");
    });
    EXPECT_EQ(child.wait(), 0);
    const Artifact kept = fake_artifact(1);
    EXPECT_EQ(store.find(kept.key, kept.spec, 13), kept);
  }
}

TEST(StoreRace, AFolderWithoutWritePermissionStillServes) {
  const TempDir folder;
  ChildProcess child([&] {
    constexpr uid_t kSomeUser = 54321;  // root may write everywhere
    if (geteuid() == 0 && (chown(folder.path().c_str(), kSomeUser, kSomeUser) != 0 ||
                           setgid(kSomeUser) != 0 || setuid(kSomeUser) != 0)) {
      return 10;
    }
    const fs::path root = folder / "cache";
    const Artifact kept = fake_artifact(1);
    std::string why;
    if (!store_at(root).publish(kept, why)) return 11;
    for (const auto& entry : fs::recursive_directory_iterator(root)) {
      if (entry.is_directory()) fs::permissions(entry, fs::perms(0500));
    }
    fs::permissions(root, fs::perms(0500));
    if (store_at(root).find(kept.key, kept.spec, 13) != kept) return 12;
    const int code = publish_must_fail(root, "Permission denied");
    fs::permissions(root, fs::perms(0700));
    for (const auto& entry : fs::recursive_directory_iterator(root)) {
      if (entry.is_directory()) fs::permissions(entry, fs::perms(0700));
    }
    return code;
  });
  EXPECT_EQ(child.wait(), 0);
}

TEST(StoreRace, AFullDiskFailsThePublishAndLeavesNothing) {
  constexpr int kCannotMount = 77;
  const TempDir folder;
  ChildProcess child([&] {
    // Its own mount namespace: the file system goes with the child.
    if (unshare(CLONE_NEWNS) != 0) return kCannotMount;
    if (mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0) return kCannotMount;
    if (mount("none", folder.path().c_str(), "tmpfs", 0, "size=200k,mode=0700") != 0) {
      return kCannotMount;
    }
    CubinStore store = store_at(folder / "cache");
    std::string why;
    if (!store.publish(fake_artifact(1), why)) return 11;
    return publish_must_fail(folder / "cache", "No space left on device");
  });
  const int code = child.wait();
  if (code == kCannotMount) GTEST_SKIP() << "this process may not mount a small file system";
  EXPECT_EQ(code, 0);
}

TEST(StoreRace, AReadOnlyFileSystemStillServes) {
  constexpr int kCannotMount = 77;
  const TempDir folder;
  const Artifact artifact = fake_artifact(1);
  {
    CubinStore store = store_at(folder / "cache");
    std::string why;
    ASSERT_TRUE(store.publish(artifact, why)) << why;
  }
  ChildProcess child([&] {
    const char* path = folder.path().c_str();
    if (unshare(CLONE_NEWNS) != 0 ||
        mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0 ||
        mount(path, path, nullptr, MS_BIND, nullptr) != 0 ||
        mount("none", path, nullptr, MS_BIND | MS_REMOUNT | MS_RDONLY, nullptr) != 0) {
      return kCannotMount;
    }
    CubinStore store = store_at(folder / "cache");
    if (store.find(artifact.key, artifact.spec, 13) != artifact) return 12;
    return publish_must_fail(folder / "cache", "Read-only file system");
  });
  const int code = child.wait();
  if (code == kCannotMount) GTEST_SKIP() << "this process may not mount a folder read-only";
  EXPECT_EQ(code, 0);
}

}  // namespace
}  // namespace treeattn
