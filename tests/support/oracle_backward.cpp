#include "tests/support/oracle_backward.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <ranges>
#include <thread>

#include "runtime/attention/half.h"

namespace treeattn::testing {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

double rounded(Emulate type, double value) {
  const auto narrow = static_cast<float>(value);
  switch (type) {
    case Emulate::kNothing:
      return value;
    case Emulate::kF16:
      return static_cast<double>(f16_to_float(float_to_f16(narrow)));
    case Emulate::kBF16:
      return static_cast<double>(bf16_to_float(float_to_bf16(narrow)));
  }
  return value;
}

/// One (sequence, query head); dk and dv go to sums of its own.
class HeadPass {
 public:
  HeadPass(const OracleCase& problem, int b, int head)
      : p_(problem),
        b_(b),
        head_(head),
        head_kv_(head / (problem.heads / problem.heads_kv)),
        q0_(problem.cu_q[b]),
        k0_(problem.cu_k[b]),
        keys_(problem.cu_k[b + 1] - k0_) {
    k_ = columns(p_.k, p_.head_dim);
    v_ = columns(p_.v, p_.head_dim_v);
    dk.assign(static_cast<std::size_t>(keys_) * p_.head_dim, 0.0);
    dv.assign(static_cast<std::size_t>(keys_) * p_.head_dim_v, 0.0);
  }

  void run(const std::vector<double>& dout, const std::vector<double>& dlse, Emulate emulate,
           std::vector<double>& dq) {
    const std::int64_t rows = p_.cu_q[b_ + 1] - q0_;
    for (std::int64_t i = 0; i < rows; ++i) row(i, dout, dlse, emulate, dq);
  }

  std::vector<double> dk, dv;  ///< [keys, dim]

 private:
  /// [dim][keys], so that a row's products with all keys are vector operations.
  std::vector<double> columns(const std::vector<double>& from, int dim) const {
    std::vector<double> to(static_cast<std::size_t>(dim) * keys_);
    for (std::int64_t j = 0; j < keys_; ++j) {
      const double* at = &from[((k0_ + j) * p_.heads_kv + head_kv_) * dim];
      for (int d = 0; d < dim; ++d) to[d * keys_ + j] = at[d];
    }
    return to;
  }

  static void product(std::vector<double>& to, const double* row,
                      const std::vector<double>& columns, int dim, std::int64_t begin,
                      std::int64_t end, std::int64_t keys) {
    std::fill(to.begin() + begin, to.begin() + end, 0.0);
    for (int d = 0; d < dim; ++d) {
      const double* column = &columns[d * keys];
      for (std::int64_t j = begin; j < end; ++j) to[j] += row[d] * column[j];
    }
  }

  void row(std::int64_t i, const std::vector<double>& dout, const std::vector<double>& dlse,
           Emulate emulate, std::vector<double>& dq) {
    seen_.clear();
    for (std::int64_t j = 0; j < keys_; ++j) {
      if (oracle_sees(p_, b_, i, j)) seen_.push_back(j);
    }
    if (seen_.empty()) return;
    const std::int64_t begin = seen_.front();
    const std::int64_t end = seen_.back() + 1;
    const std::int64_t at = (q0_ + i) * p_.heads + head_;
    const double* q = &p_.q[at * p_.head_dim];
    const double* up = &dout[at * p_.head_dim_v];
    score_.resize(keys_);
    dp_.resize(keys_);
    product(score_, q, k_, p_.head_dim, begin, end, keys_);
    product(dp_, up, v_, p_.head_dim_v, begin, end, keys_);
    double highest = -kInfinity;
    for (const std::int64_t j : seen_) {
      score_[j] *= p_.softmax_scale;
      if (p_.softcap > 0) score_[j] = p_.softcap * std::tanh(score_[j] / p_.softcap);
      highest = std::max(highest, score_[j]);
    }
    double sum = 0;
    for (const std::int64_t j : seen_) sum += std::exp(score_[j] - highest);
    const double delta = row_delta(highest, sum, up, emulate) -
                         (dlse.empty() ? 0.0 : dlse[head_ * p_.total_q + q0_ + i]);
    double* dq_row = &dq[at * p_.head_dim];
    for (const std::int64_t j : seen_) {
      const double p = std::exp(score_[j] - highest) / sum;
      const double t = p_.softcap > 0 ? score_[j] / p_.softcap : 0.0;
      const double ds = rounded(emulate, p * (dp_[j] - delta) * (1 - t * t));
      const double weight = rounded(emulate, p);
      const double* k = &p_.k[((k0_ + j) * p_.heads_kv + head_kv_) * p_.head_dim];
      double* dk_row = &dk[j * p_.head_dim];
      double* dv_row = &dv[j * p_.head_dim_v];
      for (int d = 0; d < p_.head_dim; ++d) dq_row[d] += ds * k[d];
      for (int d = 0; d < p_.head_dim; ++d) dk_row[d] += ds * q[d];
      for (int d = 0; d < p_.head_dim_v; ++d) dv_row[d] += weight * up[d];
    }
    for (int d = 0; d < p_.head_dim; ++d) {
      dq_row[d] = rounded(emulate, dq_row[d] * p_.softmax_scale);
    }
  }

  /// rowsum(dout out), with out as the 16-bit tensor holds it where that is emulated.
  double row_delta(double highest, double sum, const double* up, Emulate emulate) {
    out_.assign(p_.head_dim_v, 0.0);
    for (const std::int64_t j : seen_) {
      const double* v = &p_.v[((k0_ + j) * p_.heads_kv + head_kv_) * p_.head_dim_v];
      const double weight = std::exp(score_[j] - highest) / sum;
      for (int d = 0; d < p_.head_dim_v; ++d) out_[d] += weight * v[d];
    }
    double delta = 0;
    for (int d = 0; d < p_.head_dim_v; ++d) delta += rounded(emulate, out_[d]) * up[d];
    return delta;
  }

  const OracleCase& p_;
  int b_, head_, head_kv_;
  std::int64_t q0_, k0_, keys_;
  std::vector<double> k_, v_, score_, dp_, out_;
  std::vector<std::int64_t> seen_;
};

}  // namespace

Gradients oracle_backward(const OracleCase& problem, const std::vector<double>& dout,
                          const std::vector<double>& dlse, Emulate emulate, int threads) {
  Gradients g;
  g.dq.assign(problem.q.size(), 0.0);
  g.dk.assign(problem.k.size(), 0.0);
  g.dv.assign(problem.v.size(), 0.0);
  const int group = problem.heads / problem.heads_kv;
  for (int b = 0; b < problem.batch(); ++b) {
    std::vector<HeadPass> passes;
    for (int head = 0; head < problem.heads; ++head) passes.emplace_back(problem, b, head);
    std::atomic<std::size_t> next{0};
    const auto work = [&] {
      for (std::size_t n = next++; n < passes.size(); n = next++) {
        passes[n].run(dout, dlse, emulate, g.dq);
      }
    };
    {
      const auto workers = static_cast<unsigned>(
          threads > 0 ? threads : std::max(1U, std::thread::hardware_concurrency()));
      std::vector<std::jthread> pool;
      for (unsigned n = 1; n < std::min<std::size_t>(workers, passes.size()); ++n) {
        pool.emplace_back(work);
      }
      work();
    }
    // Heads are added in order, whatever the threads did.
    for (int head = 0; head < problem.heads; ++head) {
      const auto add = [&](const std::vector<double>& from, int dim, std::vector<double>& to) {
        for (std::size_t n = 0; n < from.size(); ++n) {
          const std::size_t key = problem.cu_k[b] + n / dim;
          to[(key * problem.heads_kv + head / group) * dim + n % dim] += from[n];
        }
      };
      add(passes[head].dk, problem.head_dim, g.dk);
      add(passes[head].dv, problem.head_dim_v, g.dv);
    }
  }
  for (double& x : g.dk) x = rounded(emulate, x * problem.softmax_scale);
  for (double& x : g.dv) x = rounded(emulate, x);
  return g;
}

void BackwardCase::set_forward(const OracleResult& result) {
  const int dim = forward.head_dim_v;
  for (std::int64_t t = 0; t < forward.total_q; ++t) {
    for (int h = 0; h < forward.heads; ++h) {
      for (int d = 0; d < dim; ++d) {
        forward.out.set(t, h, d, result.out[(t * forward.heads + h) * dim + d]);
      }
    }
  }
  lse.assign(result.lse.begin(), result.lse.end());
}

BackwardArgs BackwardCase::backward_args() {
  BackwardArgs args;
  args.dtype = forward.dtype;
  args.heads = forward.heads;
  args.heads_kv = forward.heads_kv;
  args.head_dim = forward.head_dim;
  args.head_dim_v = forward.head_dim_v;
  args.q = forward.q.const_view();
  args.k = forward.k.const_view();
  args.v = forward.v.const_view();
  args.out = forward.out.const_view();
  args.dout = dout.const_view();
  args.lse = lse.empty() ? nullptr : lse.data();
  args.dlse = dlse.empty() ? nullptr : dlse.data();
  args.dq = dq.view();
  args.dk = dk.view();
  args.dv = dv.view();
  args.softmax_scale = forward.softmax_scale;
  args.softcap = forward.softcap;
  return args;
}

BackwardCase backward_case(std::uint64_t seed, const RandomCaseOptions& options) {
  BackwardCase c;
  c.forward = random_case(seed, options);
  SplitMix64 rng(seed ^ 0x62776473u);
  const auto like = [&](const HostTensor& t) {
    return HostTensor(t.dtype(), t.tokens(), t.heads(), t.dim(), t.token_stride(), t.head_stride());
  };
  const RandomCase& f = c.forward;
  c.dout = rng.chance(0.5) ? like(f.out) : HostTensor(f.dtype, f.total_q, f.heads, f.head_dim_v);
  c.dq = rng.chance(0.5) ? like(f.q) : HostTensor(f.dtype, f.total_q, f.heads, f.head_dim);
  c.dk = rng.chance(0.5) ? like(f.k) : HostTensor(f.dtype, f.total_k, f.heads_kv, f.head_dim);
  c.dv = rng.chance(0.5) ? like(f.v) : HostTensor(f.dtype, f.total_k, f.heads_kv, f.head_dim_v);
  // The sum of four uniforms is close enough to normal, and cheap.
  const auto draw = [&] {
    return (rng.uniform() + rng.uniform() + rng.uniform() + rng.uniform() - 2) * 1.732;
  };
  for (std::int64_t t = 0; t < f.cu_q.back(); ++t) {
    for (int h = 0; h < f.heads; ++h) {
      for (int d = 0; d < f.head_dim_v; ++d) c.dout.set(t, h, d, draw());
    }
  }
  if (rng.chance(0.5)) {
    c.dlse.resize(static_cast<std::size_t>(f.heads) * f.total_q);
    for (float& x : c.dlse) x = static_cast<float>(draw());
  }
  return c;
}

std::string judge_gradients(const RandomCase& problem, const Gradients& expected,
                            const Gradients& emulated, const Gradients& actual, double rel_l2) {
  std::string trouble;
  const auto judge = [&](const char* name, const std::vector<double>& want,
                         const std::vector<double>& near, const std::vector<double>& got, int heads,
                         int dim) {
    const ForwardError error = compare_forward(want, {}, got, {}, heads, dim);
    const ForwardError bound = compare_forward(want, {}, near, {}, heads, dim);
    const double limit = rel_l2 > 0 ? rel_l2 : 2 * bound.rel_l2;
    // Rows with a single key have no gradient: nothing to be relative to.
    const auto magnitude = [](double x) { return std::abs(x); };
    const double largest =
        want.empty() ? 0 : std::ranges::max(want | std::views::transform(magnitude));
    if (largest < 1e-4 && error.max_abs < 1e-4) return;
    if (error.rel_l2 > limit) {
      trouble +=
          fmt::format("{}: {}, expected rel_l2 below {:.3e}\n", name, error.describe(), limit);
    } else if (error.worst_vector > 2 * bound.worst_vector) {
      trouble += fmt::format("{}: {}, expected vectors below {:.3e}\n", name, error.describe(),
                             2 * bound.worst_vector);
    }
  };
  judge("dq", expected.dq, emulated.dq, actual.dq, problem.heads, problem.head_dim);
  judge("dk", expected.dk, emulated.dk, actual.dk, problem.heads_kv, problem.head_dim);
  judge("dv", expected.dv, emulated.dv, actual.dv, problem.heads_kv, problem.head_dim_v);
  return trouble;
}

}  // namespace treeattn::testing
