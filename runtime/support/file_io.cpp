#include "runtime/support/file_io.h"

#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cctype>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <memory>
#include <system_error>
#include <utility>

#include "runtime/support/file_descriptor.h"

namespace treeattn {

namespace fs = std::filesystem;

namespace {

std::atomic<BeforeRenameHook> before_rename_hook{nullptr};

IoStatus failure(int error, const char* step, const fs::path& path) {
  return {error,
          std::string(step) + " " + path.string() + ": " + std::generic_category().message(error)};
}

// A write above RLIMIT_FSIZE raises SIGXFSZ, which ends a process that only wanted to cache
// something. Blocked in this thread, the write fails with EFBIG; the signal left pending is then
// taken away.
class BlockFileSizeSignal {
 public:
  BlockFileSizeSignal() {
    sigemptyset(&signals_);
    sigaddset(&signals_, SIGXFSZ);
    sigset_t pending;
    sigemptyset(&pending);
    sigpending(&pending);
    // One that was pending before is not ours to take.
    active_ =
        sigismember(&pending, SIGXFSZ) == 0 && pthread_sigmask(SIG_BLOCK, &signals_, &before_) == 0;
  }
  ~BlockFileSizeSignal() {
    if (!active_) return;
    const timespec no_wait{};
    while (sigtimedwait(&signals_, nullptr, &no_wait) < 0 && errno == EINTR) {
    }
    pthread_sigmask(SIG_SETMASK, &before_, nullptr);
  }
  BlockFileSizeSignal(const BlockFileSizeSignal&) = delete;
  BlockFileSizeSignal& operator=(const BlockFileSizeSignal&) = delete;

 private:
  sigset_t signals_;
  sigset_t before_;
  bool active_ = false;
};

std::string host_name() {
  std::array<char, 256> buffer{};
  if (gethostname(buffer.data(), buffer.size() - 1) != 0) return "host";
  std::string name(buffer.data());
  for (char& c : name) {
    if (std::isalnum(static_cast<unsigned char>(c)) == 0) c = '-';
  }
  return name.substr(0, 32);
}

// Host and pid tell a person whose file it is; the random part makes it unique, since containers
// share host names and pids.
std::string temp_name() {
  std::uint64_t random = 0;
  if (getrandom(&random, sizeof random, GRND_NONBLOCK) != sizeof random) {
    static std::atomic<std::uint64_t> counter{0};
    timespec now{};
    clock_gettime(CLOCK_REALTIME, &now);
    random = (static_cast<std::uint64_t>(now.tv_nsec) << 32) + ++counter;
  }
  std::array<char, 17> hex{};
  std::snprintf(hex.data(), hex.size(), "%016llx", static_cast<unsigned long long>(random));
  return std::string(kTempPrefix) + host_name() + "-" + std::to_string(getpid()) + "-" + hex.data();
}

// Opens a new temporary file in `folder`; EEXIST means another draw.
FileDescriptor create_temp(const fs::path& folder, fs::path& temp) {
  for (int attempt = 0; attempt < 8; ++attempt) {
    temp = folder / temp_name();
    FileDescriptor fd(
        open(temp.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600));
    if (fd.valid() || errno != EEXIST) return fd;
  }
  return {};
}

bool write_all(int fd, std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t written = write(fd, bytes.data(), bytes.size());
    if (written < 0) {
      if (errno == EINTR) continue;
      return false;
    }
    if (written == 0) {
      errno = ENOSPC;
      return false;
    }
    bytes = bytes.subspan(static_cast<std::size_t>(written));
  }
  return true;
}

bool sync_file(int fd) {
  while (fsync(fd) != 0) {
    if (errno == EINTR) continue;
    // Some network and FUSE file systems have no fsync; the digest in every entry covers for it.
    return errno == EINVAL || errno == ENOSYS || errno == ENOTSUP;
  }
  return true;
}

void sync_folder(const fs::path& folder) {
  const FileDescriptor fd(open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (fd.valid()) fsync(fd.get());
}

// Writes, syncs and closes; the first step that fails, or ok.
IoStatus fill_temp(FileDescriptor& fd, const fs::path& temp, std::span<const std::byte> bytes,
                   unsigned mode) {
  {
    const BlockFileSizeSignal blocked;
    if (!write_all(fd.get(), bytes)) return failure(errno, "cannot write", temp);
  }
  // Beyond the umask; file systems without modes refuse, which is no loss.
  if (fchmod(fd.get(), mode) != 0 && errno != EPERM && errno != ENOSYS && errno != ENOTSUP) {
    return failure(errno, "cannot set the mode of", temp);
  }
  if (!sync_file(fd.get())) return failure(errno, "cannot sync", temp);
  // Network file systems report a full disk here.
  if (fd.close() != 0) return failure(errno, "cannot close", temp);
  return {};
}

bool read_all(int fd, std::vector<std::byte>& bytes) {
  std::size_t size = 0;
  while (size < bytes.size()) {
    const ssize_t got = read(fd, bytes.data() + size, bytes.size() - size);
    if (got < 0) {
      if (errno == EINTR) continue;
      return false;
    }
    if (got == 0) break;
    size += static_cast<std::size_t>(got);
  }
  bytes.resize(size);
  return true;
}

FileContent read_once(const fs::path& path, std::uint64_t max_bytes) {
  // Non-blocking, so that a pipe put in the file's place cannot hang the reader.
  const FileDescriptor fd(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK));
  if (!fd.valid()) return {failure(errno, "cannot open", path), {}, 0, 0};
  struct stat info {};
  if (fstat(fd.get(), &info) != 0) return {failure(errno, "cannot stat", path), {}, 0, 0};
  if (S_ISDIR(info.st_mode)) return {failure(EISDIR, "cannot read", path), {}, 0, 0};
  if (!S_ISREG(info.st_mode)) {
    return {{EINVAL, "cannot read " + path.string() + ": not a regular file"}, {}, 0, 0};
  }
  if (static_cast<std::uint64_t>(info.st_size) > max_bytes) {
    return {failure(EFBIG, "cannot read", path), {}, 0, 0};
  }
  FileContent content;
  content.owner = info.st_uid;
  content.mode = info.st_mode & 07777;
  content.bytes.resize(static_cast<std::size_t>(info.st_size));
  if (!read_all(fd.get(), content.bytes)) return {failure(errno, "cannot read", path), {}, 0, 0};
  return content;
}

IoStatus make_folder(const fs::path& folder, unsigned mode) {
  if (mkdir(folder.c_str(), mode) != 0) {
    const int error = errno;
    struct stat info {};
    if (stat(folder.c_str(), &info) == 0 && S_ISDIR(info.st_mode)) return {};
    return failure(error, "cannot create folder", folder);
  }
  struct stat info {};
  if (stat(folder.c_str(), &info) == 0 && (info.st_mode & 0777) != mode) {
    // The set-group-id bit of a shared parent is kept.
    if (chmod(folder.c_str(), (info.st_mode & 07000) | mode) != 0) {
      return failure(errno, "cannot set the mode of", folder);
    }
  }
  return {};
}

std::string octal(mode_t mode) {
  std::array<char, 16> text{};
  std::snprintf(text.data(), text.size(), "%04o", static_cast<unsigned>(mode & 07777));
  return text.data();
}

bool ours(uid_t owner) {
  return owner == geteuid() || owner == 0;
}

std::string owner_text(uid_t owner) {
  return "belongs to uid " + std::to_string(owner) + ", not to uid " + std::to_string(geteuid());
}

}  // namespace

FileContent read_file(const fs::path& path, std::uint64_t max_bytes) {
  // A file replaced on an NFS server between open and read answers ESTALE once.
  for (int attempt = 0;; ++attempt) {
    FileContent content = read_once(path, max_bytes);
    if (content.status.error != ESTALE || attempt == 2) return content;
  }
}

std::optional<std::string> refuse_file(const FileContent& content) {
  if (!ours(content.owner)) return owner_text(content.owner);
  if ((content.mode & 0022) != 0) {
    return "can be written by others (mode " + octal(content.mode) + ")";
  }
  return std::nullopt;
}

IoStatus make_folders(const fs::path& folder, unsigned mode) {
  std::vector<fs::path> missing;
  for (fs::path path = folder; !path.empty(); path = path.parent_path()) {
    struct stat info {};
    if (stat(path.c_str(), &info) == 0) {
      if (!S_ISDIR(info.st_mode)) return failure(ENOTDIR, "cannot use as a folder", path);
      break;
    }
    if (errno != ENOENT) return failure(errno, "cannot look at", path);
    missing.push_back(path);
    if (path == path.parent_path()) break;
  }
  for (auto path = missing.rbegin(); path != missing.rend(); ++path) {
    if (IoStatus status = make_folder(*path, mode); !status) return status;
  }
  return {};
}

IoStatus write_file_atomically(const fs::path& path, std::span<const std::byte> bytes,
                               unsigned mode) {
  const fs::path folder = path.has_parent_path() ? path.parent_path() : fs::path(".");
  fs::path temp;
  FileDescriptor fd = create_temp(folder, temp);
  if (!fd.valid()) return failure(errno, "cannot create", temp);
  IoStatus status = fill_temp(fd, temp, bytes, mode);
  if (status) {
    if (const BeforeRenameHook hook = before_rename_hook) hook(temp.c_str());
    if (rename(temp.c_str(), path.c_str()) != 0) status = failure(errno, "cannot rename to", path);
  }
  if (!status) {
    unlink(temp.c_str());
    return status;
  }
  sync_folder(folder);
  return {};
}

std::uint64_t remove_stale_temp_files(const fs::path& folder, std::int64_t min_age_seconds) {
  const std::unique_ptr<DIR, int (*)(DIR*)> stream(opendir(folder.c_str()), closedir);
  if (!stream) return 0;
  std::uint64_t removed = 0;
  const std::int64_t newest = static_cast<std::int64_t>(std::time(nullptr)) - min_age_seconds;
  while (const dirent* entry = readdir(stream.get())) {
    if (!std::string_view(entry->d_name).starts_with(kTempPrefix)) continue;
    struct stat info {};
    const int at = dirfd(stream.get());
    if (fstatat(at, entry->d_name, &info, AT_SYMLINK_NOFOLLOW) != 0 || !S_ISREG(info.st_mode) ||
        info.st_mtime > newest) {
      continue;
    }
    if (unlinkat(at, entry->d_name, 0) == 0) ++removed;
  }
  return removed;
}

std::optional<std::string> refuse_folder(const fs::path& folder, Trust trust) {
  struct stat link {};
  struct stat info {};
  if (lstat(folder.c_str(), &link) != 0 || stat(folder.c_str(), &info) != 0) {
    return errno == ENOENT ? "does not exist"
                           : "cannot be looked at: " + std::generic_category().message(errno);
  }
  if (!S_ISDIR(info.st_mode)) return "is not a folder";
  if (trust == Trust::kNotByAnyone) {
    if ((info.st_mode & 0002) == 0) return std::nullopt;
    return "can be written by everyone (mode " + octal(info.st_mode) + "); chmod o-w it";
  }
  if (S_ISLNK(link.st_mode) && !ours(link.st_uid)) {
    return "is a symbolic link that " + owner_text(link.st_uid) +
           "; name a folder of your own instead";
  }
  if (!ours(info.st_uid)) return owner_text(info.st_uid) + "; name a folder of your own instead";
  if ((info.st_mode & 0022) != 0) {
    return "can be written by others (mode " + octal(info.st_mode) + "); chmod go-w it";
  }
  return std::nullopt;
}

void set_before_rename_hook(BeforeRenameHook hook) noexcept {
  before_rename_hook = hook;
}

}  // namespace treeattn
