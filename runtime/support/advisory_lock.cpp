#include "runtime/support/advisory_lock.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <string>
#include <thread>

#include "runtime/support/file_io.h"

namespace treeattn {

namespace fs = std::filesystem;

namespace {

using Clock = std::chrono::steady_clock;

// Polls, because a blocking flock has no deadline and an alarm belongs to the application.
bool lock_until(int fd, Clock::time_point deadline) {
  auto pause = std::chrono::milliseconds(1);
  while (flock(fd, LOCK_EX | LOCK_NB) != 0) {
    if (errno == EINTR) continue;
    if (errno != EWOULDBLOCK) return false;
    const auto now = Clock::now();
    if (now >= deadline) return false;
    std::this_thread::sleep_for(std::min<Clock::duration>(pause, deadline - now));
    pause = std::min(pause * 2, std::chrono::milliseconds(20));
  }
  return true;
}

// Node-local, so that neither a network file system's locks nor another node's processes matter.
fs::path lock_folder() {
  const std::string uid = std::to_string(geteuid());
  const fs::path runtime = "/run/user/" + uid;
  if (!refuse_folder(runtime, Trust::kPrivate)) return runtime / "treeattn";
  const fs::path base = "/tmp/treeattn-" + uid;
  if (!make_folders(base) || refuse_folder(base, Trust::kPrivate)) return {};
  return base / "locks";
}

}  // namespace

AdvisoryLock AdvisoryLock::acquire(std::string_view key_hex, int timeout_ms) noexcept {
  try {
    return acquire_in(lock_folder(), key_hex, timeout_ms);
  } catch (...) {
    return {};
  }
}

AdvisoryLock AdvisoryLock::acquire_in(const fs::path& folder, std::string_view key_hex,
                                      int timeout_ms) noexcept {
  try {
    const auto deadline = Clock::now() + std::chrono::milliseconds(timeout_ms);
    const bool plain_name = !key_hex.empty() && key_hex.find('/') == std::string_view::npos &&
                            !key_hex.starts_with('.');
    if (folder.empty() || !plain_name) return {};
    if (!make_folders(folder) || refuse_folder(folder, Trust::kPrivate)) return {};
    FileDescriptor fd(open((folder / key_hex).c_str(),
                           O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0600));
    if (!fd.valid() || !lock_until(fd.get(), deadline)) return {};
    return AdvisoryLock(std::move(fd));
  } catch (...) {
    return {};
  }
}

void AdvisoryLock::release() noexcept {
  if (!fd_.valid()) return;
  // Closing alone would leave the lock with a forked child that inherited the descriptor.
  flock(fd_.get(), LOCK_UN);
  fd_.close();
}

}  // namespace treeattn
