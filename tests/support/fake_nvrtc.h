// A compiler without NVRTC: turns any source into an image that the store and the fake driver
// accept, with a ptxas report about its entries. It replaces NVRTC from construction to
// destruction. One at a time; its functions are thread-safe.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "generator/generate.h"
#include "runtime/cuda/nvrtc.h"

namespace treeattn::test {

/// An ELF image for the fake driver that holds these entries; equal arguments give equal bytes.
std::vector<std::byte> fake_image(const std::vector<std::string>& entries, std::string_view source);
/// The readable part of such an image: "entries=a,b,;source=<hash>;".
std::string_view fake_image_text(const void* image);

/// A source with one kernel per entry that the real NVRTC compiles too.
GeneratedSource fake_source(const KernelSpec& spec, int entries = 1);
KernelSpec fake_spec(int head_dim = 128);

class FakeNvrtc {
 public:
  explicit FakeNvrtc(int major = 13, int minor = 0, int build = 88);
  ~FakeNvrtc();
  FakeNvrtc(const FakeNvrtc&) = delete;
  FakeNvrtc& operator=(const FakeNvrtc&) = delete;

  NvrtcTable table;
  int build;
  std::vector<int> archs{75, 80, 86, 87, 89, 90, 100, 120};
  /// Called inside every compile (not by the version probe), to wait or to count elsewhere.
  std::function<void()> on_compile;
  std::string fail_log;   ///< not empty: compiles fail with it
  bool garbage = false;   ///< cubins are no ELF images
  std::string extra_log;  ///< added to the log of a success
  int spill_bytes = 0;    ///< stores, and as many loads
  std::string last_options() const;

  int compiles() const { return compiles_; }
  int live_programs() const { return live_programs_; }

 private:
  friend struct FakeNvrtcCalls;

  std::string last_options_;
  std::atomic<int> compiles_{0}, live_programs_{0};
};

}  // namespace treeattn::test
