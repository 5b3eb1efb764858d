#include "runtime/attention/cpu_backward.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include "runtime/attention/arguments.h"
#include "runtime/attention/cpu_executor.h"
#include "runtime/attention/plan.h"

namespace treeattn {
namespace {

/// What both passes need of one (row, head): lse and delta = rowsum(dout out) - dlse.
template <class Acc>
struct RowStats {
  std::vector<Acc> lse, delta;  ///< [heads, total_q]; lse = +inf where a row sees nothing
};

/// Scratch and the element-wise formulas of both passes.
template <class Type>
class Backward {
 public:
  using Stored = typename Type::Stored;
  using Acc = typename Type::Acc;

  Backward(const BackwardArgs& args, const PlanReader& plan, const RowStats<Acc>& stats)
      : args_(args),
        plan_(plan),
        stats_(stats),
        dim_(args.head_dim),
        dim_v_(value_head_dim(args.head_dim, args.head_dim_v)),
        heads_per_kv_(args.heads / args.heads_kv) {}

 protected:
  const Stored* row(const ConstTensor& t, std::int64_t token, int head) const {
    return static_cast<const Stored*>(t.data) + token * t.token_stride + head * t.head_stride;
  }
  static Acc dot(const Stored* a, const Acc* b, int dim) {
    Acc sum = 0;
    for (int d = 0; d < dim; ++d) sum += Type::load(a[d]) * b[d];
    return sum;
  }
  /// P and dS of one pair, where dS is the gradient of softmax_scale * q.k before the scale.
  struct Pair {
    Acc p, ds;
  };
  Pair pair(int i, int head, Acc qk, Acc dp) const {
    const std::size_t at = static_cast<std::size_t>(head) * plan_.shape().total_q + i;
    Acc score = qk * static_cast<Acc>(args_.softmax_scale);
    Acc slope = 1;
    if (args_.softcap > 0) {
      const Acc t = std::tanh(score / static_cast<Acc>(args_.softcap));
      score = static_cast<Acc>(args_.softcap) * t;
      slope = 1 - t * t;
    }
    const Acc p = std::exp(score - stats_.lse[at]);
    return {p, p * (dp - stats_.delta[at]) * slope};
  }
  void store(const Tensor& to, std::int64_t token, int head, const Acc* values, int dim,
             double scale, bool invalid) const {
    auto* out = static_cast<Stored*>(to.data) + token * to.token_stride + head * to.head_stride;
    for (int d = 0; d < dim; ++d) {
      out[d] = Type::store(invalid ? std::numeric_limits<double>::quiet_NaN()
                                   : static_cast<double>(values[d]) * scale);
    }
  }

  const BackwardArgs& args_;
  const PlanReader& plan_;
  const RowStats<Acc>& stats_;
  int dim_;
  int dim_v_;
  int heads_per_kv_;
};

/// dk and dv of one (key tile, kv head): its keys' rows, for every query head.
template <class Type>
class KeyWorker : Backward<Type> {
  using Base = Backward<Type>;
  using Base::args_, Base::plan_, Base::dim_, Base::dim_v_;

 public:
  using Acc = typename Type::Acc;

  KeyWorker(const BackwardArgs& args, const PlanReader& plan, const RowStats<Acc>& stats)
      : Base(args, plan, stats), k_(dim_), v_(dim_v_), dk_(dim_), dv_(dim_v_) {}

  void run(std::int64_t task) {
    const KeyOrder& tile = plan_.key_order(0)[static_cast<std::size_t>(task / args_.heads_kv)];
    const auto head_kv = static_cast<int>(task % args_.heads_kv);
    const bool invalid =
        tile.sequence < plan_.shape().batch && plan_.seq_fault()[tile.sequence] != 0;
    for (int j = tile.key0; j < tile.key0 + tile.keys; ++j) {
      std::fill(dk_.begin(), dk_.end(), Acc{0});
      std::fill(dv_.begin(), dv_.end(), Acc{0});
      if (!invalid) accumulate(j, head_kv);
      Base::store(args_.dk, j, head_kv, dk_.data(), dim_, args_.softmax_scale, invalid);
      Base::store(args_.dv, j, head_kv, dv_.data(), dim_v_, 1, invalid);
    }
  }

 private:
  void accumulate(int j, int head_kv) {
    cpu::load_rows<Type>(args_.k, j, 1, head_kv, dim_, k_.data());
    cpu::load_rows<Type>(args_.v, j, 1, head_kv, dim_v_, v_.data());
    const int first = plan_.first()[j];
    const int end = first + plan_.len()[j];
    for (int h = 0; h < this->heads_per_kv_; ++h) {
      const int head = head_kv * this->heads_per_kv_ + h;
      for (int i = first; i < end; ++i) {
        const auto* q = Base::row(args_.q, i, head);
        const auto* dout = Base::row(args_.dout, i, head);
        const auto [p, ds] =
            Base::pair(i, head, Base::dot(q, k_.data(), dim_), Base::dot(dout, v_.data(), dim_v_));
        for (int d = 0; d < dim_; ++d) dk_[d] += ds * Type::load(q[d]);
        for (int d = 0; d < dim_v_; ++d) dv_[d] += p * Type::load(dout[d]);
      }
    }
  }

  std::vector<Acc> k_, v_, dk_, dv_;
};

/// dq of one (query tile, head).
template <class Type>
class QueryWorker : Backward<Type> {
  using Base = Backward<Type>;
  using Base::args_, Base::plan_, Base::dim_, Base::dim_v_;

 public:
  using Acc = typename Type::Acc;

  QueryWorker(const BackwardArgs& args, const PlanReader& plan, const RowStats<Acc>& stats)
      : Base(args, plan, stats),
        rows_(plan.shape().views[0].block_m),
        block_n_(plan.shape().views[0].block_n),
        q_(static_cast<std::size_t>(rows_) * dim_),
        dout_(static_cast<std::size_t>(rows_) * dim_v_),
        dq_(static_cast<std::size_t>(rows_) * dim_) {}

  void run(std::int64_t task) {
    const QueryTile& tile = plan_.query_tiles(0)[static_cast<std::size_t>(task / args_.heads)];
    const auto head = static_cast<int>(task % args_.heads);
    std::fill(dq_.begin(), dq_.end(), Acc{0});
    if (tile.work > 0) {
      cpu::load_rows<Type>(args_.q, tile.row0, tile.rows, head, dim_, q_.data());
      cpu::load_rows<Type>(args_.dout, tile.row0, tile.rows, head, dim_v_, dout_.data());
      for (int t = tile.lo; t < tile.hi; ++t) {
        const KeyTile& bounds = plan_.key_tiles(0)[tile.slot0 + t];
        if (tile_skipped(bounds, tile.row0, tile.row0 + tile.rows - 1)) continue;
        const int key0 = tile.key0 + t * block_n_;
        const int keys = std::min(block_n_, tile.keys - t * block_n_);
        for (int j = key0; j < key0 + keys; ++j) accumulate(tile, j, head);
      }
    }
    for (int r = 0; r < tile.rows; ++r) {
      Base::store(args_.dq, tile.row0 + r, head, &dq_[static_cast<std::size_t>(r) * dim_], dim_,
                  args_.softmax_scale, tile.work < 0);
    }
  }

 private:
  void accumulate(const QueryTile& tile, int j, int head) {
    const int head_kv = head / this->heads_per_kv_;
    const auto* k = Base::row(args_.k, j, head_kv);
    const auto* v = Base::row(args_.v, j, head_kv);
    for (int r = 0; r < tile.rows; ++r) {
      const int i = tile.row0 + r;
      if (!plan_.sees(i, j)) continue;
      const Acc ds =
          Base::pair(i, head, Base::dot(k, &q_[static_cast<std::size_t>(r) * dim_], dim_),
                     Base::dot(v, &dout_[static_cast<std::size_t>(r) * dim_v_], dim_v_))
              .ds;
      Acc* dq = &dq_[static_cast<std::size_t>(r) * dim_];
      for (int d = 0; d < dim_; ++d) dq[d] += ds * Type::load(k[d]);
    }
  }

  int rows_;
  int block_n_;
  std::vector<Acc> q_, dout_, dq_;
};

template <class Type>
RowStats<typename Type::Acc> row_stats(const BackwardArgs& args, int total_q) {
  using Acc = typename Type::Acc;
  const int dim_v = value_head_dim(args.head_dim, args.head_dim_v);
  const std::size_t count = static_cast<std::size_t>(args.heads) * total_q;
  RowStats<Acc> stats{std::vector<Acc>(count), std::vector<Acc>(count)};
  std::vector<Acc> out(dim_v), dout(dim_v);
  for (int head = 0; head < args.heads; ++head) {
    for (int i = 0; i < total_q; ++i) {
      const std::size_t at = static_cast<std::size_t>(head) * total_q + i;
      if (args.lse[at] == -std::numeric_limits<float>::infinity()) {
        stats.lse[at] = std::numeric_limits<Acc>::infinity();
        continue;
      }
      cpu::load_rows<Type>(args.out, i, 1, head, dim_v, out.data());
      cpu::load_rows<Type>(args.dout, i, 1, head, dim_v, dout.data());
      Acc sum = args.dlse == nullptr ? Acc{0} : -static_cast<Acc>(args.dlse[at]);
      for (int d = 0; d < dim_v; ++d) sum += out[d] * dout[d];
      stats.lse[at] = static_cast<Acc>(args.lse[at]);
      stats.delta[at] = sum;
    }
  }
  return stats;
}

}  // namespace

void cpu_backward(const BackwardArgs& args, int threads) {
  const PlanReader plan(to_plan_shape(*args.plan), args.plan_buffer);
  cpu::check_built(plan);
  cpu::with_type(args.dtype, [&]<class Type>(Type) {
    const auto stats = row_stats<Type>(args, plan.shape().total_q);
    cpu::run_tasks<KeyWorker<Type>>(
        static_cast<std::int64_t>(plan.key_order(0).size()) * args.heads_kv, threads,
        [&] { return KeyWorker<Type>(args, plan, stats); });
    cpu::run_tasks<QueryWorker<Type>>(
        static_cast<std::int64_t>(plan.query_tiles(0).size()) * args.heads, threads,
        [&] { return QueryWorker<Type>(args, plan, stats); });
  });
}

}  // namespace treeattn
