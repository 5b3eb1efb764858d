/// Trees of tokens on the host: building, validating, and lowering to the packed DFS arrays.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace treeattn {

/// One node: its parent (index of an earlier node, -1 for a root) and its number of tokens (>= 0).
struct TreeNode {
  std::int64_t parent = -1;
  std::int64_t length = 0;
};

/// A forest whose nodes are stored in DFS pre-order: the packed sequence is the nodes' tokens in
/// order.
class Tree {
 public:
  /// From nodes in any order in which parents precede children; reordered to DFS pre-order
  /// (children keep their order). Throws Error(kInvalidTree) naming the node.
  static Tree from_nodes(std::span<const TreeNode> nodes);
  /// From the packed arrays of one sequence. Throws Error(kInvalidTree) naming the first bad token.
  static Tree from_arrays(std::span<const std::int32_t> start, std::span<const std::int32_t> end);

  std::span<const TreeNode> nodes() const { return nodes_; }  ///< DFS pre-order
  /// Where each node of from_nodes went: dfs_index()[i] is the DFS index of input node i.
  std::span<const std::int64_t> dfs_index() const { return dfs_index_; }
  std::int64_t tokens() const { return tokens_; }
  std::int64_t leaves() const;
  std::int64_t depth() const;  ///< longest root-to-leaf chain of nodes
  /// Tokens of all root-to-leaf paths written out: what is computed without sharing.
  std::int64_t unshared_tokens() const;
  /// (query, key) pairs that the mask allows.
  std::int64_t visible_pairs() const;

  /// Appends this tree's arrays: DFS index of each token's node, highest DFS index in its subtree.
  void append_arrays(std::vector<std::int32_t>& start, std::vector<std::int32_t>& end) const;
  /// Appends each token's depth in tokens from its root: its position id.
  void append_position_ids(std::vector<std::int32_t>& ids) const;

 private:
  std::vector<TreeNode> nodes_;
  std::vector<std::int64_t> subtree_end_;  ///< highest DFS index in each node's subtree
  std::vector<std::int64_t> dfs_index_;
  std::int64_t tokens_ = 0;
};

/// A batch of token rows merged into a prefix tree, with the maps back.
struct PackedRows {
  Tree tree;
  std::vector<std::int64_t> tokens;         ///< packed token ids, in DFS order
  std::vector<std::int32_t> position_ids;   ///< depth of each packed token
  std::vector<std::int64_t> row_offsets;    ///< [rows + 1] into row_positions
  std::vector<std::int64_t> row_positions;  ///< packed position of every token of every input row
  std::vector<std::int64_t> row_nodes;      ///< [rows] node that each row ends at; empty row: -1
};
/// What rows may share. Where they may not, equal tokens are stored once per row or group of rows.
struct PackOptions {
  /// Prefixes shorter than this are not shared, so that a common first token does not make one tree
  /// of a whole batch. Greater than every row: nothing is shared.
  std::int64_t min_shared = 1;
  /// [rows]: only so many leading tokens of the row may be shared, its prompt's say. Empty: all.
  std::span<const std::int64_t> max_shared = {};
};
/// Builds the prefix tree of the rows: shared prefixes are stored once. Empty rows and duplicates
/// are legal. O(total tokens).
PackedRows pack_rows(std::span<const std::span<const std::int64_t>> rows,
                     const PackOptions& options = {});

}  // namespace treeattn
