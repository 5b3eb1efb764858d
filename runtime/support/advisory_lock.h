// A lock that saves duplicate work between the processes of one node. It never guards correctness:
// on any trouble, or after the deadline, it is simply not held. Different objects exclude each
// other across threads as well as processes; one object belongs to one thread at a time.
#pragma once

#include <filesystem>
#include <string_view>

#include "runtime/support/file_descriptor.h"

namespace treeattn {

/// An exclusive flock on a node-local file. The kernel drops it when the holder dies; lock files
/// are never removed, since that would let two processes hold one key.
class AdvisoryLock {
 public:
  /// Locks `key_hex` in /run/user/<uid>/treeattn, else in /tmp/treeattn-<uid>/locks. Waits at most
  /// `timeout_ms` (0: one try).
  static AdvisoryLock acquire(std::string_view key_hex, int timeout_ms) noexcept;
  /// The same in a folder of the caller's choice, created 0700 if missing.
  static AdvisoryLock acquire_in(const std::filesystem::path& folder, std::string_view key_hex,
                                 int timeout_ms) noexcept;

  AdvisoryLock() = default;
  ~AdvisoryLock() { release(); }
  AdvisoryLock(AdvisoryLock&&) noexcept = default;
  AdvisoryLock& operator=(AdvisoryLock&&) noexcept = default;

  bool held() const { return fd_.valid(); }
  void release() noexcept;

 private:
  explicit AdvisoryLock(FileDescriptor fd) : fd_(std::move(fd)) {}

  FileDescriptor fd_;
};

}  // namespace treeattn
