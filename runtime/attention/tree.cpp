#include "treeattn/tree.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <limits>

#include "treeattn/error.h"

namespace treeattn {
namespace {

constexpr std::int64_t kInt32Max = std::numeric_limits<std::int32_t>::max();
/// from_arrays makes a node for every DFS index without tokens; numbers beyond this are a mistake.
constexpr std::int64_t kMaxEmptyNodes = 1 << 20;

[[noreturn]] void fail(const std::string& message, const std::string& hint = {}) {
  throw Error(ErrorCode::kInvalidTree, message, hint);
}

/// Rebuilds nodes, in DFS pre-order, from the arrays of one sequence.
class ArrayParser {
 public:
  ArrayParser(std::span<const std::int32_t> start, std::span<const std::int32_t> end)
      : start_(start),
        end_(end),
        index_limit_(
            std::min(static_cast<std::int64_t>(start.size()) + kMaxEmptyNodes, kInt32Max)) {}

  std::vector<TreeNode> parse() {
    for (std::size_t i = 0; i < start_.size(); ++i) {
      check_token(i);
      if (i > 0 && start_[i] == start_[i - 1]) {
        ++nodes_.back().length;
      } else {
        open_node(i);
      }
    }
    if (!open_.empty()) {
      const std::int64_t last = open_.front().end;
      while (next() <= last) add_node(0);
    }
    return std::move(nodes_);
  }

 private:
  struct Open {
    std::int64_t index;
    std::int64_t end;
  };

  std::int64_t next() const { return static_cast<std::int64_t>(nodes_.size()); }

  void check_token(std::size_t i) const {
    const std::int64_t s = start_[i];
    const std::int64_t e = end_[i];
    if (s < 0) fail(fmt::format("token {}: start is {}, expected a DFS index >= 0", i, s));
    if (i > 0 && s < start_[i - 1]) {
      fail(fmt::format("token {}: start decreases from {} to {}", i, start_[i - 1], s),
           "tokens must be packed in DFS pre-order of their nodes");
    }
    if (e < s) {
      fail(fmt::format("token {}: end is {}, below its node's own DFS index {}", i, e, s),
           "end is the highest DFS index in the subtree of the token's node");
    }
    if (i > 0 && s == start_[i - 1] && e != end_[i - 1]) {
      fail(fmt::format("token {}: end is {}, but {} at the previous token of the same node {}", i,
                       e, end_[i - 1], s));
    }
    if (e >= index_limit_) {
      fail(fmt::format("token {}: names DFS index {}, but the sequence has only {} tokens", i, e,
                       start_.size()),
           "number the nodes of each sequence from 0 without gaps");
    }
  }

  void open_node(std::size_t i) {
    while (next() < start_[i]) add_node(0);
    close_before(next());
    if (!open_.empty() && end_[i] > open_.back().end) {
      fail(fmt::format(
          "token {}: subtree of node {} ends at {}, outside the subtree [{}, {}] it is in", i,
          start_[i], end_[i], open_.back().index, open_.back().end));
    }
    const std::int64_t index = next();
    add_node(1);
    open_.push_back({index, end_[i]});
  }

  void close_before(std::int64_t index) {
    // The outermost stays until another root opens: its end says how many nodes follow.
    while (!open_.empty() && open_.back().end < index) open_.pop_back();
  }

  void add_node(std::int64_t length) {
    close_before(next());
    nodes_.push_back({open_.empty() ? -1 : open_.back().index, length});
  }

  std::span<const std::int32_t> start_;
  std::span<const std::int32_t> end_;
  std::int64_t index_limit_;
  std::vector<TreeNode> nodes_;
  std::vector<Open> open_;
};

}  // namespace

Tree Tree::from_nodes(std::span<const TreeNode> nodes) {
  const std::size_t count = nodes.size();
  if (static_cast<std::int64_t>(count) > kInt32Max) {
    fail(fmt::format("{} nodes, at most {} fit", count, kInt32Max));
  }
  Tree tree;
  std::vector<std::int64_t> subtree_nodes(count, 1);
  for (std::size_t i = 0; i < count; ++i) {
    const TreeNode& node = nodes[i];
    if (node.parent < -1 || node.parent >= static_cast<std::int64_t>(i)) {
      fail(fmt::format("node {}: parent is {}, expected an earlier node or -1 for a root", i,
                       node.parent),
           "list parents before their children");
    }
    if (node.length < 0) fail(fmt::format("node {}: length is {}, expected >= 0", i, node.length));
    if (node.length > kInt32Max - tree.tokens_) {
      fail(fmt::format("node {}: length {} brings the tree to more than {} tokens", i, node.length,
                       kInt32Max));
    }
    tree.tokens_ += node.length;
  }
  for (std::size_t i = count; i-- > 0;) {
    if (nodes[i].parent >= 0) subtree_nodes[nodes[i].parent] += subtree_nodes[i];
  }
  tree.nodes_.resize(count);
  tree.subtree_end_.resize(count);
  tree.dfs_index_.resize(count);
  std::vector<std::int64_t> next_child(count);
  std::int64_t next_root = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const std::int64_t parent = nodes[i].parent;
    std::int64_t& next = parent < 0 ? next_root : next_child[parent];
    const std::int64_t index = next;
    next += subtree_nodes[i];
    next_child[i] = index + 1;
    tree.dfs_index_[i] = index;
    tree.nodes_[index] = {parent < 0 ? -1 : tree.dfs_index_[parent], nodes[i].length};
    tree.subtree_end_[index] = index + subtree_nodes[i] - 1;
  }
  return tree;
}

Tree Tree::from_arrays(std::span<const std::int32_t> start, std::span<const std::int32_t> end) {
  if (start.size() != end.size()) {
    fail(fmt::format("start has {} tokens and end {}, expected the same number", start.size(),
                     end.size()));
  }
  return from_nodes(ArrayParser(start, end).parse());
}

std::int64_t Tree::leaves() const {
  std::int64_t count = 0;
  for (std::size_t i = 0; i < nodes_.size(); ++i) {
    count += subtree_end_[i] == static_cast<std::int64_t>(i);
  }
  return count;
}

std::int64_t Tree::depth() const {
  std::vector<std::int64_t> depth(nodes_.size());
  std::int64_t deepest = 0;
  for (std::size_t i = 0; i < nodes_.size(); ++i) {
    depth[i] = 1 + (nodes_[i].parent < 0 ? 0 : depth[nodes_[i].parent]);
    deepest = std::max(deepest, depth[i]);
  }
  return deepest;
}

std::int64_t Tree::unshared_tokens() const {
  std::vector<std::int64_t> path(nodes_.size());
  std::int64_t sum = 0;
  for (std::size_t i = 0; i < nodes_.size(); ++i) {
    path[i] = nodes_[i].length + (nodes_[i].parent < 0 ? 0 : path[nodes_[i].parent]);
    if (subtree_end_[i] == static_cast<std::int64_t>(i)) sum += path[i];
  }
  return sum;
}

std::int64_t Tree::visible_pairs() const {
  std::vector<std::int64_t> path(nodes_.size());
  std::int64_t pairs = 0;
  for (std::size_t i = 0; i < nodes_.size(); ++i) {
    const std::int64_t above = nodes_[i].parent < 0 ? 0 : path[nodes_[i].parent];
    const std::int64_t length = nodes_[i].length;
    path[i] = above + length;
    pairs += length * above + length * (length + 1) / 2;
  }
  return pairs;
}

void Tree::append_arrays(std::vector<std::int32_t>& start, std::vector<std::int32_t>& end) const {
  start.reserve(start.size() + static_cast<std::size_t>(tokens_));
  end.reserve(end.size() + static_cast<std::size_t>(tokens_));
  for (std::size_t i = 0; i < nodes_.size(); ++i) {
    const auto length = static_cast<std::size_t>(nodes_[i].length);
    start.insert(start.end(), length, static_cast<std::int32_t>(i));
    end.insert(end.end(), length, static_cast<std::int32_t>(subtree_end_[i]));
  }
}

void Tree::append_position_ids(std::vector<std::int32_t>& ids) const {
  ids.reserve(ids.size() + static_cast<std::size_t>(tokens_));
  std::vector<std::int64_t> path(nodes_.size());
  for (std::size_t i = 0; i < nodes_.size(); ++i) {
    const std::int64_t above = nodes_[i].parent < 0 ? 0 : path[nodes_[i].parent];
    path[i] = above + nodes_[i].length;
    for (std::int64_t t = above; t < path[i]; ++t) ids.push_back(static_cast<std::int32_t>(t));
  }
}

}  // namespace treeattn
