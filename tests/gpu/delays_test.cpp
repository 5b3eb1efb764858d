// Races between the roles of the sm90 family's kernels: the same kernels with random sleeps before
// every wait and arrival, in a process of their own, must give the same bits a thousand times.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <string>

#include "generator/arch.h"
#include "generator/template_source.h"
#include "runtime/cuda/device.h"
#include "tests/support/child_process.h"
#include "tests/support/device_case.h"
#include "tests/support/temp_dir.h"

namespace treeattn::testing {
namespace {

constexpr const char* kDelay = R"(
/// Up to two microseconds, at one call in four.
__device__ __forceinline__ void random_delay() {
  u32 x;
  asm volatile("mov.u32 %0, %%clock;" : "=r"(x));
  x = (x ^ threadIdx.x / 32 * 0x9e3779b9u ^ blockIdx.x * 0x7feb352du) * 0x85ebca6bu;
  x ^= x >> 13;
  if ((x & 3) == 0) asm volatile("nanosleep.u32 %0;" ::"r"(x >> 16 & 2047));
}
)";

/// The templates with a delay at the start of every wait and arrival.
void write_delayed_templates(const std::filesystem::path& folder) {
  for (const EmbeddedTemplate& each : embedded_templates()) {
    std::string text(each.text);
    if (each.name == "device/ptx_sm90.cuh") {
      text.insert(text.find("// mbarriers."), kDelay);
      int places = 0;
      for (const char* function : {"void mbarrier_arrive(", "void mbarrier_arrive_expect_tx(",
                                   "void cp_async_mbarrier_arrive(", "void mbarrier_wait(",
                                   "void named_barrier_sync(", "void named_barrier_arrive("}) {
        const std::size_t at = text.find(function);
        ASSERT_NE(at, std::string::npos) << function;
        text.insert(text.find("{\n", at) + 2, "  random_delay();\n");
        ++places;
      }
      ASSERT_EQ(places, 6);
    }
    const std::filesystem::path path = folder / each.name;
    std::filesystem::create_directories(path.parent_path());
    test::write_text(path, text);
  }
}

class Delays : public GpuTest {};

TEST_F(Delays, SleepsInEveryRoleChangeNoBit) {
  const DeviceInfo& device = device_info(0);
  if (kernel_target(device, FamilyChoice::kAuto) != kSm90Target) {
    GTEST_SKIP() << "the sm90 family runs on compute capability 9.0, this is " << device.major
                 << "." << device.minor;
  }
  const test::TempDir folder;
  write_delayed_templates(folder / "templates");
  const std::string self = std::filesystem::read_symlink("/proc/self/exe").string();
  test::ChildProcess child([&] {
    setenv("TREEATTN_TEMPLATE_DIR", (folder / "templates").c_str(), 1);
    setenv("TREEATTN_CACHE_DIR", (folder / "cache").c_str(), 1);
    setenv("TREEATTN_FAMILY", "auto", 1);
    execl(self.c_str(), self.c_str(),
          "--gtest_filter=Forward.AThousandRuns*:Forward.CountProbe*:Forward.BitsProbe*:"
          "Forward.NonFinite*:Backward.OfTheSm90Family*",
          nullptr);
    return 98;
  });
  EXPECT_EQ(child.wait(), 0) << "see the child's output above";
}

}  // namespace
}  // namespace treeattn::testing
