// Compiled kernels on disk: content-addressed immutable files under one writable root and any
// number of read-only ones. Never throws on I/O; correctness never depends on a lock. Thread-safe,
// and safe between processes and nodes that share a root.
//
//   <root>/v1/CACHEDIR.TAG
//   <root>/v1/objects/nvrtc13/3f/fwd-sm80-sm_90-bf16-d128v128-m128n64s2w4-<key>.cubin
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "runtime/cache/artifact.h"
#include "runtime/support/config.h"

namespace treeattn {

struct StoreRoot {
  std::filesystem::path path;
  bool writable = false;
  /// Folders 0755 and files 0644 instead of 0700 and 0600: a pack that other users will read.
  bool shared = false;
};

struct StoreCounters {
  std::uint64_t hits = 0, misses = 0, rejected = 0, published = 0, publish_failures = 0;
};

/// One location that was tried for a key and what came of it.
struct StoreProbe {
  std::string path;
  std::string outcome;  ///< "hit", "no such entry", or why the entry was refused
};

struct StoreEntry {
  std::filesystem::path path;
  std::uint64_t bytes = 0;
  std::int64_t mtime = 0;            ///< seconds since the epoch
  std::optional<Artifact> artifact;  ///< empty: damaged
  std::string damage;                ///< why, when damaged
};

class CubinStore {
 public:
  /// Roots are searched in order; the first writable one is published to. Folders are created by
  /// the first publish, and checked each time they are used: a writable root must belong to this
  /// user (or root) and be writable by nobody else, a read-only one must not be writable by
  /// everyone.
  explicit CubinStore(std::vector<StoreRoot> roots);
  /// The roots that a configuration names; unusable ones are dropped with one warning each.
  static CubinStore from_config(const Config& config);

  ~CubinStore();
  CubinStore(CubinStore&&) noexcept;
  CubinStore& operator=(CubinStore&&) noexcept;

  /// A verified entry for exactly this key, spec and the spec's target, or nothing. `nvrtc_major`
  /// selects the sub-folder of a writable root that is looked in (0: all, newest first); read-only
  /// roots are looked through whole. `probes`, when given, collects what was tried. A bad entry is
  /// a miss, warned about once per file.
  std::optional<Artifact> find(const ArtifactKey& key, const std::string& spec, int nvrtc_major,
                               std::vector<StoreProbe>* probes = nullptr) const;
  /// Writes to the writable root by unique temporary file, fsync and rename. False (with `why`) if
  /// there is none or it failed; the caller goes on with its own bytes.
  bool publish(const Artifact& artifact, std::string& why);

  /// Every entry of every usable root by path, damaged ones included.
  std::vector<StoreEntry> list() const;
  /// Removes entries of the writable root for which `drop` answers true, and stale temporary files.
  /// An entry replaced since `drop` saw it stays. Returns how many entries were removed.
  std::uint64_t remove_if(const std::function<bool(const StoreEntry&)>& drop);

  const std::vector<StoreRoot>& roots() const;
  /// Where publish puts, and find looks for, an entry below a root.
  static std::filesystem::path entry_path(const std::filesystem::path& root, int nvrtc_major,
                                          const std::string& spec, const ArtifactKey& key);
  StoreCounters counters() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace treeattn
