#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>
#include <string>

#include "runtime/cache/artifact.h"

namespace treeattn {
namespace {

GeneratedSource fake_source() {
  GeneratedSource source;
  source.text = "extern \"C\" __global__ void first() {}\n";
  source.entries = {{"first", 128, 1024}, {"second", 64, 0}};
  return source;
}

CompileOptions fake_options() {
  return {Target{90, false}, {"-std=c++20", "--ftz=true"}};
}

// A change here orphans every cache and every prebuilt pack in the field: make it on purpose.
TEST(ArtifactKey, OfAFixedSourceIsPinned) {
  EXPECT_EQ(artifact_key(fake_source(), fake_options()).hex(),
            "369329cbff872a397aaa0cc50fd2fb4bc47fc326d752341f71de35bbc7e5f2e6");
}

TEST(ArtifactKey, ChangesWithEveryInputThatShapesTheCode) {
  std::set<std::string> keys;
  std::size_t variants = 0;
  const auto add = [&](auto change) {
    GeneratedSource source = fake_source();
    CompileOptions options = fake_options();
    change(source, options);
    keys.insert(artifact_key(source, options).hex());
    ++variants;
  };
  using S = GeneratedSource;
  using O = CompileOptions;
  add([](S&, O&) {});
  add([](S& s, O&) { s.text += " "; });
  add([](S& s, O&) { s.text.clear(); });
  add([](S& s, O&) { s.text[0] = 'E'; });
  add([](S& s, O&) { s.entries[0].name = "fIrst"; });
  add([](S& s, O&) { std::swap(s.entries[0], s.entries[1]); });
  add([](S& s, O&) { s.entries.pop_back(); });
  add([](S& s, O&) { s.entries.push_back({"third", 1, 0}); });
  add([](S&, O& o) { o.target.cc = 89; });
  add([](S&, O& o) { o.target.arch_specific = true; });
  add([](S&, O& o) { o.flags[1] = "--ftz=false"; });
  add([](S&, O& o) { std::swap(o.flags[0], o.flags[1]); });
  add([](S&, O& o) { o.flags.pop_back(); });
  add([](S&, O& o) { o.flags.clear(); });
  add([](S&, O& o) { o.flags.emplace_back(""); });
  EXPECT_EQ(keys.size(), variants);
}

TEST(ArtifactKey, TellsAmbiguousConcatenationsApart) {
  std::set<std::string> keys;
  const auto add = [&](std::vector<std::string> flags, std::vector<std::string> names,
                       std::string text) {
    GeneratedSource source;
    for (std::string& name : names) source.entries.push_back({std::move(name), 0, 0});
    source.text = std::move(text);
    keys.insert(artifact_key(source, {Target{80, false}, std::move(flags)}).hex());
  };
  add({"ab", "c"}, {"d"}, "e");
  add({"a", "bc"}, {"d"}, "e");
  add({"abc"}, {"d"}, "e");
  add({"ab"}, {"c", "d"}, "e");
  add({"ab", "c"}, {"de"}, "");
  add({"ab", "c", "d"}, {}, "e");
  add({"ab", "c"}, {"d", "e"}, "");
  EXPECT_EQ(keys.size(), 7u);
}

TEST(ArtifactKey, IgnoresWhatDoesNotShapeTheCode) {
  GeneratedSource other = fake_source();
  other.spec.problem.head_dim = 64;
  other.entries[0].threads = 256;
  EXPECT_EQ(artifact_key(other, fake_options()), artifact_key(fake_source(), fake_options()));
}

TEST(ArtifactKey, HexRoundTrips) {
  const ArtifactKey key = artifact_key(fake_source(), fake_options());
  EXPECT_EQ(parse_artifact_key(key.hex()), key);
  EXPECT_EQ(parse_artifact_key("3f"), std::nullopt);
}

TEST(CompileOptions, NameTheTargetApartFromTheFlags) {
  KernelSpec spec;
  spec.problem.target = {90, true};
  const CompileOptions options = compile_options(spec);
  EXPECT_EQ(options.target, spec.problem.target);
  EXPECT_THAT(options.flags, testing::Contains("-std=c++20"));
  EXPECT_THAT(options.flags, testing::Each(testing::Not(testing::HasSubstr("arch"))));
}

}  // namespace
}  // namespace treeattn
