#include "treeattn/tree.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>

#include "runtime/attention/splitmix.h"
#include "tests/support/random_case.h"
#include "treeattn/error.h"

namespace treeattn {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using Nodes = std::vector<TreeNode>;
using Ints = std::vector<std::int32_t>;

std::string error_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kInvalidTree);
    return error.what();
  }
  return "no error";
}

std::string array_error(const Ints& start, const Ints& end) {
  return error_of([&] { Tree::from_arrays(start, end); });
}

TEST(Tree, PromptWithThreeResponsesLowersAsDocumented) {
  const Tree tree = Tree::from_nodes(Nodes{{-1, 2}, {0, 1}, {0, 2}, {0, 1}});
  Ints start, end, ids;
  tree.append_arrays(start, end);
  tree.append_position_ids(ids);
  EXPECT_THAT(start, ElementsAre(0, 0, 1, 2, 2, 3));
  EXPECT_THAT(end, ElementsAre(3, 3, 1, 2, 2, 3));
  EXPECT_THAT(ids, ElementsAre(0, 1, 2, 2, 3, 2));
  EXPECT_EQ(tree.tokens(), 6);
  EXPECT_EQ(tree.leaves(), 3);
  EXPECT_EQ(tree.depth(), 2);
  EXPECT_EQ(tree.unshared_tokens(), 3 + 4 + 3);
  EXPECT_EQ(tree.visible_pairs(), 3 + 3 + (3 + 4) + 3);
}

TEST(Tree, NodesMoveToDfsOrderAndChildrenKeepTheirs) {
  // Breadth first: two roots, then the first root's children, then a grandchild.
  const Tree tree = Tree::from_nodes(Nodes{{-1, 1}, {-1, 2}, {0, 3}, {0, 4}, {2, 5}, {1, 6}});
  std::vector<std::int64_t> lengths, parents;
  for (const TreeNode& node : tree.nodes()) {
    lengths.push_back(node.length);
    parents.push_back(node.parent);
  }
  EXPECT_THAT(lengths, ElementsAre(1, 3, 5, 4, 2, 6));
  EXPECT_THAT(parents, ElementsAre(-1, 0, 1, 0, -1, 4));
  const std::vector<std::int64_t> where(tree.dfs_index().begin(), tree.dfs_index().end());
  EXPECT_THAT(where, ElementsAre(0, 4, 1, 3, 2, 5));
}

TEST(Tree, AppendsAfterWhatIsThere) {
  Ints start{9}, end{9}, ids{9};
  const Tree tree = Tree::from_nodes(Nodes{{-1, 2}});
  tree.append_arrays(start, end);
  tree.append_position_ids(ids);
  EXPECT_THAT(start, ElementsAre(9, 0, 0));
  EXPECT_THAT(end, ElementsAre(9, 0, 0));
  EXPECT_THAT(ids, ElementsAre(9, 0, 1));
}

TEST(Tree, EmptyTreesAndNodesAreLegal) {
  const Tree none = Tree::from_nodes({});
  EXPECT_EQ(none.tokens(), 0);
  EXPECT_EQ(none.depth(), 0);
  EXPECT_EQ(none.visible_pairs(), 0);
  const Tree hollow = Tree::from_nodes(Nodes{{-1, 0}, {0, 0}, {0, 3}});
  Ints start, end;
  hollow.append_arrays(start, end);
  EXPECT_THAT(start, ElementsAre(2, 2, 2));
  EXPECT_EQ(hollow.visible_pairs(), 6);
  EXPECT_EQ(hollow.leaves(), 2);
}

TEST(Tree, BadNodesAreNamed) {
  const auto node_error = [](const Nodes& nodes) {
    return error_of([&] { Tree::from_nodes(nodes); });
  };
  EXPECT_THAT(node_error({{-1, 1}, {1, 1}}), HasSubstr("node 1: parent is 1"));
  EXPECT_THAT(node_error({{0, 1}}), HasSubstr("node 0: parent is 0"));
  EXPECT_THAT(node_error({{-2, 1}}), HasSubstr("node 0: parent is -2"));
  EXPECT_THAT(node_error({{-1, 1}, {0, -3}}), HasSubstr("node 1: length is -3"));
  EXPECT_THAT(node_error({{-1, 2147483647}, {0, 1}}), HasSubstr("node 1: length 1 brings"));
  EXPECT_THAT(node_error({{-1, std::int64_t{1} << 62}}), HasSubstr("node 0"));
}

TEST(Tree, AMillionNodesDeepNeedsNoStack) {
  Nodes chain(1'000'000);
  for (std::size_t i = 0; i < chain.size(); ++i) chain[i] = {static_cast<std::int64_t>(i) - 1, 1};
  const Tree tree = Tree::from_nodes(chain);
  EXPECT_EQ(tree.depth(), 1'000'000);
  EXPECT_EQ(tree.unshared_tokens(), 1'000'000);
  EXPECT_EQ(tree.visible_pairs(), 500'000'500'000);
  Ints start, end;
  tree.append_arrays(start, end);
  EXPECT_EQ(Tree::from_arrays(start, end).depth(), 1'000'000);
}

TEST(TreeFromArrays, IsTheInverseOnRandomForests) {
  SplitMix64 rng(11);
  for (int n = 0; n < 500; ++n) {
    Ints start, end, start_again, end_again;
    testing::random_forest(rng, static_cast<int>(rng.below(200)), start, end);
    const Tree tree = Tree::from_arrays(start, end);
    tree.append_arrays(start_again, end_again);
    ASSERT_EQ(start, start_again) << n;
    ASSERT_EQ(end, end_again) << n;
    // Counting pairs by the element rule needs no tree at all.
    std::int64_t pairs = 0;
    for (std::size_t i = 0; i < start.size(); ++i) {
      for (std::size_t j = 0; j <= i; ++j) pairs += start[i] <= end[j];
    }
    ASSERT_EQ(tree.visible_pairs(), pairs) << n;
  }
}

TEST(TreeFromArrays, PositionIdsAreTheNumberOfVisibleKeysBefore) {
  SplitMix64 rng(12);
  for (int n = 0; n < 100; ++n) {
    Ints start, end, ids;
    testing::random_forest(rng, static_cast<int>(rng.below(150)), start, end);
    Tree::from_arrays(start, end).append_position_ids(ids);
    for (std::size_t i = 0; i < start.size(); ++i) {
      int above = 0;
      for (std::size_t j = 0; j < i; ++j) above += start[i] <= end[j];
      ASSERT_EQ(ids[i], above) << n << " token " << i;
    }
  }
}

TEST(TreeFromArrays, TheFirstBadTokenIsNamed) {
  EXPECT_THAT(array_error({0, 1, 0}, {1, 1, 1}), HasSubstr("token 2: start decreases from 1 to 0"));
  EXPECT_THAT(array_error({-1}, {0}), HasSubstr("token 0: start is -1"));
  EXPECT_THAT(array_error({0, 1}, {1, 0}), HasSubstr("token 1: end is 0, below"));
  EXPECT_THAT(array_error({0, 0}, {1, 2}), HasSubstr("token 1: end is 2, but 1"));
  EXPECT_THAT(array_error({0, 1, 2}, {1, 2, 2}), HasSubstr("token 1: subtree of node 1 ends at 2"));
  EXPECT_THAT(array_error({0}, {2147483647}), HasSubstr("token 0: names DFS index 2147483647"));
  EXPECT_THAT(array_error({0, 0}, {1}), HasSubstr("start has 2 tokens and end 1"));
}

}  // namespace
}  // namespace treeattn
