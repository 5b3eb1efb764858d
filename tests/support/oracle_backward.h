// The backward oracle: gradients in float64 by the formulas of the semantics, from the element
// rule. It shares no code with the plan. Pure and thread-safe.
#pragma once

#include <string>
#include <vector>

#include "tests/support/oracle.h"
#include "tests/support/random_case.h"

namespace treeattn::testing {

struct Gradients {
  std::vector<double> dq;  ///< [total_q, heads, head_dim]
  std::vector<double> dk;  ///< [total_k, heads_kv, head_dim]
  std::vector<double> dv;  ///< [total_k, heads_kv, head_dim_v]
};

/// `dout` is [total_q, heads, head_dim_v]; `dlse` [heads, total_q] or empty. With emulation, out,
/// the probabilities, the score gradients and the results are rounded to the 16-bit type.
Gradients oracle_backward(const OracleCase& problem, const std::vector<double>& dout,
                          const std::vector<double>& dlse, Emulate emulate = Emulate::kNothing,
                          int threads = 0);

/// A forward problem with everything that backward takes and makes besides.
struct BackwardCase {
  RandomCase forward;
  HostTensor dout;
  std::vector<float> dlse;  ///< empty: not given
  HostTensor dq, dk, dv;    ///< filled with NaN

  /// out and lse as an exact forward would leave them, rounded to what the tensors hold.
  void set_forward(const OracleResult& result);
  std::vector<float> lse;  ///< [heads, total_q], see set_forward()
  std::vector<double> dlse_doubles() const { return {dlse.begin(), dlse.end()}; }
  /// Host pointers into this object; plan and workspace are left to the caller.
  BackwardArgs backward_args();
};

BackwardCase backward_case(std::uint64_t seed, const RandomCaseOptions& options = {});

/// What is wrong with gradients that should be `expected`, by the bar of the semantics: a bound on
/// rel_l2 (0: twice the emulation's) and twice the worst vector of the emulation. Empty: nothing.
std::string judge_gradients(const RandomCase& problem, const Gradients& expected,
                            const Gradients& emulated, const Gradients& actual, double rel_l2);

}  // namespace treeattn::testing
