#include "runtime/cache/cubin_store.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cctype>
#include <cerrno>
#include <charconv>
#include <system_error>
#include <utility>

#include "runtime/support/file_io.h"
#include "runtime/support/log.h"

namespace treeattn {

namespace fs = std::filesystem;

struct CubinStore::State {
  std::vector<StoreRoot> roots;
  std::vector<StoreProbe> dropped;  // roots the configuration names that are not used, and why
  std::atomic<std::uint64_t> hits{0}, misses{0}, rejected{0}, published{0}, publish_failures{0};
};

namespace {

constexpr std::string_view kLayout = "v1";
constexpr std::string_view kNvrtcPrefix = "nvrtc";
constexpr std::string_view kSuffix = ".cubin";
constexpr std::uint64_t kMaxEntryBytes = 256u << 20;
// The signature is fixed by the Cache Directory Tagging Specification; backup tools look for it.
constexpr std::string_view kCacheTag =
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    "# Kernels compiled by treeattn. Safe to delete: they are compiled again when needed.\n";

std::span<const std::byte> as_bytes(std::string_view text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

// The readable part of an entry's name. A spec that is cut keeps its entry: the key names it.
std::string file_name(const std::string& spec, const ArtifactKey& key) {
  constexpr std::size_t kMaxSpecBytes = 120;
  std::string name = spec.substr(0, kMaxSpecBytes);
  for (char& c : name) {
    const bool plain = std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_' || c == '.';
    if (!plain) c = '-';
  }
  if (name.starts_with('.')) name[0] = '-';
  return name.append("-").append(key.hex()).append(kSuffix);
}

fs::path objects_folder(const fs::path& root) {
  return root / kLayout / "objects";
}

fs::path nvrtc_folder(const fs::path& root, int major) {
  return objects_folder(root) / (std::string(kNvrtcPrefix) + std::to_string(major));
}

// Names in a folder, sorted so that every listing has one order; none if it cannot be read.
std::vector<std::string> names_in(const fs::path& folder) {
  std::vector<std::string> names;
  std::error_code error;
  for (fs::directory_iterator it(folder, error), end; !error && it != end; it.increment(error)) {
    names.push_back(it->path().filename().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

// The NVRTC majors a root has folders for, newest first.
std::vector<int> majors_in(const fs::path& root) {
  std::vector<int> majors;
  for (const std::string& name : names_in(objects_folder(root))) {
    if (!name.starts_with(kNvrtcPrefix)) continue;
    const auto major = nvrtc_major(std::string_view(name).substr(kNvrtcPrefix.size()));
    if (major && name == std::string(kNvrtcPrefix) + std::to_string(*major)) {
      majors.push_back(*major);
    }
  }
  std::sort(majors.rbegin(), majors.rend());
  return majors;
}

// A writable root is only trusted for what this node's compiler made; packs serve any.
std::vector<int> majors_to_search(const StoreRoot& root, int wanted) {
  if (root.writable && wanted != 0) return {wanted};
  std::vector<int> majors = majors_in(root.path);
  std::stable_partition(majors.begin(), majors.end(), [&](int major) { return major == wanted; });
  return majors;
}

// fwd/sm80@sm_90/... -> sm_90
std::string_view target_of(std::string_view spec) {
  const std::size_t at = spec.find('@');
  if (at == std::string_view::npos) return {};
  const std::string_view rest = spec.substr(at + 1);
  return rest.substr(0, rest.find('/'));
}

// What is done about it, for a message about a bad entry.
const char* remedy(const StoreRoot& root) {
  return root.writable ? "it will be compiled again and replaced"
                       : "it is skipped; rebuild this read-only folder with 'treeattn precompile'";
}

// Why a root is not used now. A writable one that does not exist yet is fine: publish creates it.
std::optional<std::string> refuse_root(const StoreRoot& root) {
  struct stat info {};
  if (root.writable && lstat(root.path.c_str(), &info) != 0 && errno == ENOENT) return std::nullopt;
  return refuse_folder(root.path, root.writable ? Trust::kPrivate : Trust::kNotByAnyone);
}

void warn_root(const StoreRoot& root, const std::string& why) {
  const std::string path = root.path.string();
  log_once(LogLevel::kWarning, "store-root:" + path,
           "kernel cache folder " + path + " is not used: it " + why +
               (root.writable ? ". Compiled kernels stay in memory; TREEATTN_CACHE_DIR names "
                                "another folder"
                              : " (from TREEATTN_CACHE_PATH)"));
}

bool usable(const StoreRoot& root, std::vector<StoreProbe>* probes = nullptr) {
  const std::optional<std::string> why = refuse_root(root);
  if (!why) return true;
  warn_root(root, *why);
  if (probes != nullptr) probes->push_back({root.path.string(), "not used: it " + *why});
  return false;
}

struct Loaded {
  std::optional<Artifact> artifact;
  std::string why;  // when there is none; empty: no such file
};

// Reads and verifies one file, whatever it should hold.
Loaded load(const StoreRoot& root, const fs::path& path) {
  const FileContent content = read_file(path, kMaxEntryBytes);
  if (content.status.error == ENOENT || content.status.error == ENOTDIR) return {};
  if (!content.ok()) return {std::nullopt, content.status.why};
  if (root.writable) {
    if (const auto refused = refuse_file(content)) return {std::nullopt, "it " + *refused};
  }
  Loaded loaded;
  loaded.artifact = decode_artifact(content.bytes, loaded.why);
  return loaded;
}

std::string mismatch(const Artifact& artifact, const ArtifactKey& key, const std::string& spec) {
  if (artifact.key != key) return "it holds another key, " + artifact.key.hex();
  if (artifact.spec != spec) return "it holds another spec, " + artifact.spec;
  if (artifact.target != target_of(spec)) return "it was compiled for " + artifact.target;
  return {};
}

struct FileIdentity {
  dev_t device;
  ino_t inode;
  off_t size;
  std::int64_t seconds;
  std::int64_t nanoseconds;
  friend bool operator==(const FileIdentity&, const FileIdentity&) = default;
};

std::optional<FileIdentity> identity(const fs::path& path) {
  struct stat info {};
  if (lstat(path.c_str(), &info) != 0) return std::nullopt;
  return FileIdentity{info.st_dev, info.st_ino, info.st_size, info.st_mtim.tv_sec,
                      info.st_mtim.tv_nsec};
}

// Calls `visit` for the path of every entry of a root, in order.
void for_each_entry(const fs::path& root, const std::function<void(const fs::path&)>& visit) {
  for (const int major : majors_in(root)) {
    const fs::path folder = nvrtc_folder(root, major);
    for (const std::string& shard : names_in(folder)) {
      for (const std::string& name : names_in(folder / shard)) {
        if (name.ends_with(kSuffix) && !name.starts_with('.')) visit(folder / shard / name);
      }
    }
  }
}

std::optional<StoreEntry> describe(const StoreRoot& root, const fs::path& path) {
  const std::optional<FileIdentity> file = identity(path);
  if (!file) return std::nullopt;
  StoreEntry entry{path, static_cast<std::uint64_t>(file->size), file->seconds, std::nullopt, {}};
  Loaded loaded = load(root, path);
  if (!loaded.artifact && loaded.why.empty()) return std::nullopt;  // removed meanwhile
  entry.damage = std::move(loaded.why);
  if (loaded.artifact &&
      path.filename() != file_name(loaded.artifact->spec, loaded.artifact->key)) {
    entry.damage = "its name is not the one of its spec and key";
  } else {
    entry.artifact = std::move(loaded.artifact);
  }
  return entry;
}

const StoreRoot* writable_root(const std::vector<StoreRoot>& roots) {
  const auto root =
      std::find_if(roots.begin(), roots.end(), [](const auto& r) { return r.writable; });
  return root != roots.end() ? &*root : nullptr;
}

void write_cache_tag(const StoreRoot& root, unsigned mode) {
  const fs::path tag = root.path / kLayout / "CACHEDIR.TAG";
  struct stat info {};
  // Without it the cache works as well; only backups grow.
  if (lstat(tag.c_str(), &info) != 0) (void)write_file_atomically(tag, as_bytes(kCacheTag), mode);
}

// The whole of publish; the reason it failed, or empty.
std::string write_entry(const StoreRoot& root, const Artifact& artifact) {
  if (const auto refused = refuse_artifact(artifact)) return *refused;
  const unsigned folder_mode = root.shared ? 0755 : 0700;
  const unsigned file_mode = root.shared ? 0644 : 0600;
  const fs::path path =
      CubinStore::entry_path(root.path, *nvrtc_major(artifact.nvrtc), artifact.spec, artifact.key);
  if (IoStatus status = make_folders(root.path, folder_mode); !status) return status.why;
  // After creating it: someone else may have been first.
  if (const auto why = refuse_root(root)) return root.path.string() + " " + *why;
  if (IoStatus status = make_folders(path.parent_path(), folder_mode); !status) return status.why;
  write_cache_tag(root, file_mode);
  if (IoStatus status = write_file_atomically(path, encode_artifact(artifact), file_mode);
      !status) {
    return status.why;
  }
  remove_stale_temp_files(path.parent_path());
  return {};
}

}  // namespace

CubinStore::CubinStore(std::vector<StoreRoot> roots) : state_(std::make_unique<State>()) {
  state_->roots = std::move(roots);
}

CubinStore::~CubinStore() = default;
CubinStore::CubinStore(CubinStore&&) noexcept = default;
CubinStore& CubinStore::operator=(CubinStore&&) noexcept = default;

CubinStore CubinStore::from_config(const Config& config) {
  log_problems(config);
  std::vector<StoreRoot> named;
  for (const std::string& path : config.cache_path) {
    // As a read-only root it would be searched twice.
    if (path != config.cache_dir) named.push_back({path, false, false});
  }
  if (config.cache_dir.empty()) {
    log_once(LogLevel::kWarning, "store-memory-only",
             "no folder to keep compiled kernels in (TREEATTN_CACHE_DIR, XDG_CACHE_HOME and HOME "
             "are not set); they stay in memory. Set TREEATTN_CACHE_DIR to a folder");
  } else {
    named.push_back({config.cache_dir, true, false});
  }
  CubinStore store({});
  for (StoreRoot& root : named) {
    if (usable(root, &store.state_->dropped)) store.state_->roots.push_back(std::move(root));
  }
  return store;
}

fs::path CubinStore::entry_path(const fs::path& root, int nvrtc_major, const std::string& spec,
                                const ArtifactKey& key) {
  return nvrtc_folder(root, nvrtc_major) / key.hex().substr(0, 2) / file_name(spec, key);
}

std::optional<Artifact> CubinStore::find(const ArtifactKey& key, const std::string& spec,
                                         int nvrtc_major, std::vector<StoreProbe>* probes) const {
  const auto note = [probes](std::string path, std::string outcome) {
    if (probes != nullptr) probes->push_back({std::move(path), std::move(outcome)});
  };
  for (const StoreProbe& dropped : state_->dropped) note(dropped.path, dropped.outcome);
  for (const StoreRoot& root : state_->roots) {
    if (!usable(root, probes)) continue;
    const std::vector<int> majors = majors_to_search(root, nvrtc_major);
    if (majors.empty()) note(objects_folder(root.path).string(), "no such entry");
    for (const int major : majors) {
      const fs::path path = entry_path(root.path, major, spec, key);
      Loaded loaded = load(root, path);
      if (loaded.artifact) loaded.why = mismatch(*loaded.artifact, key, spec);
      if (loaded.artifact && loaded.why.empty()) {
        note(path.string(), "hit");
        ++state_->hits;
        return std::move(loaded.artifact);
      }
      note(path.string(), loaded.why.empty() ? "no such entry" : "refused: " + loaded.why);
      if (loaded.why.empty()) continue;
      ++state_->rejected;
      log_once(
          LogLevel::kWarning, "store-entry:" + path.string(),
          "cached kernel " + path.string() + " was refused: " + loaded.why + "; " + remedy(root));
    }
  }
  ++state_->misses;
  return std::nullopt;
}

bool CubinStore::publish(const Artifact& artifact, std::string& why) {
  const StoreRoot* root = writable_root(state_->roots);
  if (root == nullptr) {
    why = "there is no writable cache folder";
    ++state_->publish_failures;
    return false;
  }
  why = write_entry(*root, artifact);
  if (why.empty()) {
    ++state_->published;
    return true;
  }
  ++state_->publish_failures;
  log_once(LogLevel::kWarning, "store-publish:" + root->path.string(),
           "compiled kernels cannot be kept in " + root->path.string() + ": " + why +
               ". They stay in memory; TREEATTN_CACHE_DIR names another folder");
  return false;
}

std::vector<StoreEntry> CubinStore::list() const {
  std::vector<StoreEntry> entries;
  for (const StoreRoot& root : state_->roots) {
    if (!usable(root)) continue;
    for_each_entry(root.path, [&](const fs::path& path) {
      if (auto entry = describe(root, path)) entries.push_back(std::move(*entry));
    });
  }
  return entries;
}

std::uint64_t CubinStore::remove_if(const std::function<bool(const StoreEntry&)>& drop) {
  const StoreRoot* root = writable_root(state_->roots);
  if (root == nullptr || !usable(*root)) return 0;
  std::uint64_t removed = 0;
  for_each_entry(root->path, [&](const fs::path& path) {
    const std::optional<FileIdentity> seen = identity(path);
    const std::optional<StoreEntry> entry = describe(*root, path);
    if (!seen || !entry || !drop(*entry)) return;
    // A file replaced since it was judged is another entry.
    if (identity(path) == seen && unlink(path.c_str()) == 0) ++removed;
  });
  remove_stale_temp_files(root->path / kLayout);
  for (const int major : majors_in(root->path)) {
    const fs::path folder = nvrtc_folder(root->path, major);
    for (const std::string& shard : names_in(folder)) remove_stale_temp_files(folder / shard);
  }
  return removed;
}

const std::vector<StoreRoot>& CubinStore::roots() const {
  return state_->roots;
}

StoreCounters CubinStore::counters() const {
  return {state_->hits, state_->misses, state_->rejected, state_->published,
          state_->publish_failures};
}

}  // namespace treeattn
