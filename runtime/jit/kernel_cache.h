// Kernels that are loaded in this process, by spec: single flight on a miss, failures remembered.
// Thread-safe; get() of a loaded kernel is a shared lock and a hash lookup, without allocation,
// environment or strings. Returned references live as long as the cache; those of create_default()
// as long as the process, so that a captured graph outlives the engine it was captured with.
#pragma once

#include <memory>
#include <string>

#include "generator/kernel_spec.h"
#include "runtime/jit/artifact_source.h"
#include "runtime/jit/module.h"
#include "runtime/support/config.h"
#include "treeattn/treeattn.h"

namespace treeattn {

struct KernelCacheOptions {
  ArtifactSourceOptions source;
  CaptureMiss capture_miss = CaptureMiss::kLoad;
};

class KernelCache {
 public:
  KernelCache(CubinStore store, std::unique_ptr<Compiler> compiler,
              KernelCacheOptions options = {});
  /// With the process's configuration. All such caches share their kernels, which are never
  /// unloaded; each has its own statistics.
  static std::unique_ptr<KernelCache> create_default();
  ~KernelCache();
  KernelCache(const KernelCache&) = delete;
  KernelCache& operator=(const KernelCache&) = delete;

  /// The kernel, ready for the current context's device. A miss loads it, from the store or by
  /// compiling, whether or not something is being captured; if `stream` is, the policy for capture
  /// misses warns or throws. Throws Error, the same one for every call until reset() where a kernel
  /// cannot be had.
  const LoadedKernel& get(const KernelSpec& spec, CUstream stream);
  /// The same for callers who know that `device` is the current context's.
  const LoadedKernel& get(const KernelSpec& spec, CUdevice device, CUstream stream);
  /// Makes the kernel ready for the current context ahead of time.
  PreparedKernel prepare(const KernelSpec& spec);
  /// Forgets failures, so that they are tried again. Loaded kernels stay.
  void reset();

  /// Neither touches the driver nor loads anything.
  KernelExplanation explain(const KernelSpec& spec) const;
  BuildReport build_artifact(const KernelSpec& spec, bool force = false);

  CubinStore& store();
  Stats stats() const;

 private:
  struct Slot;
  struct Shared;
  struct Counters;
  struct Ensured;
  explicit KernelCache(std::shared_ptr<Shared> shared);

  Ensured ensure(const KernelSpec& spec, CUdevice device);
  std::shared_ptr<Slot> claim(const KernelSpec& spec, bool& is_builder);
  void fill(Slot& slot, const KernelSpec& spec, CUdevice device);
  void build(Slot& slot, const KernelSpec& spec, CUdevice device);
  void check_capture(const KernelSpec& spec, CUstream stream) const;

  std::shared_ptr<Shared> shared_;
  std::unique_ptr<Counters> counters_;
};

}  // namespace treeattn
