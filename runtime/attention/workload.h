// The workload grammar that bench, check, the tests and `tree show` share:
//   chain:N | fork:P,RxL | binary:D,S | comb:P,T,K,L | random:SEED,N,MAX | K*SPEC | file:PATH
// Throws Error(kInvalidArgument) that names the bad part; kIoError or kInvalidTree for files.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "treeattn/tree.h"

namespace treeattn {

/// Trees packed as kernels want them: q and k are the same tokens.
struct PackedTrees {
  std::vector<std::int32_t> cu_seqlens;  ///< [trees + 1]
  std::vector<std::int32_t> start;       ///< tree_dfs_order_start_q
  std::vector<std::int32_t> end;         ///< tree_dfs_order_end_k
  std::vector<std::int32_t> position_ids;
};

struct Workload {
  std::string name;  ///< canonical spec: parsing it gives the same workload
  std::vector<Tree> trees;

  std::int64_t tokens() const;
  std::int64_t unshared_tokens() const;
  std::int64_t visible_pairs() const;
  PackedTrees pack() const;
};

Workload parse_workload(std::string_view spec);

/// The grammar, one spec a line, for help texts and error hints.
std::string_view workload_grammar();

}  // namespace treeattn
