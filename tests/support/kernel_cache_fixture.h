// Kernel caches over stores of the test's choice, with fake sources and the compiler in use.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "runtime/jit/kernel_cache.h"
#include "tests/support/fake_nvrtc.h"
#include "treeattn/error.h"

namespace treeattn::test {

/// A machine without NVRTC. Counts how often it was asked for.
class NoCompiler final : public Compiler {
 public:
  explicit NoCompiler(int& asked) : asked_(asked) {}
  CompileResult compile(const GeneratedSource&, const CompileOptions&) override {
    ++asked_;
    throw Error(ErrorCode::kNotFound, "no compiler");
  }
  CompilerInfo info() override {
    ++asked_;
    CompilerInfo info;
    info.problem = "libnvrtc.so.13: not here";
    return info;
  }

 private:
  int& asked_;
};

inline KernelCacheOptions options(JitPolicy jit = JitPolicy::kAuto) {
  KernelCacheOptions chosen;
  chosen.source.jit = jit;
  chosen.source.generate = [](const KernelSpec& spec) { return fake_source(spec, 2); };
  return chosen;
}

inline std::unique_ptr<KernelCache> cache_over(std::vector<StoreRoot> roots,
                                               KernelCacheOptions with = options()) {
  return std::make_unique<KernelCache>(CubinStore(std::move(roots)),
                                       std::make_unique<NvrtcCompiler>(""), std::move(with));
}

template <typename Body>
Error error_of(Body&& body) {
  try {
    body();
  } catch (const Error& error) {
    return error;
  }
  return {ErrorCode::kOk, "nothing was thrown"};
}

}  // namespace treeattn::test
