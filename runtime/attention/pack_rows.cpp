#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <limits>

#include "treeattn/error.h"
#include "treeattn/tree.h"

namespace treeattn {
namespace {

using Row = std::span<const std::int64_t>;
constexpr std::int32_t kNone = -1;

/// A run of tokens that no row leaves or ends inside of. The tokens stay in the row they came from.
struct TrieNode {
  const std::int64_t* tokens;
  std::int64_t length;
  std::int32_t parent;
  std::int32_t first_child = kNone;
  std::int32_t last_child = kNone;
  std::int32_t previous = kNone;  ///< siblings, in order of first appearance
  std::int32_t next = kNone;
};

/// (parent, first token) -> child, by open addressing; children are replaced but never removed.
class ChildMap {
 public:
  explicit ChildMap(std::size_t most_children) {
    std::size_t slots = 16;
    while (slots < 2 * most_children) slots *= 2;
    slots_.resize(slots, {0, kNone, kNone});
  }

  /// The child's slot value, kNone if there is none yet; the caller may assign to it.
  std::int32_t& find(std::int32_t parent, std::int64_t token) {
    std::size_t at = hash(parent, token) & (slots_.size() - 1);
    while (slots_[at].child != kNone &&
           (slots_[at].parent != parent || slots_[at].token != token)) {
      at = (at + 1) & (slots_.size() - 1);
    }
    slots_[at].parent = parent;
    slots_[at].token = token;
    return slots_[at].child;
  }

 private:
  struct Slot {
    std::int64_t token;
    std::int32_t parent;
    std::int32_t child;
  };

  static std::size_t hash(std::int32_t parent, std::int64_t token) {
    std::uint64_t z = static_cast<std::uint64_t>(token) * 0x9e3779b97f4a7c15u;
    z ^= (static_cast<std::uint64_t>(static_cast<std::uint32_t>(parent)) + 1) * 0xd1b54a32d192ed03u;
    z = (z ^ (z >> 32)) * 0xbf58476d1ce4e5b9u;
    return static_cast<std::size_t>(z ^ (z >> 29));
  }

  std::vector<Slot> slots_;
};

class Trie {
 public:
  /// A row adds at most a leaf, and splits a node where it leaves it or ends.
  explicit Trie(std::span<const Row> rows) : children_(2 * rows.size()) {
    nodes_.reserve(2 * rows.size() + 1);
    ends_.reserve(rows.size());
    nodes_.push_back({nullptr, 0, kNone});
    for (const Row& row : rows) insert(row);
  }

  PackedRows pack(std::span<const Row> rows) const {
    PackedRows packed;
    std::vector<std::int64_t> position(nodes_.size());
    packed.tree = lay_out(packed, position);
    packed.tree.append_position_ids(packed.position_ids);
    packed.row_offsets.assign(1, 0);
    packed.row_offsets.reserve(rows.size() + 1);
    for (const Row& row : rows) {
      packed.row_offsets.push_back(packed.row_offsets.back() +
                                   static_cast<std::int64_t>(row.size()));
    }
    packed.row_positions.resize(static_cast<std::size_t>(packed.row_offsets.back()));
    for (std::size_t r = 0; r < rows.size(); ++r) {
      std::int64_t at = packed.row_offsets[r + 1];
      for (std::int32_t id = ends_[r]; id != 0; id = nodes_[id].parent) {
        at -= nodes_[id].length;
        for (std::int64_t t = 0; t < nodes_[id].length; ++t) {
          packed.row_positions[at + t] = position[id] + t;
        }
      }
    }
    return packed;
  }

 private:
  void insert(const Row& row) {
    std::int32_t parent = 0;
    std::size_t at = 0;
    while (at < row.size()) {
      std::int32_t& child = children_.find(parent, row[at]);
      if (child == kNone) {
        child = add_leaf(parent, row.data() + at, static_cast<std::int64_t>(row.size() - at));
        parent = child;
        break;
      }
      const std::int64_t* mine = row.data() + at;
      const std::int64_t most =
          std::min(nodes_[child].length, static_cast<std::int64_t>(row.size() - at));
      const std::int64_t shared =
          std::mismatch(mine, mine + most, nodes_[child].tokens).first - mine;
      if (shared < nodes_[child].length) child = split(child, shared);
      parent = child;
      at += static_cast<std::size_t>(shared);
    }
    ends_.push_back(parent);
  }

  std::int32_t add_leaf(std::int32_t parent, const std::int64_t* tokens, std::int64_t length) {
    const auto id = static_cast<std::int32_t>(nodes_.size());
    TrieNode leaf{tokens, length, parent};
    leaf.previous = nodes_[parent].last_child;
    (leaf.previous == kNone ? nodes_[parent].first_child : nodes_[leaf.previous].next) = id;
    nodes_[parent].last_child = id;
    nodes_.push_back(leaf);
    return id;
  }

  /// Puts a new node with the first `length` tokens above `tail`, which keeps its identity,
  /// children and row ends. Returns the new node.
  std::int32_t split(std::int32_t tail, std::int64_t length) {
    const auto id = static_cast<std::int32_t>(nodes_.size());
    TrieNode head = nodes_[tail];
    head.length = length;
    head.first_child = head.last_child = tail;
    (head.previous == kNone ? nodes_[head.parent].first_child : nodes_[head.previous].next) = id;
    (head.next == kNone ? nodes_[head.parent].last_child : nodes_[head.next].previous) = id;
    TrieNode& rest = nodes_[tail];
    rest.tokens += length;
    rest.length -= length;
    rest.parent = id;
    rest.previous = rest.next = kNone;
    children_.find(id, rest.tokens[0]) = tail;
    nodes_.push_back(head);
    return id;
  }

  /// Walks the trie in DFS pre-order: packs the tokens and notes where each node's begin.
  Tree lay_out(PackedRows& packed, std::vector<std::int64_t>& position) const {
    std::vector<TreeNode> nodes;
    std::vector<std::int32_t> dfs_index(nodes_.size(), kNone);
    nodes.reserve(nodes_.size() - 1);
    std::size_t total = 0;
    for (const TrieNode& node : nodes_) total += static_cast<std::size_t>(node.length);
    packed.tokens.reserve(total);
    for (std::int32_t id = nodes_[0].first_child; id > 0; id = after(id)) {
      const TrieNode& node = nodes_[id];
      dfs_index[id] = static_cast<std::int32_t>(nodes.size());
      position[id] = static_cast<std::int64_t>(packed.tokens.size());
      nodes.push_back({dfs_index[node.parent], node.length});
      packed.tokens.insert(packed.tokens.end(), node.tokens, node.tokens + node.length);
    }
    return Tree::from_nodes(nodes);
  }

  /// The node after `id` in DFS pre-order, 0 at the end.
  std::int32_t after(std::int32_t id) const {
    if (nodes_[id].first_child != kNone) return nodes_[id].first_child;
    while (id != 0 && nodes_[id].next == kNone) id = nodes_[id].parent;
    return id == 0 ? 0 : nodes_[id].next;
  }

  std::vector<TrieNode> nodes_;  ///< [0] is the empty root above the forest
  std::vector<std::int32_t> ends_;
  ChildMap children_;
};

}  // namespace

PackedRows pack_rows(std::span<const Row> rows) {
  constexpr std::size_t kMostRows = std::numeric_limits<std::int32_t>::max() / 2 - 1;
  if (rows.size() > kMostRows) {
    throw Error(ErrorCode::kInvalidTree,
                fmt::format("{} rows, at most {} can be packed together", rows.size(), kMostRows));
  }
  return Trie(rows).pack(rows);
}

}  // namespace treeattn
