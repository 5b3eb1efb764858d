// Random forward problems that cover the composition which the semantics ask for. The same seed and
// options give the same problem on every machine. Plain data; copy and change freely.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "runtime/attention/splitmix.h"
#include "templates/shared/plan.h"
#include "tests/support/oracle.h"
#include "treeattn/treeattn.h"

namespace treeattn::testing {

/// A strided [tokens, heads, dim] tensor in host memory. Bytes between the vectors hold NaN.
class HostTensor {
 public:
  HostTensor() = default;
  /// Strides in elements; those of dimensions of size 1 are kept for the views but not used.
  HostTensor(DType dtype, std::int64_t tokens, int heads, int dim, std::int64_t token_stride,
             std::int64_t head_stride);
  /// Contiguous.
  HostTensor(DType dtype, std::int64_t tokens, int heads, int dim);

  double get(std::int64_t token, int head, int d) const;
  void set(std::int64_t token, int head, int d, double value);  ///< rounded to the dtype
  void fill(double value);                 ///< everything, the bytes between the vectors too
  std::vector<double> to_doubles() const;  ///< contiguous

  ConstTensor const_view() const { return {data(), token_stride_, head_stride_}; }
  Tensor view() { return {empty() ? nullptr : bytes_.data(), token_stride_, head_stride_}; }
  /// For uploads: all bytes, strides included. Null when there is no token.
  const void* data() const { return empty() ? nullptr : bytes_.data(); }
  void* data() { return empty() ? nullptr : bytes_.data(); }
  std::size_t size_bytes() const { return bytes_.size(); }
  bool empty() const { return bytes_.empty(); }

  DType dtype() const { return dtype_; }
  std::int64_t tokens() const { return tokens_; }
  int heads() const { return heads_; }
  int dim() const { return dim_; }
  std::int64_t token_stride() const { return token_stride_; }
  std::int64_t head_stride() const { return head_stride_; }

 private:
  std::size_t index(std::int64_t token, int head, int d) const {
    return static_cast<std::size_t>((tokens_ > 1 ? token * token_stride_ : 0) +
                                    (heads_ > 1 ? head * head_stride_ : 0) + d);
  }
  double load(std::size_t index) const;
  void store(std::size_t index, double value);

  DType dtype_ = DType::kF32;
  std::int64_t tokens_ = 0;
  int heads_ = 0;
  int dim_ = 0;
  std::int64_t token_stride_ = 0;
  std::int64_t head_stride_ = 0;
  std::vector<std::byte> bytes_;
};

struct RandomCaseOptions {
  /// f16 or bf16, head dims multiples of 8 from 16 to 256, strides multiples of 16 bytes. Without:
  /// any dtype, any head dim from 1 to 160, any stride.
  bool gpu_limits = true;
  double long_share = 1.0 / 3;  ///< share of cases above 2,000 tokens
  int most_short_tokens = 700;
  int most_long_tokens = 4500;
  int most_heads = 8;
  bool numbers = true;  ///< false: q, k and v stay NaN, for who only looks at shapes
  std::optional<DType> dtype;
  std::optional<int> head_dim;
  std::optional<int> head_dim_v;
  std::optional<Lowering> lowering;
  std::optional<bool> softcap;
};

/// Tokens past cu_seqlens[batch] hold NaN, as do the gaps that strides leave.
struct RandomCase {
  std::uint64_t seed = 0;
  DType dtype = DType::kF32;
  Lowering lowering = Lowering::kTree;
  int heads = 1;
  int heads_kv = 1;
  int head_dim = 1;
  int head_dim_v = 1;
  double softmax_scale = 1;
  double softcap = 0;
  int total_q = 0;
  int total_k = 0;
  std::vector<int> cu_q{0};
  std::vector<int> cu_k{0};
  std::vector<int> start, end;  ///< kTree
  std::vector<int> first, len;  ///< kIntervals
  HostTensor q, k, v;
  HostTensor out;  ///< allocated with its strides, filled with NaN

  int batch() const { return static_cast<int>(cu_q.size()) - 1; }
  OracleCase oracle() const;
  PlanInputs plan_inputs() const;  ///< host pointers into this object
  PlanShape plan_shape(std::span<const PlanView> views) const;
  /// Host pointers into this object; plan, lse and workspace are left to the caller.
  ForwardArgs forward_args();
  /// Everything needed to see what kind of case it is; begins with the seed.
  std::string describe() const;
};

RandomCase random_case(std::uint64_t seed, const RandomCaseOptions& options = {});

/// q = 0: every visible key weighs the same, so exp(lse) is the number of visible keys.
void apply_count_probe(RandomCase& problem);
/// q = 0 and v = bits of the key's packed index: out tells which keys were seen.
void apply_bits_probe(RandomCase& problem);

/// start and end of a random forest of `tokens` tokens: chains, stars, one-token nodes, deep and
/// bushy trees, forests, nodes without tokens.
void random_forest(SplitMix64& rng, int tokens, std::vector<int>& start, std::vector<int>& end);

}  // namespace treeattn::testing
