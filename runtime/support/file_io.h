// Files and folders with errno as a value: whole-file reads, publishing by rename, a check for who
// can write to a folder. Nothing here throws on I/O trouble. Functions are thread-safe and safe
// between processes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace treeattn {

/// Outcome of a file operation: an errno and words that name the step and the path.
struct [[nodiscard]] IoStatus {
  int error = 0;
  std::string why;

  bool ok() const { return error == 0; }
  explicit operator bool() const { return ok(); }
};

struct [[nodiscard]] FileContent {
  IoStatus status;
  std::vector<std::byte> bytes;
  unsigned owner = 0;  ///< uid and permission bits of the very file that was read
  unsigned mode = 0;

  bool ok() const { return status.ok(); }
};

/// Reads a regular file whole; anything else (a folder, a pipe) and files above `max_bytes` are
/// refused.
FileContent read_file(const std::filesystem::path& path, std::uint64_t max_bytes = 1ull << 30);

/// Why a file that was read must not be trusted as ours: another user's, or writable by others.
std::optional<std::string> refuse_file(const FileContent& content);

/// Creates a folder and its missing parents, each with `mode` whatever the umask. Existing ones are
/// left as they are; losing a race to create one is success.
IoStatus make_folders(const std::filesystem::path& folder, unsigned mode = 0700);

/// Replaces `path` in one step: a unique temporary file in the same folder, fsync, rename,
/// best-effort fsync of the folder. On failure no temporary file is left and an existing `path` is
/// untouched.
IoStatus write_file_atomically(const std::filesystem::path& path, std::span<const std::byte> bytes,
                               unsigned mode = 0600);

/// Names of temporary files start so; they hold host, pid and a random number.
inline constexpr std::string_view kTempPrefix = ".tmp-";
inline constexpr std::int64_t kStaleTempSeconds = 3600;

/// Removes temporary files in `folder` (not below it) that were last written `min_age_seconds` ago
/// or earlier: what is left of writers that were killed. Returns how many.
std::uint64_t remove_stale_temp_files(const std::filesystem::path& folder,
                                      std::int64_t min_age_seconds = kStaleTempSeconds);

enum class Trust {
  kPrivate,     ///< ours or root's, and nobody else can write to it
  kNotByAnyone  ///< anybody's, but not writable by everyone
};
/// Why an existing folder must not be trusted with code, with what to do about it; empty if it can
/// be. A path that does not exist, or is no folder, is refused as well.
std::optional<std::string> refuse_folder(const std::filesystem::path& folder, Trust trust);

/// For tests of writers that die: called with the temporary file's path just before every rename.
/// Null (the default) does nothing.
using BeforeRenameHook = void (*)(const char* temp_path);
void set_before_rename_hook(BeforeRenameHook hook) noexcept;

}  // namespace treeattn
