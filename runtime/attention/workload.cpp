#include "runtime/attention/workload.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstddef>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <span>
#include <utility>

#include "runtime/attention/splitmix.h"
#include "treeattn/error.h"

namespace treeattn {
namespace {

constexpr std::int64_t kMaxTokens = std::numeric_limits<std::int32_t>::max();
constexpr std::int64_t kMaxNodes = 1 << 24;
constexpr std::string_view kGrammar =
    "chain:N           one node of N tokens\n"
    "fork:P,RxL        a prompt of P tokens and R responses of L tokens each\n"
    "binary:D,S        perfect binary tree of D levels, S tokens a node\n"
    "comb:P,T,K,L      system prompt of P tokens, T turns of K tokens that each leave a leaf of L\n"
    "random:SEED,N,MAX random tree of N nodes with 1 to MAX tokens each\n"
    "K*SPEC            K such trees packed together\n"
    "file:PATH         a JSON file: one list per tree of {\"parent\": index or -1, \"length\": "
    "tokens}";

[[noreturn]] void fail(const std::string& message) {
  throw Error(ErrorCode::kInvalidArgument, message,
              fmt::format("a workload is one of\n{}", kGrammar));
}

/// Takes a spec apart; every complaint quotes the part and the whole spec.
class SpecParser {
 public:
  explicit SpecParser(std::string_view spec) : spec_(spec) {}

  Workload parse() {
    std::string_view rest = spec_;
    std::int64_t copies = 1;
    // A path may hold a star, so only a star before the colon counts.
    for (std::size_t star = rest.find('*'); star < rest.find(':'); star = rest.find('*')) {
      copies *= number(rest.substr(0, star), "count", 1, kMaxTokens);
      if (copies > kMaxTokens) fail(fmt::format("workload '{}': too many trees", spec_));
      rest.remove_prefix(star + 1);
    }
    const std::size_t colon = rest.find(':');
    if (colon == std::string_view::npos) {
      fail(fmt::format("workload '{}': '{}' has no ':' after its kind", spec_, rest));
    }
    const std::string_view kind = rest.substr(0, colon);
    Workload work = single(kind, rest.substr(colon + 1));
    if (copies > 1) repeat(work, copies);
    return work;
  }

 private:
  std::int64_t number(std::string_view text, std::string_view what, std::int64_t low,
                      std::int64_t high) const {
    std::int64_t value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || end != text.data() + text.size() || value < low || value > high) {
      fail(fmt::format("workload '{}': {} is '{}', expected a whole number from {} to {}", spec_,
                       what, text, low, high));
    }
    return value;
  }

  /// Splits at commas into exactly `count` parts.
  template <std::size_t count>
  std::array<std::string_view, count> parts(std::string_view text, std::string_view form) const {
    std::array<std::string_view, count> out;
    for (std::size_t i = 0; i < count; ++i) {
      const std::size_t comma = text.find(',');
      const bool last = i + 1 == count;
      if (last != (comma == std::string_view::npos)) {
        fail(fmt::format("workload '{}': expected {}", spec_, form));
      }
      out[i] = text.substr(0, comma);
      if (!last) text.remove_prefix(comma + 1);
    }
    return out;
  }

  Workload single(std::string_view kind, std::string_view args) const {
    if (kind == "chain") return chain(args);
    if (kind == "fork") return fork(args);
    if (kind == "binary") return binary(args);
    if (kind == "comb") return comb(args);
    if (kind == "random") return random(args);
    if (kind == "file") return file(args);
    fail(fmt::format("workload '{}': unknown kind '{}'", spec_, kind));
  }

  Workload make(std::string name, std::span<const TreeNode> nodes) const {
    Workload work;
    work.name = std::move(name);
    work.trees.push_back(Tree::from_nodes(nodes));
    return work;
  }

  void check_size(std::int64_t nodes, double tokens) const {
    if (nodes > kMaxNodes) {
      fail(fmt::format("workload '{}': {} nodes, at most {}", spec_, nodes, kMaxNodes));
    }
    if (tokens > static_cast<double>(kMaxTokens)) {
      fail(fmt::format("workload '{}': more than {} tokens", spec_, kMaxTokens));
    }
  }

  Workload chain(std::string_view args) const {
    const std::int64_t n = number(args, "N", 0, kMaxTokens);
    return make(fmt::format("chain:{}", n), std::array{TreeNode{-1, n}});
  }

  Workload fork(std::string_view args) const {
    const auto [prompt, responses] = parts<2>(args, "fork:P,RxL");
    const std::size_t x = responses.find('x');
    if (x == std::string_view::npos) {
      fail(fmt::format("workload '{}': '{}' should be RxL, as in 16x1024", spec_, responses));
    }
    const std::int64_t p = number(prompt, "P", 0, kMaxTokens);
    const std::int64_t r = number(responses.substr(0, x), "R", 1, kMaxNodes);
    const std::int64_t l = number(responses.substr(x + 1), "L", 0, kMaxTokens);
    check_size(r + 1, static_cast<double>(p) + static_cast<double>(r) * static_cast<double>(l));
    std::vector<TreeNode> nodes(static_cast<std::size_t>(r) + 1, TreeNode{0, l});
    nodes[0] = {-1, p};
    return make(fmt::format("fork:{},{}x{}", p, r, l), nodes);
  }

  Workload binary(std::string_view args) const {
    const auto [levels, size] = parts<2>(args, "binary:D,S");
    const std::int64_t d = number(levels, "D", 1, 24);
    const std::int64_t s = number(size, "S", 0, kMaxTokens);
    const std::int64_t count = (std::int64_t{1} << d) - 1;
    check_size(count, static_cast<double>(count) * static_cast<double>(s));
    std::vector<TreeNode> nodes(static_cast<std::size_t>(count));
    for (std::int64_t i = 0; i < count; ++i) nodes[i] = {i == 0 ? -1 : (i - 1) / 2, s};
    return make(fmt::format("binary:{},{}", d, s), nodes);
  }

  Workload comb(std::string_view args) const {
    const auto [prompt, turns, trunk, leaf] = parts<4>(args, "comb:P,T,K,L");
    const std::int64_t p = number(prompt, "P", 0, kMaxTokens);
    const std::int64_t t = number(turns, "T", 0, kMaxNodes);
    const std::int64_t k = number(trunk, "K", 0, kMaxTokens);
    const std::int64_t l = number(leaf, "L", 0, kMaxTokens);
    check_size(2 * t + 1,
               static_cast<double>(p) + static_cast<double>(t) * static_cast<double>(k + l));
    std::vector<TreeNode> nodes{{-1, p}};
    std::int64_t end_of_trunk = 0;
    for (std::int64_t turn = 0; turn < t; ++turn) {
      nodes.push_back({end_of_trunk, k});
      end_of_trunk = static_cast<std::int64_t>(nodes.size()) - 1;
      nodes.push_back({end_of_trunk, l});
    }
    return make(fmt::format("comb:{},{},{},{}", p, t, k, l), nodes);
  }

  Workload random(std::string_view args) const {
    const auto [seed_text, count, most] = parts<3>(args, "random:SEED,N,MAX");
    const std::int64_t seed =
        number(seed_text, "SEED", 0, std::numeric_limits<std::int64_t>::max());
    const std::int64_t n = number(count, "N", 1, kMaxNodes);
    const std::int64_t longest = number(most, "MAX", 1, kMaxTokens);
    SplitMix64 rng(static_cast<std::uint64_t>(seed));
    enum Form { kChain, kStar, kOneToken, kDeep, kUniform, kForms = 8 };
    const auto form = static_cast<Form>(rng.below(kForms));
    std::vector<TreeNode> nodes(static_cast<std::size_t>(n));
    double tokens = 0;
    for (std::int64_t i = 0; i < n; ++i) {
      const std::int64_t parent = i == 0 ? -1 : rng.below(i);
      const std::int64_t near = i == 0 ? -1 : std::max<std::int64_t>(0, i - 1 - rng.below(3));
      const std::int64_t length = rng.between(1, longest);
      nodes[i] = {form == kChain ? i - 1 : form == kDeep ? near : parent, length};
      if (form == kStar) nodes[i].parent = i == 0 ? -1 : 0;
      if (form == kOneToken) nodes[i].length = 1;
      tokens += static_cast<double>(nodes[i].length);
    }
    check_size(n, tokens);
    return make(fmt::format("random:{},{},{}", seed, n, longest), nodes);
  }

  Workload file(std::string_view path) const {
    const std::string name(path);
    std::ifstream stream(name, std::ios::binary);
    if (!stream) {
      throw Error(ErrorCode::kIoError, fmt::format("workload '{}': cannot read '{}'", spec_, name),
                  "check the path; it is taken from the current folder");
    }
    const nlohmann::json json = nlohmann::json::parse(stream, nullptr, false);
    if (json.is_discarded()) fail(fmt::format("workload '{}': '{}' is not JSON", spec_, name));
    if (!json.is_array()) {
      fail(fmt::format("workload '{}': '{}' is not a list of trees", spec_, name));
    }
    Workload work;
    work.name = fmt::format("file:{}", name);
    double tokens = 0;
    for (std::size_t t = 0; t < json.size(); ++t) {
      work.trees.push_back(tree_from_json(json[t], t));
      tokens += static_cast<double>(work.trees.back().tokens());
      check_size(1, tokens);
    }
    return work;
  }

  Tree tree_from_json(const nlohmann::json& list, std::size_t t) const {
    if (!list.is_array())
      fail(fmt::format("workload '{}': tree {} is not a list of nodes", spec_, t));
    std::vector<TreeNode> nodes;
    for (const nlohmann::json& node : list) {
      const auto whole = [&](const char* key) {
        const bool good =
            node.is_object() && node.contains(key) && node[key].is_number_integer() &&
            (!node[key].is_number_unsigned() ||
             node[key].get<std::uint64_t>() <= static_cast<std::uint64_t>(kMaxTokens));
        if (!good) {
          fail(fmt::format(
              "workload '{}': tree {} node {} has no whole number \"{}\": {}", spec_, t,
              nodes.size(), key,
              node.dump(-1, ' ', true, nlohmann::json::error_handler_t::replace).substr(0, 80)));
        }
        return node[key].get<std::int64_t>();
      };
      nodes.push_back({whole("parent"), whole("length")});
    }
    try {
      return Tree::from_nodes(nodes);
    } catch (const Error& error) {
      throw Error(error.code(), fmt::format("workload '{}': tree {}: {}", spec_, t, error.what()));
    }
  }

  void repeat(Workload& work, std::int64_t copies) const {
    std::int64_t nodes = 0;
    for (const Tree& tree : work.trees) nodes += static_cast<std::int64_t>(tree.nodes().size());
    if (static_cast<double>(copies) * static_cast<double>(work.trees.size() + nodes) >
        static_cast<double>(kMaxNodes)) {
      fail(fmt::format("workload '{}': {} copies make more than {} nodes", spec_, copies,
                       kMaxNodes));
    }
    check_size(1, static_cast<double>(copies) * static_cast<double>(work.tokens()));
    const std::vector<Tree> once = work.trees;
    for (std::int64_t i = 1; i < copies; ++i) {
      work.trees.insert(work.trees.end(), once.begin(), once.end());
    }
    work.name = fmt::format("{}*{}", copies, work.name);
  }

  std::string_view spec_;
};

}  // namespace

std::int64_t Workload::tokens() const {
  std::int64_t sum = 0;
  for (const Tree& tree : trees) sum += tree.tokens();
  return sum;
}

std::int64_t Workload::unshared_tokens() const {
  std::int64_t sum = 0;
  for (const Tree& tree : trees) sum += tree.unshared_tokens();
  return sum;
}

std::int64_t Workload::visible_pairs() const {
  std::int64_t sum = 0;
  for (const Tree& tree : trees) sum += tree.visible_pairs();
  return sum;
}

PackedTrees Workload::pack() const {
  PackedTrees packed;
  const auto total = static_cast<std::size_t>(tokens());
  packed.cu_seqlens.reserve(trees.size() + 1);
  packed.start.reserve(total);
  packed.end.reserve(total);
  packed.position_ids.reserve(total);
  packed.cu_seqlens.push_back(0);
  for (const Tree& tree : trees) {
    tree.append_arrays(packed.start, packed.end);
    tree.append_position_ids(packed.position_ids);
    packed.cu_seqlens.push_back(static_cast<std::int32_t>(packed.start.size()));
  }
  return packed;
}

Workload parse_workload(std::string_view spec) {
  return SpecParser(spec).parse();
}

std::string_view workload_grammar() {
  return kGrammar;
}

}  // namespace treeattn
