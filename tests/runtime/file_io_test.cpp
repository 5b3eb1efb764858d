#include "runtime/support/file_io.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <string>
#include <thread>
#include <vector>

#include "runtime/support/advisory_lock.h"
#include "tests/support/child_process.h"
#include "tests/support/temp_dir.h"

namespace treeattn {
namespace {

namespace fs = std::filesystem;
using test::ChildProcess;
using test::files_below;
using test::ProcessGate;
using test::read_text;
using test::TempDir;
using test::write_text;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::StartsWith;

std::span<const std::byte> bytes_of(const std::string& text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

unsigned mode_of(const fs::path& path) {
  struct stat info {};
  return stat(path.c_str(), &info) == 0 ? info.st_mode & 07777 : 0;
}

void make_old(const fs::path& path, std::int64_t seconds) {
  timespec now{};
  clock_gettime(CLOCK_REALTIME, &now);
  now.tv_sec -= seconds;
  const timespec times[] = {now, now};
  ASSERT_EQ(utimensat(AT_FDCWD, path.c_str(), times, 0), 0);
}

TEST(ReadFile, ReadsTheWholeFile) {
  const TempDir folder;
  std::string text(300'000, 'x');
  text += std::string("\0end", 4);
  write_text(folder / "file", text);
  const FileContent content = read_file(folder / "file");
  ASSERT_TRUE(content.ok()) << content.status.why;
  EXPECT_EQ(std::string(reinterpret_cast<const char*>(content.bytes.data()), content.bytes.size()),
            text);
}

TEST(ReadFile, RefusesWhatIsNotARegularFileOfASaneSize) {
  const TempDir folder;
  EXPECT_EQ(read_file(folder / "absent").status.error, ENOENT);
  EXPECT_THAT(read_file(folder / "absent").status.why, HasSubstr((folder / "absent").string()));
  EXPECT_EQ(read_file(folder.path()).status.error, EISDIR);
  write_text(folder / "file", "12345");
  EXPECT_EQ(read_file(folder / "file", 4).status.error, EFBIG);
  EXPECT_EQ(read_file(folder / "file" / "below").status.error, ENOTDIR);
  ASSERT_EQ(mkfifo((folder / "pipe").c_str(), 0600), 0);
  EXPECT_FALSE(read_file(folder / "pipe").ok());  // and does not wait for a writer
}

TEST(WriteFile, ReplacesInOneStepAndLeavesNothingElse) {
  const TempDir folder;
  const fs::path path = folder / "file";
  ASSERT_TRUE(write_file_atomically(path, bytes_of("first")));
  ASSERT_TRUE(write_file_atomically(path, bytes_of("second")));
  EXPECT_EQ(read_text(path), "second");
  EXPECT_EQ(mode_of(path), 0600u);
  EXPECT_THAT(files_below(folder.path()), ElementsAre(path));
}

TEST(WriteFile, SetsTheModeBeyondTheUmask) {
  const TempDir folder;
  const mode_t before = umask(0077);
  const IoStatus status = write_file_atomically(folder / "file", bytes_of("x"), 0644);
  umask(before);
  ASSERT_TRUE(status) << status.why;
  EXPECT_EQ(mode_of(folder / "file"), 0644u);
}

std::atomic<int> hook_calls{0};
std::string hook_temp;

TEST(WriteFile, TheTemporaryFileIsInTheSameFolderAndComplete) {
  const TempDir folder;
  hook_calls = 0;
  set_before_rename_hook([](const char* temp) {
    ++hook_calls;
    hook_temp = temp;
    EXPECT_EQ(read_text(temp), "content");
  });
  const IoStatus status = write_file_atomically(folder / "file", bytes_of("content"));
  set_before_rename_hook(nullptr);
  ASSERT_TRUE(status) << status.why;
  EXPECT_EQ(hook_calls, 1);
  EXPECT_EQ(fs::path(hook_temp).parent_path(), folder.path());
  EXPECT_THAT(fs::path(hook_temp).filename().string(), StartsWith(std::string(kTempPrefix)));
}

TEST(WriteFile, AFailedRenameLeavesNoTemporaryFile) {
  const TempDir folder;
  fs::create_directories(folder / "taken" / "inner");
  const IoStatus status = write_file_atomically(folder / "taken", bytes_of("x"));
  EXPECT_FALSE(status);
  EXPECT_THAT(status.why, HasSubstr("cannot rename to " + (folder / "taken").string()));
  EXPECT_THAT(files_below(folder.path()), IsEmpty());
}

TEST(WriteFile, AMissingFolderIsAnError) {
  const TempDir folder;
  const IoStatus status = write_file_atomically(folder / "absent" / "file", bytes_of("x"));
  EXPECT_EQ(status.error, ENOENT);
  write_text(folder / "plain", "");
  EXPECT_EQ(write_file_atomically(folder / "plain" / "file", bytes_of("x")).error, ENOTDIR);
}

// With the default disposition of SIGXFSZ, so that an unguarded write would end the child.
TEST(WriteFile, AFileSizeLimitIsAnErrorAndNotASignal) {
  const TempDir folder;
  const fs::path path = folder / "file";
  ASSERT_TRUE(write_file_atomically(path, bytes_of("old")));
  ChildProcess child([&] {
    signal(SIGXFSZ, SIG_DFL);
    const rlimit limit{4096, 4096};
    if (setrlimit(RLIMIT_FSIZE, &limit) != 0) return 2;
    const IoStatus status = write_file_atomically(path, bytes_of(std::string(100'000, 'n')));
    if (status.error != EFBIG) return 3;
    sigset_t pending;
    sigemptyset(&pending);
    sigpending(&pending);
    return sigismember(&pending, SIGXFSZ) == 0 ? 0 : 4;
  });
  EXPECT_EQ(child.wait(), 0);
  EXPECT_EQ(read_text(path), "old");
  EXPECT_THAT(files_below(folder.path()), ElementsAre(path));
}

TEST(WriteFile, ManyThreadsReplaceOneFile) {
  const TempDir folder;
  const fs::path path = folder / "file";
  ASSERT_TRUE(write_file_atomically(path, bytes_of(std::string(50'000, 'a'))));
  std::atomic<int> failed{0};
  std::vector<std::thread> threads;
  for (char letter = 'a'; letter < 'a' + 6; ++letter) {
    threads.emplace_back([&, letter] {
      const std::string text(50'000, letter);
      for (int i = 0; i < 20; ++i) {
        if (!write_file_atomically(path, bytes_of(text))) ++failed;
        const FileContent content = read_file(path);
        const bool whole =
            content.ok() && content.bytes.size() == text.size() &&
            std::count(content.bytes.begin(), content.bytes.end(), content.bytes.front()) == 50'000;
        if (!whole) ++failed;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(failed, 0);
  EXPECT_THAT(files_below(folder.path()), ElementsAre(path));
}

TEST(StaleTempFiles, OnlyOldTemporaryFilesGo) {
  const TempDir folder;
  const std::string prefix(kTempPrefix);
  for (const char* name : {"old", "young", "future"}) write_text(folder / (prefix + name), "x");
  write_text(folder / "old-entry.cubin", "x");
  fs::create_directory(folder / (prefix + "folder"));
  make_old(folder / (prefix + "old"), 2 * kStaleTempSeconds);
  make_old(folder / (prefix + "future"), -2 * kStaleTempSeconds);
  make_old(folder / "old-entry.cubin", 2 * kStaleTempSeconds);
  make_old(folder / (prefix + "folder"), 2 * kStaleTempSeconds);
  EXPECT_EQ(remove_stale_temp_files(folder.path()), 1u);
  EXPECT_FALSE(fs::exists(folder / (prefix + "old")));
  EXPECT_EQ(files_below(folder.path()).size(), 3u);
  EXPECT_EQ(remove_stale_temp_files(folder / "absent"), 0u);
}

TEST(MakeFolders, CreatesMissingOnesPrivatelyAndKeepsTheRest) {
  const TempDir folder;
  ASSERT_EQ(chmod(folder.path().c_str(), 0755), 0);
  const mode_t before = umask(0);
  ASSERT_TRUE(make_folders(folder / "a" / "b"));
  umask(0077);
  ASSERT_TRUE(make_folders(folder / "shared" / "b", 0755));
  umask(before);
  EXPECT_EQ(mode_of(folder.path()), 0755u);
  EXPECT_EQ(mode_of(folder / "a"), 0700u);
  EXPECT_EQ(mode_of(folder / "a" / "b"), 0700u);
  EXPECT_EQ(mode_of(folder / "shared"), 0755u);
  EXPECT_EQ(mode_of(folder / "shared" / "b"), 0755u);
  EXPECT_TRUE(make_folders(folder / "a" / "b"));
}

TEST(MakeFolders, SaysWhatStandsInTheWay) {
  const TempDir folder;
  write_text(folder / "file", "");
  EXPECT_EQ(make_folders(folder / "file").error, ENOTDIR);
  EXPECT_EQ(make_folders(folder / "file" / "below").error, ENOTDIR);
  fs::create_symlink(folder / "nowhere", folder / "dangling");
  EXPECT_FALSE(make_folders(folder / "dangling" / "below"));
}

TEST(RefuseFolder, WantsAPrivateFolder) {
  const TempDir folder;  // below a sticky folder that everyone can write to
  EXPECT_EQ(refuse_folder(folder.path(), Trust::kPrivate), std::nullopt);
  for (const unsigned mode : {0720u, 0702u, 0777u, 01777u}) {
    ASSERT_EQ(chmod(folder.path().c_str(), mode), 0);
    EXPECT_THAT(refuse_folder(folder.path(), Trust::kPrivate).value_or(""),
                HasSubstr("can be written by others"))
        << std::oct << mode;
  }
  ASSERT_EQ(chmod(folder.path().c_str(), 0755), 0);
  EXPECT_EQ(refuse_folder(folder.path(), Trust::kPrivate), std::nullopt);
  EXPECT_EQ(refuse_folder(folder / "absent", Trust::kPrivate), "does not exist");
  write_text(folder / "file", "");
  EXPECT_EQ(refuse_folder(folder / "file", Trust::kPrivate), "is not a folder");
}

TEST(RefuseFolder, APackMayBeAnybodysButNotEveryones) {
  const TempDir folder;
  ASSERT_EQ(chmod(folder.path().c_str(), 0775), 0);
  EXPECT_EQ(refuse_folder(folder.path(), Trust::kNotByAnyone), std::nullopt);
  ASSERT_EQ(chmod(folder.path().c_str(), 0757), 0);
  EXPECT_THAT(refuse_folder(folder.path(), Trust::kNotByAnyone).value_or(""),
              HasSubstr("can be written by everyone"));
}

TEST(RefuseFolder, AnotherUsersFolderOrLinkIsRefused) {
  const TempDir folder;
  constexpr uid_t kOther = 54321;
  fs::create_directory(folder / "theirs");
  fs::create_directory(folder / "ours");
  fs::create_symlink(folder / "ours", folder / "their-link");
  fs::create_symlink(folder / "theirs", folder / "our-link");
  if (lchown((folder / "theirs").c_str(), kOther, kOther) != 0 ||
      lchown((folder / "their-link").c_str(), kOther, kOther) != 0) {
    GTEST_SKIP() << "only root can give files away";
  }
  ASSERT_EQ(chmod((folder / "ours").c_str(), 0700), 0);
  EXPECT_THAT(refuse_folder(folder / "theirs", Trust::kPrivate).value_or(""),
              HasSubstr("belongs to uid 54321"));
  EXPECT_THAT(refuse_folder(folder / "our-link", Trust::kPrivate).value_or(""),
              HasSubstr("belongs to uid 54321"));
  EXPECT_THAT(refuse_folder(folder / "their-link", Trust::kPrivate).value_or(""),
              HasSubstr("is a symbolic link"));
  EXPECT_EQ(refuse_folder(folder / "ours", Trust::kPrivate), std::nullopt);
}

TEST(RefuseFile, WantsAFileThatOnlyWeCanWrite) {
  const TempDir folder;
  ASSERT_TRUE(write_file_atomically(folder / "file", bytes_of("x")));
  EXPECT_EQ(refuse_file(read_file(folder / "file")), std::nullopt);
  ASSERT_EQ(chmod((folder / "file").c_str(), 0620), 0);
  EXPECT_THAT(refuse_file(read_file(folder / "file")).value_or(""), HasSubstr("mode 0620"));
}

TEST(AdvisoryLock, ExcludesOthersOfTheSameKeyUntilReleased) {
  const TempDir folder;
  AdvisoryLock lock = AdvisoryLock::acquire_in(folder / "locks", "aa", 0);
  ASSERT_TRUE(lock.held());
  EXPECT_EQ(mode_of(folder / "locks"), 0700u);
  EXPECT_FALSE(AdvisoryLock::acquire_in(folder / "locks", "aa", 0).held());
  EXPECT_TRUE(AdvisoryLock::acquire_in(folder / "locks", "bb", 0).held());
  lock.release();
  EXPECT_FALSE(lock.held());
  EXPECT_TRUE(AdvisoryLock::acquire_in(folder / "locks", "aa", 0).held());
}

TEST(AdvisoryLock, AWaiterGetsItWhenTheHolderReleases) {
  const TempDir folder;
  AdvisoryLock lock = AdvisoryLock::acquire_in(folder.path(), "aa", 0);
  ASSERT_TRUE(lock.held());
  std::atomic<bool> got{false};
  std::thread waiter([&] { got = AdvisoryLock::acquire_in(folder.path(), "aa", 60'000).held(); });
  lock.release();
  waiter.join();
  EXPECT_TRUE(got);
}

TEST(AdvisoryLock, AStoppedHolderCostsTheDeadlineAndADeadOneNothing) {
  const TempDir folder;
  ProcessGate locked;
  ChildProcess holder([&] {
    const AdvisoryLock lock = AdvisoryLock::acquire_in(folder.path(), "aa", 0);
    if (lock.held()) locked.open();
    raise(SIGSTOP);
    return 0;
  });
  locked.wait();
  const auto begin = std::chrono::steady_clock::now();
  EXPECT_FALSE(AdvisoryLock::acquire_in(folder.path(), "aa", 100).held());
  const auto waited = std::chrono::steady_clock::now() - begin;
  EXPECT_GE(waited, std::chrono::milliseconds(100));
  EXPECT_LT(waited, std::chrono::seconds(30));
  holder.send(SIGKILL);
  EXPECT_EQ(holder.wait(), -SIGKILL);
  EXPECT_TRUE(AdvisoryLock::acquire_in(folder.path(), "aa", 0).held());
}

TEST(AdvisoryLock, AForkedChildDoesNotKeepAReleasedLock) {
  const TempDir folder;
  AdvisoryLock lock = AdvisoryLock::acquire_in(folder.path(), "aa", 0);
  ProcessGate done;
  ChildProcess child([&] {
    done.wait();
    return 0;
  });
  lock.release();
  EXPECT_TRUE(AdvisoryLock::acquire_in(folder.path(), "aa", 0).held());
  done.open();
  EXPECT_EQ(child.wait(), 0);
}

TEST(AdvisoryLock, TroubleMeansNotHeld) {
  const TempDir folder;
  write_text(folder / "file", "");
  EXPECT_FALSE(AdvisoryLock::acquire_in(folder / "file", "aa", 0).held());
  EXPECT_FALSE(AdvisoryLock::acquire_in({}, "aa", 0).held());
  EXPECT_FALSE(AdvisoryLock::acquire_in(folder.path(), "../aa", 0).held());
  EXPECT_FALSE(AdvisoryLock::acquire_in(folder.path(), "", 0).held());
  fs::create_symlink(folder / "elsewhere", folder / "link");
  EXPECT_FALSE(AdvisoryLock::acquire_in(folder.path(), "link", 0).held());
  EXPECT_FALSE(fs::exists(folder / "elsewhere"));
  ASSERT_EQ(chmod(folder.path().c_str(), 0777), 0);
  EXPECT_FALSE(AdvisoryLock::acquire_in(folder.path(), "aa", 0).held());
}

TEST(AdvisoryLock, TheDefaultFolderWorks) {
  const std::string key = "treeattn-file-io-test-" + std::to_string(getpid());
  const AdvisoryLock lock = AdvisoryLock::acquire(key, 0);
  ASSERT_TRUE(lock.held());
  EXPECT_FALSE(AdvisoryLock::acquire(key, 0).held());
  for (const std::string& folder : {"/run/user/" + std::to_string(geteuid()) + "/treeattn/",
                                    "/tmp/treeattn-" + std::to_string(geteuid()) + "/locks/"}) {
    std::error_code ignored;
    fs::remove(folder + key, ignored);
  }
}

}  // namespace
}  // namespace treeattn
