// The backward kernels' own text, run on the CPU by the emulator, against the oracle.
#include "runtime/attention/backward.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "tests/emulator/emulated_case.h"
#include "tests/support/forward_bar.h"
#include "tests/support/oracle_backward.h"

namespace treeattn::testing {
namespace {

emulator::Index index_of(const Grid& grid) {
  return {grid.x, grid.y, grid.z};
}

/// Runs the kernels; with `dq_kernel`, in deterministic mode. `order` is the seed of the order in
/// which things happen.
Gradients run(const emulator::Kernel& kernel, const emulator::Kernel* dq_kernel, BackwardCase& c,
              std::uint64_t order) {
  RandomCase& p = c.forward;
  const KernelSpec spec = parse_kernel_spec(kernel.spec);
  std::vector<PlanView> views{{spec.tile.block_m, spec.tile.block_n}};
  if (dq_kernel != nullptr) {
    const TileConfig tile = parse_kernel_spec(dq_kernel->spec).tile;
    views.push_back({tile.block_m, tile.block_n});
  }
  const EmulatedPlan plan(p, views);
  const PlanShape& shape = plan.shape;
  for (HostTensor* tensor : {&c.dq, &c.dk, &c.dv}) tensor->fill(std::nan(""));
  BackwardArgs args = c.backward_args();
  args.deterministic = dq_kernel != nullptr;
  args.plan = &plan.header;
  args.plan_buffer = plan.buffer.data();
  // Few rows see a tile of these cases: some let query heads go apart all the same.
  const int heads_apart_octave = 3 + static_cast<int>(order % 4) * 3;
  const std::size_t bytes =
      backward_workspace_bytes(shape, shape_of(args), spec, kEmulatedMultiprocessors,
                               args.deterministic, heads_apart_octave);
  std::vector<float> workspace(bytes / sizeof(float) + 1, std::nanf(""));
  args.workspace = workspace.data();
  args.workspace_bytes = bytes;
  const BackwardLaunch work =
      make_backward_launch(args, shape, spec, kEmulatedMultiprocessors, heads_apart_octave);
  BackwardParams dq_params = work.params;
  Grid dq_grid;
  if (dq_kernel != nullptr) {
    dq_grid = add_dq_launch(dq_params, shape, parse_kernel_spec(dq_kernel->spec));
  }
  const auto launch = [&](std::size_t entry, const Grid& grid, const void* params) {
    if (grid.x != 0) emulator::launch(kernel.entries[entry], index_of(grid), params, order);
  };
  launch(0, work.prepare, &work.params);
  if (spec.problem.family == Family::kSm90) {
    const BackwardTensorMaps maps = backward_tensor_maps(args, shape, spec);
    EXPECT_TRUE(maps.fit());
    const emulator::Tensor q = emulated_tensor(maps.q);
    const emulator::Tensor k = emulated_tensor(maps.k);
    const emulator::Tensor v = emulated_tensor(maps.v);
    const emulator::Tensor dout = emulated_tensor(maps.dout);
    const BackwardSm90Params params{emulated_map(q),    emulated_map(k),    emulated_map(v),
                                    emulated_map(dout), work.params,        maps.q.head_step(),
                                    maps.k.head_step(), maps.v.head_step(), maps.dout.head_step()};
    launch(1, work.main, &params);
  } else {
    launch(1, work.main, &work.params);
  }
  launch(2, work.sum, &work.params);
  if (dq_kernel != nullptr && dq_grid.x != 0) {
    emulator::launch(dq_kernel->entries[0], index_of(dq_grid), &dq_params, order);
  }
  return {c.dq.to_doubles(), c.dk.to_doubles(), c.dv.to_doubles()};
}

/// A kernel that owns rows of dq for the same problem, if one was compiled for the emulator.
const emulator::Kernel* dq_kernel_for(const Problem& problem) {
  static const std::vector<emulator::Kernel> all = emulated_kernels(Pass::kBackwardDq);
  for (const emulator::Kernel& kernel : all) {
    const Problem owner = parse_kernel_spec(kernel.spec).problem;
    if (owner.target.cc == problem.target.cc && owner.dtype == problem.dtype &&
        owner.head_dim == problem.head_dim && owner.head_dim_v == problem.head_dim_v &&
        owner.softcap == problem.softcap) {
      return &kernel;
    }
  }
  return nullptr;
}

class EmulatedBackward : public ::testing::TestWithParam<emulator::Kernel> {};

TEST_P(EmulatedBackward, RandomCasesAgreeWithTheOracle) {
  const Problem problem = parse_kernel_spec(GetParam().spec).problem;
  const emulator::Kernel* const dq_kernel = dq_kernel_for(problem);
  ASSERT_NE(dq_kernel, nullptr) << "its kernel for dq is not emulated";
  for (std::uint64_t seed = 0; seed < emulated_count(4); ++seed) {
    BackwardCase c = backward_case(seed, emulated_cases(problem));
    const Emulate emulation = emulation_of(c.forward.dtype);
    const OracleCase exact = c.forward.oracle();
    c.set_forward(oracle_forward(exact, Emulate::kNothing, 1));
    const std::vector<double> dout = c.dout.to_doubles();
    const Gradients expected = oracle_backward(exact, dout, c.dlse_doubles(), Emulate::kNothing, 1);
    const Gradients emulated = oracle_backward(exact, dout, c.dlse_doubles(), emulation, 1);
    const double bar = emulation == Emulate::kF16 ? 1e-3 : 4e-3;
    for (const emulator::Kernel* owner :
         {static_cast<const emulator::Kernel*>(nullptr), dq_kernel}) {
      Gradients actual;
      ASSERT_NO_THROW(actual = run(GetParam(), owner, c, seed)) << c.forward.describe();
      EXPECT_EQ(judge_gradients(c.forward, expected, emulated, actual, problem.softcap ? 0 : bar),
                "")
          << c.forward.describe();
    }
  }
}

// A tile of keys that rows far apart see is heavy enough to be shared, and one share sees nothing.
TEST_P(EmulatedBackward, AShareThatSeesNothingLeavesNothingUnderWay) {
  const Problem problem = parse_kernel_spec(GetParam().spec).problem;
  constexpr int kRows = 1100;
  constexpr int kKeys = 128;
  BackwardCase c;
  RandomCase& f = c.forward;
  f.dtype = problem.dtype == KernelDType::kF16 ? DType::kF16 : DType::kBF16;
  f.lowering = Lowering::kIntervals;
  f.head_dim = problem.head_dim;
  f.head_dim_v = problem.head_dim_v;
  f.softmax_scale = 0.1;
  f.softcap = problem.softcap ? 20 : 0;
  f.total_q = kRows;
  f.total_k = kKeys;
  f.cu_q = {0, kRows};
  f.cu_k = {0, kKeys};
  for (int j = 0; j < kKeys; ++j) f.first.push_back(j < 64 ? 0 : kRows - 64);
  f.len.assign(kKeys, 64);
  SplitMix64 rng(1);
  const auto random_tensor = [&](int tokens, int dim) {
    HostTensor t(f.dtype, tokens, 1, dim);
    for (int i = 0; i < tokens; ++i) {
      for (int d = 0; d < dim; ++d) t.set(i, 0, d, 2 * rng.uniform() - 1);
    }
    return t;
  };
  f.q = random_tensor(kRows, f.head_dim);
  f.k = random_tensor(kKeys, f.head_dim);
  f.v = random_tensor(kKeys, f.head_dim_v);
  f.out = HostTensor(f.dtype, kRows, 1, f.head_dim_v);
  c.dout = random_tensor(kRows, f.head_dim_v);
  c.dq = HostTensor(f.dtype, kRows, 1, f.head_dim);
  c.dk = HostTensor(f.dtype, kKeys, 1, f.head_dim);
  c.dv = HostTensor(f.dtype, kKeys, 1, f.head_dim_v);
  const OracleCase exact = f.oracle();
  c.set_forward(oracle_forward(exact, Emulate::kNothing, 1));
  const std::vector<double> dout = c.dout.to_doubles();
  const Gradients expected = oracle_backward(exact, dout, {}, Emulate::kNothing, 1);
  const Gradients emulated = oracle_backward(exact, dout, {}, emulation_of(f.dtype), 1);
  for (std::uint64_t order = 0; order < emulated_count(24); ++order) {
    Gradients actual;
    ASSERT_NO_THROW(actual = run(GetParam(), nullptr, c, order)) << order;
    EXPECT_EQ(judge_gradients(f, expected, emulated, actual, 0), "") << order;
  }
}

TEST_P(EmulatedBackward, DeterministicGradientsDependOnNoOrder) {
  const Problem problem = parse_kernel_spec(GetParam().spec).problem;
  const emulator::Kernel* const dq_kernel = dq_kernel_for(problem);
  ASSERT_NE(dq_kernel, nullptr) << "its kernel for dq is not emulated";
  BackwardCase c = backward_case(7, emulated_cases(problem));
  c.set_forward(oracle_forward(c.forward.oracle(), Emulate::kNothing, 1));
  const Gradients first = run(GetParam(), dq_kernel, c, 0);
  for (std::uint64_t order = 1; order <= emulated_count(4); ++order) {
    const Gradients again = run(GetParam(), dq_kernel, c, order);
    ASSERT_EQ(first.dq, again.dq) << order;
    ASSERT_EQ(first.dk, again.dk) << order;
    ASSERT_EQ(first.dv, again.dv) << order;
  }
}

INSTANTIATE_TEST_SUITE_P(Specs, EmulatedBackward,
                         ::testing::ValuesIn(emulated_kernels(Pass::kBackward)), emulated_name);

}  // namespace
}  // namespace treeattn::testing
