#include "runtime/attention/workload.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "treeattn/error.h"

namespace treeattn {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::vector<std::int64_t> lengths(const Tree& tree) {
  std::vector<std::int64_t> out;
  for (const TreeNode& node : tree.nodes()) out.push_back(node.length);
  return out;
}

std::vector<std::int64_t> parents(const Tree& tree) {
  std::vector<std::int64_t> out;
  for (const TreeNode& node : tree.nodes()) out.push_back(node.parent);
  return out;
}

std::string error_of(const std::string& spec, ErrorCode code = ErrorCode::kInvalidArgument) {
  try {
    parse_workload(spec);
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code) << spec;
    return error.what();
  }
  return "no error for " + spec;
}

class TempDir {
 public:
  TempDir() {
    std::string pattern = (std::filesystem::temp_directory_path() / "treeattn-workload-XXXXXX");
    path_ = mkdtemp(pattern.data());
  }
  ~TempDir() { std::filesystem::remove_all(path_); }
  std::string write(const std::string& name, const std::string& text) const {
    const std::string file = path_ / name;
    std::ofstream(file) << text;
    return file;
  }

 private:
  std::filesystem::path path_;
};

TEST(Workload, EachKindBuildsItsTree) {
  const Workload chain = parse_workload("chain:7");
  EXPECT_THAT(lengths(chain.trees.at(0)), ElementsAre(7));
  const Workload fork = parse_workload("fork:5,3x2");
  EXPECT_THAT(lengths(fork.trees.at(0)), ElementsAre(5, 2, 2, 2));
  EXPECT_THAT(parents(fork.trees.at(0)), ElementsAre(-1, 0, 0, 0));
  const Workload binary = parse_workload("binary:3,4");
  EXPECT_THAT(parents(binary.trees.at(0)), ElementsAre(-1, 0, 1, 1, 0, 4, 4));
  EXPECT_EQ(binary.tokens(), 28);
  const Workload comb = parse_workload("comb:10,2,3,1");
  EXPECT_THAT(lengths(comb.trees.at(0)).size(), 5u);
  EXPECT_EQ(comb.tokens(), 10 + 2 * (3 + 1));
  EXPECT_EQ(comb.trees.at(0).leaves(), 2);
  EXPECT_EQ(comb.unshared_tokens(), (10 + 3 + 1) + (10 + 3 + 3 + 1));
}

TEST(Workload, PairsAreThoseBehindThePublishedNumbers) {
  // 32 heads of dim 128: 3.30 ms at 377 useful TFLOP/s were measured on this one.
  EXPECT_NEAR(static_cast<double>(parse_workload("binary:6,512").visible_pairs()) * 4 * 32 * 128 /
                  3.30e-3 / 1e12,
              377, 1);
  EXPECT_EQ(parse_workload("chain:16384").visible_pairs(), 16384LL * 16385 / 2);
}

TEST(Workload, CopiesArePackedByCuSeqlens) {
  const Workload work = parse_workload("3*fork:2,2x1");
  const PackedTrees packed = work.pack();
  EXPECT_THAT(packed.cu_seqlens, ElementsAre(0, 4, 8, 12));
  EXPECT_THAT(packed.start, ElementsAre(0, 0, 1, 2, 0, 0, 1, 2, 0, 0, 1, 2));
  EXPECT_THAT(packed.end, ElementsAre(2, 2, 1, 2, 2, 2, 1, 2, 2, 2, 1, 2));
  EXPECT_THAT(packed.position_ids, ElementsAre(0, 1, 2, 2, 0, 1, 2, 2, 0, 1, 2, 2));
  EXPECT_EQ(work.visible_pairs(), 3 * (3 + 3 + 3));
}

TEST(Workload, NamesAreCanonicalAndStable) {
  for (const char* spec : {"chain:16", "fork:4096,16x1024", "binary:9,64", "comb:2048,20,700,400",
                           "random:7,40,90", "8*chain:3"}) {
    EXPECT_EQ(parse_workload(spec).name, spec);
  }
  EXPECT_EQ(parse_workload("2*3*chain:007").name, "6*chain:7");
  EXPECT_EQ(parse_workload("1*chain:7").name, "chain:7");
}

TEST(Workload, RandomTreesAreTheSameEverywhere) {
  // Worked out by another implementation of the generator; a change breaks published results.
  const Workload work = parse_workload("random:7,6,9");
  EXPECT_THAT(lengths(work.trees.at(0)), ElementsAre(7, 8, 4, 2, 5, 2));
  EXPECT_THAT(parents(work.trees.at(0)), ElementsAre(-1, 0, 1, 2, 0, 0));
}

TEST(Workload, SeedsReachTheDegenerateShapes) {
  bool chain = false, star = false, one_token = false, bushy = false;
  for (int seed = 0; seed < 100; ++seed) {
    const Tree tree = parse_workload("random:" + std::to_string(seed) + ",30,50").trees.at(0);
    EXPECT_EQ(tree.nodes().size(), 30u);
    for (const TreeNode& node : tree.nodes()) {
      EXPECT_GE(node.length, 1);
      EXPECT_LE(node.length, 50);
    }
    chain |= tree.depth() == 30;
    star |= tree.depth() == 2;
    one_token |= tree.tokens() == 30;
    bushy |= tree.depth() > 3 && tree.depth() < 12 && tree.tokens() > 30;
  }
  EXPECT_TRUE(chain);
  EXPECT_TRUE(star);
  EXPECT_TRUE(one_token);
  EXPECT_TRUE(bushy);
}

TEST(Workload, FilesHoldOneListPerTree) {
  const TempDir dir;
  const std::string path = dir.write("two*trees.json", R"([
    [{"parent": -1, "length": 4}, {"parent": 0, "length": 2}, {"length": 1, "parent": 0}],
    [{"parent": -1, "length": 3}]])");
  const Workload work = parse_workload("file:" + path);
  EXPECT_EQ(work.name, "file:" + path);
  ASSERT_EQ(work.trees.size(), 2u);
  EXPECT_THAT(parents(work.trees[0]), ElementsAre(-1, 0, 0));
  EXPECT_EQ(parse_workload("2*file:" + path).tokens(), 20);
}

TEST(Workload, BadFilesAreNamed) {
  const TempDir dir;
  const auto file_error = [&](const std::string& text,
                              ErrorCode code = ErrorCode::kInvalidArgument) {
    return error_of("file:" + dir.write("bad.json", text), code);
  };
  EXPECT_THAT(file_error("[[{]"), HasSubstr("is not JSON"));
  EXPECT_THAT(file_error("{}"), HasSubstr("is not a list of trees"));
  EXPECT_THAT(file_error("[3]"), HasSubstr("tree 0 is not a list"));
  EXPECT_THAT(file_error(R"([[{"parent": -1}]])"),
              HasSubstr("tree 0 node 0 has no whole number \"length\""));
  EXPECT_THAT(file_error(R"([[{"parent": -1, "length": 1.5}]])"), HasSubstr("1.5"));
  EXPECT_THAT(file_error(R"([[{"parent": 18446744073709551615, "length": 1}]])"),
              HasSubstr("\"parent\""));
  EXPECT_THAT(file_error(R"([[], [{"parent": 0, "length": 1}]])", ErrorCode::kInvalidTree),
              HasSubstr("tree 1: node 0: parent is 0"));
  EXPECT_THAT(error_of("file:/nowhere/at/all.json", ErrorCode::kIoError),
              HasSubstr("/nowhere/at/all.json"));
}

TEST(Workload, ErrorsNameTheBadPartAndShowTheGrammar) {
  EXPECT_THAT(error_of("chain:x"), HasSubstr("N is 'x'"));
  EXPECT_THAT(error_of("chain:"), HasSubstr("N is ''"));
  EXPECT_THAT(error_of("chain:5 "), HasSubstr("N is '5 '"));
  EXPECT_THAT(error_of("chain:-1"), HasSubstr("N is '-1'"));
  EXPECT_THAT(error_of("chain:99999999999"), HasSubstr("N is '99999999999'"));
  EXPECT_THAT(error_of("fork:1,2"), HasSubstr("'2' should be RxL"));
  EXPECT_THAT(error_of("fork:1"), HasSubstr("expected fork:P,RxL"));
  EXPECT_THAT(error_of("fork:1,2x3,4"), HasSubstr("expected fork:P,RxL"));
  EXPECT_THAT(error_of("fork:1,0x3"), HasSubstr("R is '0'"));
  EXPECT_THAT(error_of("binary:30,1"), HasSubstr("D is '30'"));
  EXPECT_THAT(error_of("binary:24,1000"), HasSubstr("tokens"));
  EXPECT_THAT(error_of("comb:1,2,3"), HasSubstr("comb:P,T,K,L"));
  EXPECT_THAT(error_of("random:1,0,5"), HasSubstr("N is '0'"));
  EXPECT_THAT(error_of("random:1,5,0"), HasSubstr("MAX is '0'"));
  EXPECT_THAT(error_of("tower:5"), HasSubstr("unknown kind 'tower'"));
  EXPECT_THAT(error_of("chain"), HasSubstr("no ':'"));
  EXPECT_THAT(error_of(""), HasSubstr("no ':'"));
  EXPECT_THAT(error_of("0*chain:5"), HasSubstr("count is '0'"));
  EXPECT_THAT(error_of("*chain:5"), HasSubstr("count is ''"));
  EXPECT_THAT(error_of("3000*chain:1000000"), HasSubstr("tokens"));
  EXPECT_THAT(error_of("100000000*chain:1"), HasSubstr("nodes"));
  EXPECT_THAT(error_of("tower:5"), HasSubstr("random:SEED,N,MAX"));
}

}  // namespace
}  // namespace treeattn
