// Artifacts that look real to everything but a driver.
#pragma once

#include <string>

#include "runtime/cache/artifact.h"
#include "runtime/support/digest.h"

namespace treeattn::test {

inline constexpr const char* kFakeSpec = "fwd/sm80@sm_90/bf16/d128v128/m128n64s2w4";

/// Bytes with an ELF header of a cubin and a body that differs by `seed`.
inline std::vector<std::byte> fake_cubin(std::uint32_t seed, std::size_t size = 5000) {
  std::vector<std::byte> cubin(size);
  std::uint64_t state = seed * 0x9E3779B97F4A7C15ull + 1;
  for (std::byte& byte : cubin) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    byte = static_cast<std::byte>(state >> 56);
  }
  constexpr unsigned char kHeader[] = {0x7f, 'E', 'L', 'F', 2, 1, 1, 0x41, 8,   0,
                                       0,    0,   0,   0,   0, 0, 2, 0,    190, 0};
  for (std::size_t i = 0; i < sizeof kHeader; ++i) cubin[i] = static_cast<std::byte>(kHeader[i]);
  return cubin;
}

inline Artifact fake_artifact(std::uint32_t seed = 1, const std::string& nvrtc = "13.0.88") {
  Artifact artifact;
  artifact.key = {sha256("fake key " + std::to_string(seed))};
  artifact.spec = kFakeSpec;
  artifact.nvrtc = nvrtc;
  artifact.target = "sm_90";
  artifact.entries = {{"treeattn_fwd_one", 128, 98304, 255, 0, 0, 16},
                      {"treeattn_fwd_two", 256, 0, 40, 8, 16, 0}};
  artifact.cubin = fake_cubin(seed);
  return artifact;
}

}  // namespace treeattn::test
