// Forward on the GPU against the oracle, by the whole bar of the semantics.
#include <gtest/gtest.h>

#include <cmath>
#include <mutex>
#include <vector>

#include "tests/support/device_case.h"

namespace treeattn::testing {
namespace {

constexpr int kCases = 320;

RandomCaseOptions gpu_cases() {
  RandomCaseOptions options;
  options.most_long_tokens = 3300;
  return options;
}

Emulate emulation_of(DType dtype) {
  return dtype == DType::kF16 ? Emulate::kF16 : Emulate::kBF16;
}

class ForwardRandom : public GpuTest {};

TEST_F(ForwardRandom, ThreeHundredCasesAgreeWithTheOracle) {
  std::vector<RandomCase> cases(kCases);
  std::vector<OracleResult> expected(kCases);
  parallel_for(kCases, [&](int n) {
    cases[n] = random_case(static_cast<std::uint64_t>(n), gpu_cases());
    const Shape shape = shape_of_case(cases[n], false);
    gpu_engine().prepare({&shape, 1});
    expected[n] = oracle_forward(cases[n].oracle(), emulation_of(cases[n].dtype), 1);
  });
  double worst_bf16 = 0, worst_f16 = 0, worst_lse = 0;
  for (int n = 0; n < kCases; ++n) {
    RandomCase& c = cases[n];
    DeviceCase on(c, false);
    std::vector<float> lse;
    on.forward(c, lse);
    const ForwardError error = compare_forward(expected[n].out, expected[n].lse, c.out.to_doubles(),
                                               lse, c.heads, c.head_dim_v);
    const bool f16 = c.dtype == DType::kF16;
    EXPECT_LT(error.rel_l2, f16 ? 1e-3 : 4e-3) << error.describe() << "\n" << c.describe();
    EXPECT_LE(error.worst_vector, emulated_vector_bound(expected[n], c.heads, c.head_dim_v))
        << error.describe() << "\n"
        << c.describe();
    EXPECT_LT(error.lse, 1e-4) << error.describe() << "\n" << c.describe();
    EXPECT_TRUE(on.intact()) << "bytes beside a tensor were written: " << c.describe();
    double& worst = f16 ? worst_f16 : worst_bf16;
    worst = std::max(worst, error.rel_l2);
    worst_lse = std::max(worst_lse, error.lse);
  }
  std::printf("forward, %d cases: rel_l2 bf16 %.2e, f16 %.2e, lse %.2e\n", kCases, worst_bf16,
              worst_f16, worst_lse);
}

}  // namespace
}  // namespace treeattn::testing
