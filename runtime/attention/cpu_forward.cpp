#include "runtime/attention/cpu_forward.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include "runtime/attention/cpu_executor.h"
#include "runtime/attention/plan.h"

namespace treeattn {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
/// Keys whose scores are computed together; divides every key tile.
constexpr int kChunk = kGranuleKeys;

/// One (query tile, head) at a time, in scratch of its own.
template <class Type>
class Worker {
 public:
  using Stored = typename Type::Stored;
  using Acc = typename Type::Acc;

  Worker(const ForwardArgs& args, const PlanReader& plan, int view)
      : args_(args),
        plan_(plan),
        view_(view),
        block_n_(plan.shape().views[view].block_n),
        dim_(args.head_dim),
        dim_v_(args.head_dim_v > 0 ? args.head_dim_v : args.head_dim) {
    const auto rows = static_cast<std::size_t>(plan.shape().views[view].block_m);
    const auto keys = static_cast<std::size_t>(block_n_);
    q_.resize(rows * dim_);
    k_transposed_.resize(keys * dim_);
    v_.resize(keys * dim_v_);
    out_.resize(rows * dim_v_);
    scores_.resize(keys);
    sees_.resize(keys);
    max_.resize(rows);
    sum_.resize(rows);
  }

  void run(std::int64_t task) {
    const QueryTile& tile = plan_.query_tiles(view_)[static_cast<std::size_t>(task / args_.heads)];
    const auto head = static_cast<int>(task % args_.heads);
    std::fill_n(max_.begin(), tile.rows, -kInfinity);
    std::fill_n(sum_.begin(), tile.rows, 0.0);
    std::fill_n(out_.begin(), static_cast<std::size_t>(tile.rows) * dim_v_, Acc{0});
    const int head_kv = head / (args_.heads / args_.heads_kv);
    if (tile.work > 0) {
      cpu::load_rows<Type>(args_.q, tile.row0, tile.rows, head, dim_, q_.data());
      const int m1 = tile.row0 + tile.rows - 1;
      for (int t = tile.lo; t < tile.hi; ++t) {
        const KeyTile& bounds = plan_.key_tiles(view_)[tile.slot0 + t];
        if (tile_skipped(bounds, tile.row0, m1)) continue;
        const int key0 = tile.key0 + t * block_n_;
        const int keys = std::min(block_n_, tile.keys - t * block_n_);
        load_keys(key0, keys, head_kv);
        const bool full = tile_full(bounds, tile.row0, m1);
        for (int r = 0; r < tile.rows; ++r) visit(r, tile.row0 + r, key0, keys, full);
      }
    }
    for (int r = 0; r < tile.rows; ++r) finish(r, tile.row0 + r, head, tile.work < 0);
  }

 private:
  /// k transposed, so that a chunk of keys is a vector; lanes past the last key are zero.
  void load_keys(int key0, int keys, int head) {
    cpu::load_rows<Type>(args_.v, key0, keys, head, dim_v_, v_.data());
    if (keys < block_n_) std::fill(k_transposed_.begin(), k_transposed_.end(), Acc{0});
    const auto* data = static_cast<const Stored*>(args_.k.data);
    for (int n = 0; n < keys; ++n) {
      const Stored* row = data + static_cast<std::int64_t>(key0 + n) * args_.k.token_stride +
                          head * args_.k.head_stride;
      for (int d = 0; d < dim_; ++d) {
        k_transposed_[static_cast<std::size_t>(d) * block_n_ + n] = Type::load(row[d]);
      }
    }
  }

  /// One row over one key tile: online softmax. Keys that the row does not see are never used.
  void visit(int r, int row, int key0, int keys, bool full) {
    Acc highest = -std::numeric_limits<Acc>::infinity();
    bool any = false;
    for (int n0 = 0; n0 < keys; n0 += kChunk) {
      const int count = std::min(kChunk, keys - n0);
      bool chunk_seen = full;
      for (int n = n0; n < n0 + count; ++n) {
        sees_[n] = full || plan_.sees(row, key0 + n);
        chunk_seen |= sees_[n] != 0;
      }
      if (!chunk_seen) continue;
      any = true;
      score_chunk(r, n0);
      for (int n = n0; n < n0 + count; ++n) {
        if (sees_[n]) highest = std::max(highest, scores_[n]);
      }
    }
    if (any) accumulate(r, keys, highest);
  }

  void score_chunk(int r, int n0) {
    Acc sums[kChunk] = {};
    const Acc* q = &q_[static_cast<std::size_t>(r) * dim_];
    const Acc* k = &k_transposed_[n0];
    for (int d = 0; d < dim_; ++d, k += block_n_) {
      for (int n = 0; n < kChunk; ++n) sums[n] += q[d] * k[n];
    }
    const auto scale = static_cast<Acc>(args_.softmax_scale);
    const auto cap = static_cast<Acc>(args_.softcap);
    for (int n = 0; n < kChunk; ++n) {
      const Acc score = sums[n] * scale;
      scores_[n0 + n] = args_.softcap > 0 ? cap * std::tanh(score / cap) : score;
    }
  }

  void accumulate(int r, int keys, Acc highest) {
    const double new_max = std::max(max_[r], static_cast<double>(highest));
    Acc* out = &out_[static_cast<std::size_t>(r) * dim_v_];
    if (new_max > max_[r]) {
      const double shrink = std::exp(max_[r] - new_max);
      sum_[r] *= shrink;
      for (int d = 0; d < dim_v_; ++d) out[d] *= static_cast<Acc>(shrink);
      max_[r] = new_max;
    }
    const auto base = static_cast<Acc>(new_max);
    for (int n = 0; n < keys; ++n) {
      if (!sees_[n]) continue;
      const Acc p = std::exp(scores_[n] - base);
      sum_[r] += static_cast<double>(p);
      const Acc* v = &v_[static_cast<std::size_t>(n) * dim_v_];
      for (int d = 0; d < dim_v_; ++d) out[d] += p * v[d];
    }
  }

  void finish(int r, std::int64_t row, int head, bool invalid) {
    const bool saw_nothing = max_[r] == -kInfinity && sum_[r] == 0;
    auto* to = static_cast<Stored*>(args_.out.data) + row * args_.out.token_stride +
               head * args_.out.head_stride;
    const Acc* out = &out_[static_cast<std::size_t>(r) * dim_v_];
    for (int d = 0; d < dim_v_; ++d) {
      const double mean = saw_nothing ? 0.0 : static_cast<double>(out[d]) / sum_[r];
      to[d] = Type::store(invalid ? kNaN : mean);
    }
    if (args_.lse == nullptr) return;
    const double lse = saw_nothing ? -kInfinity : max_[r] + std::log(sum_[r]);
    args_.lse[static_cast<std::int64_t>(head) * plan_.shape().total_q + row] =
        static_cast<float>(invalid ? kNaN : lse);
  }

  const ForwardArgs& args_;
  const PlanReader& plan_;
  int view_;
  int block_n_;
  int dim_;
  int dim_v_;
  std::vector<Acc> q_, k_transposed_, v_, out_, scores_;
  std::vector<std::uint8_t> sees_;
  std::vector<double> max_, sum_;
};

}  // namespace

void cpu_forward(const ForwardArgs& args, int threads) {
  const PlanReader plan(to_plan_shape(*args.plan), args.plan_buffer);
  cpu::check_built(plan);
  const std::int64_t tasks = static_cast<std::int64_t>(plan.query_tiles(0).size()) * args.heads;
  cpu::with_type(args.dtype, [&]<class Type>(Type) {
    cpu::run_tasks<Worker<Type>>(tasks, threads, [&] { return Worker<Type>(args, plan, 0); });
  });
}

}  // namespace treeattn
