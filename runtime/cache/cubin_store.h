// Compiled kernels on disk: content-addressed immutable files under one writable root and any number of
// read-only ones. Never throws on I/O; correctness never depends on a lock.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "runtime/cache/artifact.h"

namespace treeattn {

struct StoreRoot {
  std::filesystem::path path;
  bool writable = false;
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
  std::int64_t mtime = 0;               ///< seconds since the epoch
  std::optional<Artifact> artifact;     ///< empty: damaged
  std::string damage;                   ///< why, when damaged
};

class CubinStore {
 public:
  /// `nvrtc_major` selects the sub-folder of locally compiled entries (0: any that is present).
  explicit CubinStore(std::vector<StoreRoot> roots);
  /// The roots that a configuration names; unusable ones are dropped with one warning each.
  static CubinStore from_config(const Config& config);

  /// A verified entry compiled for exactly `target`, or nothing. `probes`, when given, collects what was tried.
  std::optional<Artifact> find(const ArtifactKey& key, const std::string& spec, int nvrtc_major,
                               std::vector<StoreProbe>* probes = nullptr) const;
  /// Writes to the writable root by unique temporary file, fsync and rename. False (with `why`) if
  /// there is none or it failed; the caller goes on with its own bytes.
  bool publish(const Artifact& artifact, std::string& why);

  std::vector<StoreEntry> list() const;  ///< every entry of every root, damaged ones included
  /// Removes entries of the writable root for which `drop` answers true, and stale temporary files.
  std::uint64_t remove_if(const std::function<bool(const StoreEntry&)>& drop);

  const std::vector<StoreRoot>& roots() const;
  StoreCounters counters() const;
};

}  // namespace treeattn
