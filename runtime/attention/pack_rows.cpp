#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <limits>
#include <string_view>
#include <unordered_map>

#include "treeattn/error.h"
#include "treeattn/tree.h"

namespace treeattn {
namespace {

using Row = std::span<const std::int64_t>;
constexpr std::int32_t kNone = -1;

/// A run of tokens that no row leaves or ends inside of. The tokens stay in the row they came from.
/// A node without tokens is the root of a group of rows; it is not part of the forest.
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
/// What a row may not share is in no map, so no other row finds it.
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

/// The root of each row's group: rows whose first `min_shared` tokens, all of them shareable, are
/// equal share a root.
class Groups {
 public:
  explicit Groups(std::int64_t min_shared) : bytes_(0) {
    constexpr std::int64_t kToken = sizeof(std::int64_t);
    constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max() / kToken;
    bytes_ = static_cast<std::size_t>(std::min(min_shared, kMost) * kToken);
  }

  /// The value for the shareable part of a row, kNone if there is none yet; null if it is too
  /// short to be shared.
  std::int32_t* find(const Row& shareable) {
    if (shareable.size_bytes() < bytes_) return nullptr;
    const std::string_view key(reinterpret_cast<const char*>(shareable.data()), bytes_);
    return &roots_.try_emplace(key, kNone).first->second;
  }

 private:
  std::size_t bytes_;
  std::unordered_map<std::string_view, std::int32_t> roots_;
};

class Trie {
 public:
  /// A row adds at most a root, a shared and an unshared leaf, and splits a node where it leaves it
  /// or ends.
  Trie(std::span<const Row> rows, const PackOptions& options) : children_(2 * rows.size()) {
    nodes_.reserve(2 * rows.size() + 1);
    ends_.reserve(rows.size());
    nodes_.push_back({nullptr, 0, kNone});
    Groups groups(options.min_shared);
    for (std::size_t r = 0; r < rows.size(); ++r) {
      const std::size_t most =
          options.max_shared.empty()
              ? rows[r].size()
              : std::min(rows[r].size(), static_cast<std::size_t>(options.max_shared[r]));
      Row shareable = rows[r].first(most);
      std::int32_t end = 0;
      if (options.min_shared > 1 && !rows[r].empty()) {
        std::int32_t* root = groups.find(shareable);
        if (root == nullptr) shareable = {};
        if (root != nullptr && *root == kNone) *root = add_leaf(0, nullptr, 0);
        if (root != nullptr) end = *root;
      }
      end = insert(end, shareable);
      const Row rest = rows[r].subspan(shareable.size());
      if (!rest.empty()) end = add_leaf(end, rest.data(), static_cast<std::int64_t>(rest.size()));
      ends_.push_back(end);
    }
  }

  PackedRows pack(std::span<const Row> rows) const {
    PackedRows packed;
    std::vector<std::int64_t> position(nodes_.size());
    std::vector<std::int32_t> dfs_index(nodes_.size(), kNone);
    packed.tree = lay_out(packed, position, dfs_index);
    packed.tree.append_position_ids(packed.position_ids);
    packed.row_offsets.assign(1, 0);
    packed.row_offsets.reserve(rows.size() + 1);
    for (const Row& row : rows) {
      packed.row_offsets.push_back(packed.row_offsets.back() +
                                   static_cast<std::int64_t>(row.size()));
    }
    packed.row_positions.resize(static_cast<std::size_t>(packed.row_offsets.back()));
    packed.row_nodes.reserve(rows.size());
    for (std::size_t r = 0; r < rows.size(); ++r) {
      packed.row_nodes.push_back(dfs_index[ends_[r]]);
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
  /// The node below `parent` that the row ends at.
  std::int32_t insert(std::int32_t parent, const Row& row) {
    std::size_t at = 0;
    while (at < row.size()) {
      std::int32_t& child = children_.find(parent, row[at]);
      if (child == kNone) {
        child = add_leaf(parent, row.data() + at, static_cast<std::int64_t>(row.size() - at));
        return child;
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
    return parent;
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
  Tree lay_out(PackedRows& packed, std::vector<std::int64_t>& position,
               std::vector<std::int32_t>& dfs_index) const {
    std::vector<TreeNode> nodes;
    nodes.reserve(nodes_.size() - 1);
    std::size_t total = 0;
    for (const TrieNode& node : nodes_) total += static_cast<std::size_t>(node.length);
    packed.tokens.reserve(total);
    for (std::int32_t id = nodes_[0].first_child; id > 0; id = after(id)) {
      const TrieNode& node = nodes_[id];
      if (node.length == 0) continue;
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

PackedRows pack_rows(std::span<const Row> rows, const PackOptions& options) {
  constexpr std::size_t kMostRows = std::numeric_limits<std::int32_t>::max() / 4 - 1;
  if (rows.size() > kMostRows) {
    throw Error(ErrorCode::kInvalidTree,
                fmt::format("{} rows, at most {} can be packed together", rows.size(), kMostRows));
  }
  if (options.min_shared < 1) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("min_shared is {}, expected at least 1", options.min_shared),
                "1 shares every common prefix");
  }
  if (!options.max_shared.empty() && options.max_shared.size() != rows.size()) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("max_shared has {} elements, expected one per row: {}",
                            options.max_shared.size(), rows.size()));
  }
  for (std::size_t r = 0; r < options.max_shared.size(); ++r) {
    if (options.max_shared[r] < 0) {
      throw Error(
          ErrorCode::kInvalidArgument,
          fmt::format("max_shared[{}] is {}, expected at least 0", r, options.max_shared[r]));
    }
  }
  return Trie(rows, options).pack(rows);
}

}  // namespace treeattn
