#include "generator/arch.h"

#include <fmt/format.h>

#include <array>

#include "treeattn/error.h"

namespace treeattn {
namespace {

constexpr int kKiB = 1024;
constexpr int kRegisters = 65536;

constexpr std::array kTargets{
    ArchLimits{{80, false}, 163 * kKiB, 164 * kKiB, kRegisters, 2048},
    ArchLimits{{86, false}, 99 * kKiB, 100 * kKiB, kRegisters, 1536},
    ArchLimits{{87, false}, 163 * kKiB, 164 * kKiB, kRegisters, 1536},
    ArchLimits{{89, false}, 99 * kKiB, 100 * kKiB, kRegisters, 1536},
    ArchLimits{{90, false}, 227 * kKiB, 228 * kKiB, kRegisters, 2048},
    ArchLimits{{100, false}, 227 * kKiB, 228 * kKiB, kRegisters, 2048},
    ArchLimits{{103, false}, 227 * kKiB, 228 * kKiB, kRegisters, 2048},
    ArchLimits{{110, false}, 227 * kKiB, 228 * kKiB, kRegisters, 1536},
    ArchLimits{{120, false}, 99 * kKiB, 100 * kKiB, kRegisters, 1536},
    ArchLimits{{121, false}, 99 * kKiB, 100 * kKiB, kRegisters, 1536},
};

}  // namespace

std::span<const ArchLimits> known_targets() {
  return kTargets;
}

ArchLimits arch_limits(Target target) {
  const ArchLimits* nearest = &kTargets.front();
  for (const ArchLimits& known : kTargets) {
    if (known.target.cc <= target.cc) nearest = &known;
  }
  ArchLimits limits = *nearest;
  limits.target = target;
  return limits;
}

std::string describe_targets(Target device) {
  if (device != kSm90Target) return to_string(device);
  return fmt::format("{} (family sm90) and {} (family sm80)", to_string(device),
                     to_string(Target{device.cc, false}));
}

Target target_for_device(int major, int minor) {
  if (major < 8) {
    throw Error(
        ErrorCode::kUnsupported,
        fmt::format("this GPU has compute capability {}.{}, expected 8.0 or newer", major, minor),
        "use the CPU executor (EngineKind::kCpu) on this machine");
  }
  return Target{static_cast<std::uint16_t>(major * 10 + minor), false};
}

}  // namespace treeattn
