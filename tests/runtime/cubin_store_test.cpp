#include "runtime/cache/cubin_store.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "runtime/support/digest.h"
#include "runtime/support/file_io.h"
#include "tests/support/fake_artifact.h"
#include "tests/support/log_capture.h"
#include "tests/support/temp_dir.h"

namespace treeattn {
namespace {

namespace fs = std::filesystem;
using test::fake_artifact;
using test::files_below;
using test::LogCapture;
using test::read_text;
using test::TempDir;
using test::write_text;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

class CubinStoreTest : public testing::Test {
 protected:
  fs::path root() const { return folder_ / "cache"; }
  static CubinStore writable(const fs::path& path) { return CubinStore({{path, true, false}}); }

  static fs::path path_of(const fs::path& root, const Artifact& artifact) {
    return CubinStore::entry_path(root, *nvrtc_major(artifact.nvrtc), artifact.spec, artifact.key);
  }
  static void publish(const fs::path& root, const Artifact& artifact) {
    CubinStore store = writable(root);
    std::string why;
    ASSERT_TRUE(store.publish(artifact, why)) << why;
  }
  static std::optional<Artifact> find(const CubinStore& store, const Artifact& like,
                                      int nvrtc_major = 0,
                                      std::vector<StoreProbe>* probes = nullptr) {
    return store.find(like.key, like.spec, nvrtc_major, probes);
  }
  static std::string text_of(const Artifact& artifact) {
    const auto file = encode_artifact(artifact);
    return {reinterpret_cast<const char*>(file.data()), file.size()};
  }
  static void make_old(const fs::path& path) {
    fs::last_write_time(path, fs::file_time_type::clock::now() - std::chrono::hours(2));
  }

  TempDir folder_;
  LogCapture log_;
};

TEST_F(CubinStoreTest, FindsWhatItPublished) {
  CubinStore store = writable(root());
  const Artifact artifact = fake_artifact();
  EXPECT_EQ(find(store, artifact), std::nullopt);
  std::string why;
  EXPECT_TRUE(store.publish(artifact, why)) << why;
  EXPECT_EQ(find(store, artifact), artifact);
  EXPECT_EQ(find(store, artifact, 13), artifact);
  EXPECT_EQ(find(store, fake_artifact(2)), std::nullopt);
  const StoreCounters counters = store.counters();
  EXPECT_EQ(counters.hits, 2u);
  EXPECT_EQ(counters.misses, 2u);
  EXPECT_EQ(counters.published, 1u);
  EXPECT_EQ(counters.rejected + counters.publish_failures, 0u);
  EXPECT_EQ(log_.text(), "");
}

TEST_F(CubinStoreTest, LaysFilesOutAsDocumented) {
  const Artifact artifact = fake_artifact();
  publish(root(), artifact);
  const std::string hex = artifact.key.hex();
  const fs::path expected = root() / "v1/objects/nvrtc13" / hex.substr(0, 2) /
                            ("fwd-sm80-sm_90-bf16-d128v128-m128n64s2w4-" + hex + ".cubin");
  EXPECT_THAT(files_below(root()), ElementsAre(root() / "v1/CACHEDIR.TAG", expected));
  EXPECT_THAT(read_text(root() / "v1/CACHEDIR.TAG"),
              testing::StartsWith("Signature: 8a477f597d28d172789f06886806bc55\n"));
  EXPECT_EQ(read_text(expected), text_of(artifact));
}

TEST_F(CubinStoreTest, EverythingIsPrivateUnlessTheRootIsShared) {
  const mode_t before = umask(0);
  publish(root(), fake_artifact());
  umask(0077);
  CubinStore pack({{folder_ / "pack", true, true}});
  std::string why;
  EXPECT_TRUE(pack.publish(fake_artifact(), why)) << why;
  umask(before);
  const auto modes_below = [](const fs::path& top) {
    std::set<unsigned> modes = {static_cast<unsigned>(fs::status(top).permissions())};
    for (const auto& entry : fs::recursive_directory_iterator(top)) {
      modes.insert(static_cast<unsigned>(entry.status().permissions()));
    }
    return modes;
  };
  EXPECT_THAT(modes_below(root()), ElementsAre(0600u, 0700u));
  EXPECT_THAT(modes_below(folder_ / "pack"), ElementsAre(0644u, 0755u));
}

TEST_F(CubinStoreTest, PublishingTwiceGivesTheSameTree) {
  publish(root(), fake_artifact());
  publish(folder_ / "other", fake_artifact());
  publish(folder_ / "other", fake_artifact());
  const auto first = files_below(root());
  const auto second = files_below(folder_ / "other");
  ASSERT_EQ(first.size(), second.size());
  for (std::size_t i = 0; i < first.size(); ++i) {
    EXPECT_EQ(fs::relative(first[i], root()), fs::relative(second[i], folder_ / "other"));
    EXPECT_EQ(read_text(first[i]), read_text(second[i]));
  }
}

TEST_F(CubinStoreTest, LooksOnlyInItsOwnNvrtcFolderOfTheWritableRoot) {
  const Artifact old = fake_artifact(1, "12.4.127");
  publish(root(), old);
  const CubinStore store = writable(root());
  EXPECT_EQ(find(store, old, 13), std::nullopt);
  EXPECT_EQ(find(store, old, 12), old);
  EXPECT_EQ(find(store, old, 0), old);
  const Artifact young = fake_artifact(1, "13.0.88");
  publish(root(), young);
  EXPECT_EQ(find(store, old, 12), old);
  EXPECT_EQ(find(store, old, 0), young);
  publish(root(), fake_artifact(1, "9.2"));
  EXPECT_EQ(find(store, old, 0), young);  // by number, not by name
}

TEST_F(CubinStoreTest, ReadOnlyRootsServeAnyNvrtcAndComeInOrder) {
  publish(folder_ / "pack", fake_artifact(1, "12.4.127"));
  publish(folder_ / "pack", fake_artifact(2, "12.4.127"));
  publish(folder_ / "pack", fake_artifact(2, "13.0.88"));
  publish(root(), fake_artifact(1, "13.0.88"));
  publish(root(), fake_artifact(3, "13.0.88"));
  const CubinStore store({{folder_ / "pack", false, false}, {root(), true, false}});
  EXPECT_EQ(find(store, fake_artifact(1), 13)->nvrtc, "12.4.127");
  EXPECT_EQ(find(store, fake_artifact(2), 13)->nvrtc, "13.0.88");
  EXPECT_EQ(find(store, fake_artifact(2), 12)->nvrtc, "12.4.127");
  EXPECT_EQ(find(store, fake_artifact(2), 0)->nvrtc, "13.0.88");
  EXPECT_EQ(find(store, fake_artifact(3), 13)->nvrtc, "13.0.88");
  EXPECT_EQ(log_.text(), "");
}

TEST_F(CubinStoreTest, ProbesTellWhereItLookedAndWhatItFound) {
  publish(folder_ / "pack", fake_artifact(2));
  publish(root(), fake_artifact(1));
  const Artifact artifact = fake_artifact(1);
  const fs::path bad = path_of(folder_ / "pack", artifact);
  ASSERT_TRUE(make_folders(bad.parent_path()));
  write_text(bad, "");
  const CubinStore store({{folder_ / "absent", false, false},
                          {folder_ / "pack", false, false},
                          {root(), true, false}});
  std::vector<StoreProbe> probes;
  EXPECT_TRUE(find(store, artifact, 13, &probes));
  ASSERT_EQ(probes.size(), 3u);
  EXPECT_EQ(probes[0].path, (folder_ / "absent").string());
  EXPECT_EQ(probes[0].outcome, "not used: it does not exist");
  EXPECT_EQ(probes[1].path, bad.string());
  EXPECT_EQ(probes[1].outcome, "refused: it is empty");
  EXPECT_EQ(probes[2].path, path_of(root(), artifact).string());
  EXPECT_EQ(probes[2].outcome, "hit");
  probes.clear();
  EXPECT_FALSE(find(store, fake_artifact(9), 13, &probes));
  EXPECT_EQ(probes.at(1).outcome, "no such entry");
  EXPECT_EQ(probes.at(2).outcome, "no such entry");
}

// Every way an entry can be bad: a miss, one warning however often it is met, and the next publish
// heals it.
class BadEntry : public CubinStoreTest {
 protected:
  // Puts `content` where the entry belongs and expects it refused for `reason`.
  void expect_refused(const std::string& content, const std::string& reason) {
    const fs::path path = path_of(root(), artifact_);
    write_text(path, content);
    ASSERT_EQ(chmod(path.c_str(), 0600), 0);
    CubinStore store = writable(root());
    for (int i = 0; i < 3; ++i) EXPECT_EQ(find(store, artifact_, 13), std::nullopt) << reason;
    EXPECT_EQ(store.counters().rejected, 3u);
    EXPECT_EQ(store.counters().misses, 3u);
    ASSERT_EQ(log_.messages().size(), 1u) << log_.text();
    EXPECT_THAT(log_.text(), HasSubstr(path.string()));
    EXPECT_THAT(log_.text(), HasSubstr(reason));
    EXPECT_THAT(log_.text(), HasSubstr("it will be compiled again and replaced"));
    std::string why;
    ASSERT_TRUE(store.publish(artifact_, why)) << why;
    EXPECT_EQ(find(store, artifact_, 13), artifact_);
    EXPECT_EQ(log_.messages().size(), 1u);
  }

  void SetUp() override {
    publish(root(), artifact_);
    good_ = read_text(path_of(root(), artifact_));
  }
  std::string flipped(std::size_t at) const {
    std::string text = good_;
    text[at] = static_cast<char>(text[at] ^ 4);
    return text;
  }

  Artifact artifact_ = fake_artifact();
  std::string good_;
};

TEST_F(BadEntry, Truncated) {
  expect_refused(good_.substr(0, 3000), "cut short");
}
TEST_F(BadEntry, WithoutItsLastByte) {
  expect_refused(good_.substr(0, good_.size() - 1), "cut short");
}
TEST_F(BadEntry, Empty) {
  expect_refused("", "it is empty");
}
TEST_F(BadEntry, FlippedInTheHead) {
  expect_refused(flipped(2), "its code fails its sha256");
}
TEST_F(BadEntry, FlippedInTheMiddle) {
  expect_refused(flipped(2500), "its code fails its sha256");
}
TEST_F(BadEntry, FlippedInTheFooter) {
  expect_refused(flipped(artifact_.cubin.size() + 100), "its footer fails its sha256");
}
TEST_F(BadEntry, ForeignMagic) {
  expect_refused(good_.substr(0, good_.size() - 8) + "TREEFISH", "not a treeattn entry");
}
TEST_F(BadEntry, FutureSchema) {
  std::string text = good_;
  text.replace(text.find("treeattn_artifact=1"), 19, "treeattn_artifact=7");
  expect_refused(text, "its schema is '7'");
}
TEST_F(BadEntry, WrongTarget) {
  Artifact other = artifact_;
  other.target = "sm_80";
  expect_refused(text_of(other), "it was compiled for sm_80");
}
TEST_F(BadEntry, AnotherKey) {
  expect_refused(text_of(fake_artifact(2)), "it holds another key");
}
TEST_F(BadEntry, AnotherSpec) {
  Artifact other = artifact_;
  other.spec = "fwd/sm80@sm_90/f16/d128v128/m128n64s2w4";
  expect_refused(text_of(other), "it holds another spec");
}

TEST_F(BadEntry, AnEntryThatOthersCanWriteIsRefused) {
  const fs::path path = path_of(root(), artifact_);
  ASSERT_EQ(chmod(path.c_str(), 0666), 0);
  EXPECT_EQ(find(writable(root()), artifact_), std::nullopt);
  EXPECT_EQ(log_.count("can be written by others"), 1u);
}

TEST_F(BadEntry, AFolderInItsPlaceIsAMissAndAFailedPublish) {
  const fs::path path = path_of(root(), artifact_);
  fs::remove(path);
  fs::create_directories(path / "inner");
  CubinStore store = writable(root());
  EXPECT_EQ(find(store, artifact_), std::nullopt);
  std::string why;
  EXPECT_FALSE(store.publish(artifact_, why));
  EXPECT_THAT(why, HasSubstr("cannot rename to"));
  EXPECT_THAT(files_below(root()), ElementsAre(root() / "v1/CACHEDIR.TAG"));
}

TEST_F(BadEntry, InAReadOnlyRootTheNextRootServes) {
  publish(folder_ / "pack", artifact_);
  write_text(path_of(folder_ / "pack", artifact_), flipped(2500));
  const CubinStore store({{folder_ / "pack", false, false}, {root(), true, false}});
  EXPECT_EQ(find(store, artifact_, 13), artifact_);
  EXPECT_EQ(store.counters().rejected, 1u);
  EXPECT_EQ(store.counters().hits, 1u);
  EXPECT_EQ(log_.count("treeattn precompile"), 1u);
}

TEST_F(CubinStoreTest, WithoutAWritableRootPublishSaysSo) {
  CubinStore store({});
  std::string why;
  EXPECT_FALSE(store.publish(fake_artifact(), why));
  EXPECT_EQ(why, "there is no writable cache folder");
  EXPECT_EQ(find(store, fake_artifact()), std::nullopt);
  EXPECT_THAT(store.list(), IsEmpty());
  EXPECT_EQ(store.remove_if([](const StoreEntry&) { return true; }), 0u);
  EXPECT_EQ(store.counters().publish_failures, 1u);
}

TEST_F(CubinStoreTest, ARootThatIsAFileIsTroubleOnceAndNeverAnException) {
  write_text(root(), "a file");
  for (const fs::path& path : {root(), root() / "below"}) {
    CubinStore store = writable(path);
    std::string why;
    EXPECT_EQ(find(store, fake_artifact()), std::nullopt);
    EXPECT_EQ(find(store, fake_artifact()), std::nullopt);
    EXPECT_FALSE(store.publish(fake_artifact(), why));
    EXPECT_THAT(why, HasSubstr(root().string()));
    EXPECT_THAT(store.list(), IsEmpty());
    EXPECT_EQ(log_.count("kernel cache folder " + path.string() + " is not used"), 1u);
  }
  EXPECT_EQ(read_text(root()), "a file");
}

TEST_F(CubinStoreTest, AnInsecureRootIsNotUsedAtAll) {
  publish(root(), fake_artifact(1));
  CubinStore store = writable(root());
  for (const unsigned mode : {0777u, 0770u, 01777u}) {
    ASSERT_EQ(chmod(root().c_str(), mode), 0);
    EXPECT_EQ(find(store, fake_artifact(1)), std::nullopt);
    std::string why;
    EXPECT_FALSE(store.publish(fake_artifact(2), why));
    EXPECT_THAT(why, HasSubstr("can be written by others"));
    EXPECT_EQ(store.remove_if([](const StoreEntry&) { return true; }), 0u);
  }
  EXPECT_EQ(log_.count("is not used: it can be written by others"), 1u);
  ASSERT_EQ(chmod(root().c_str(), 0700), 0);
  EXPECT_TRUE(find(store, fake_artifact(1)));
  EXPECT_EQ(store.list().size(), 1u);
}

TEST_F(CubinStoreTest, AnotherUsersRootIsNotUsed) {
  publish(folder_ / "real", fake_artifact());
  fs::create_symlink(folder_ / "real", folder_ / "link");
  if (lchown((folder_ / "link").c_str(), 54321, 54321) != 0) {
    GTEST_SKIP() << "only root can give files away";
  }
  EXPECT_EQ(find(writable(folder_ / "link"), fake_artifact()), std::nullopt);
  EXPECT_EQ(log_.count("is a symbolic link that belongs to uid 54321"), 1u);
  ASSERT_EQ(lchown((folder_ / "link").c_str(), 0, 0), 0);
  EXPECT_TRUE(find(writable(folder_ / "link"), fake_artifact()));
  ASSERT_EQ(chown((folder_ / "real").c_str(), 54321, 54321), 0);
  EXPECT_EQ(find(writable(folder_ / "real"), fake_artifact()), std::nullopt);
  EXPECT_EQ(log_.count("belongs to uid 54321"), 2u);
  // A pack may be another user's.
  EXPECT_TRUE(find(CubinStore({{folder_ / "real"}}), fake_artifact()));
}

TEST_F(CubinStoreTest, RefusesToPublishWhatCouldNotBeReadBack) {
  CubinStore store = writable(root());
  Artifact artifact = fake_artifact();
  artifact.cubin.resize(10);
  std::string why;
  EXPECT_FALSE(store.publish(artifact, why));
  EXPECT_EQ(why, "its code is not a CUDA ELF image");
  EXPECT_FALSE(fs::exists(root()));
}

TEST_F(CubinStoreTest, PublishRemovesStaleTemporaryFilesBesideIt) {
  publish(root(), fake_artifact());
  const fs::path shard = path_of(root(), fake_artifact()).parent_path();
  write_text(shard / ".tmp-host-1-old", "half");
  write_text(shard / ".tmp-host-1-young", "half");
  make_old(shard / ".tmp-host-1-old");
  make_old(path_of(root(), fake_artifact()));
  publish(root(), fake_artifact());
  EXPECT_FALSE(fs::exists(shard / ".tmp-host-1-old"));
  EXPECT_TRUE(fs::exists(shard / ".tmp-host-1-young"));
  EXPECT_TRUE(find(writable(root()), fake_artifact()));
}

TEST_F(CubinStoreTest, ListsEveryEntryDamagedOnesIncluded) {
  publish(root(), fake_artifact(1));
  publish(root(), fake_artifact(2, "12.4.127"));
  publish(folder_ / "pack", fake_artifact(3));
  write_text(path_of(root(), fake_artifact(2, "12.4.127")), "damaged");
  const fs::path misnamed = path_of(root(), fake_artifact(1)).parent_path() / "copy.cubin";
  fs::copy_file(path_of(root(), fake_artifact(1)), misnamed);
  write_text(misnamed.parent_path() / ".tmp-host-1-x", "half");
  const CubinStore store({{folder_ / "pack", false, false}, {root(), true, false}});
  const auto entries = store.list();
  ASSERT_EQ(entries.size(), 4u);
  std::size_t damaged = 0;
  for (const StoreEntry& entry : entries) {
    EXPECT_EQ(entry.bytes, fs::file_size(entry.path));
    EXPECT_GT(entry.mtime, 1'600'000'000);
    EXPECT_EQ(entry.artifact.has_value(), entry.damage.empty());
    if (entry.path == misnamed) {
      EXPECT_THAT(entry.damage, HasSubstr("its name"));
    }
    damaged += entry.damage.empty() ? 0 : 1;
  }
  EXPECT_EQ(damaged, 2u);
  EXPECT_EQ(entries[0].artifact, fake_artifact(3));
  EXPECT_EQ(log_.text(), "");
}

TEST_F(CubinStoreTest, RemovesWhatItIsToldToFromTheWritableRootOnly) {
  publish(root(), fake_artifact(1));
  publish(root(), fake_artifact(2, "12.4.127"));
  publish(folder_ / "pack", fake_artifact(1));
  const fs::path stale = path_of(root(), fake_artifact(1)).parent_path() / ".tmp-host-1-old";
  write_text(stale, "half");
  make_old(stale);
  CubinStore store({{folder_ / "pack", false, false}, {root(), true, false}});
  EXPECT_EQ(store.remove_if([](const StoreEntry&) { return false; }), 0u);
  EXPECT_FALSE(fs::exists(stale));
  const auto is_old = [](const StoreEntry& e) { return e.artifact->nvrtc == "12.4.127"; };
  EXPECT_EQ(store.remove_if(is_old), 1u);
  EXPECT_EQ(find(store, fake_artifact(2), 12), std::nullopt);
  EXPECT_EQ(store.remove_if([](const StoreEntry&) { return true; }), 1u);
  EXPECT_EQ(find(store, fake_artifact(1), 13), fake_artifact(1));
  EXPECT_FALSE(find(writable(root()), fake_artifact(1)));
}

TEST_F(CubinStoreTest, AnEntryReplacedWhileItIsJudgedStays) {
  publish(root(), fake_artifact());
  write_text(path_of(root(), fake_artifact()), "damaged");
  CubinStore store = writable(root());
  const auto replace_then_drop = [&](const StoreEntry& entry) {
    EXPECT_FALSE(entry.damage.empty());
    publish(root(), fake_artifact());
    return true;
  };
  EXPECT_EQ(store.remove_if(replace_then_drop), 0u);
  EXPECT_EQ(find(store, fake_artifact()), fake_artifact());
}

TEST_F(CubinStoreTest, FromConfigPutsPacksFirstAndDropsWhatIsUnusable) {
  Config config;
  config.cache_dir = root().string();
  config.cache_path = {(folder_ / "absent").string(), (folder_ / "pack").string(),
                       config.cache_dir};
  config.problems = {"from_config_test: a problem"};
  publish(folder_ / "pack", fake_artifact());
  const CubinStore store = CubinStore::from_config(config);
  ASSERT_EQ(store.roots().size(), 2u);
  EXPECT_EQ(store.roots()[0].path, folder_ / "pack");
  EXPECT_FALSE(store.roots()[0].writable);
  EXPECT_EQ(store.roots()[1].path, root());
  EXPECT_TRUE(store.roots()[1].writable);
  EXPECT_FALSE(fs::exists(root()));  // looking creates nothing
  EXPECT_EQ(log_.messages().size(), 2u) << log_.text();
  EXPECT_EQ(log_.count("from_config_test: a problem"), 1u);
  EXPECT_EQ(log_.count((folder_ / "absent").string() + " is not used: it does not exist"), 1u);
  std::vector<StoreProbe> probes;
  EXPECT_TRUE(find(store, fake_artifact(), 13, &probes));
  ASSERT_EQ(probes.size(), 2u);
  EXPECT_EQ(probes[0].outcome, "not used: it does not exist");
}

TEST_F(CubinStoreTest, FromConfigWithoutAFolderIsMemoryOnlyWithOneWarning) {
  CubinStore store = CubinStore::from_config(Config{});
  EXPECT_THAT(store.roots(), IsEmpty());
  EXPECT_THAT(CubinStore::from_config(Config{}).roots(), IsEmpty());
  EXPECT_EQ(log_.messages().size(), 1u);
  EXPECT_THAT(log_.text(), HasSubstr("TREEATTN_CACHE_DIR"));
}

TEST_F(CubinStoreTest, FromConfigDropsAnInsecureFolder) {
  fs::create_directory(root());
  ASSERT_EQ(chmod(root().c_str(), 0777), 0);
  Config config;
  config.cache_dir = root().string();
  EXPECT_THAT(CubinStore::from_config(config).roots(), IsEmpty());
  EXPECT_EQ(log_.count("can be written by others"), 1u);
}

TEST_F(CubinStoreTest, ALongSpecStillFitsAFileName) {
  Artifact artifact = fake_artifact();
  artifact.spec = "fwd/sm80@sm_90/" + std::string(400, 'x');
  publish(root(), artifact);
  EXPECT_EQ(find(writable(root()), artifact), artifact);
  EXPECT_THAT(files_below(root()).back().string(), HasSubstr(artifact.key.hex() + ".cubin"));
}

TEST_F(CubinStoreTest, OneStoreServesManyThreads) {
  CubinStore store = writable(root());
  std::atomic<int> failed{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&, t] {
      for (std::uint32_t i = 0; i < 10; ++i) {
        const Artifact artifact = fake_artifact((i + static_cast<std::uint32_t>(t)) % 5);
        std::string why;
        if (!store.publish(artifact, why)) ++failed;
        if (find(store, artifact, 13) != artifact) ++failed;
      }
      if (store.list().size() > 5) ++failed;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(failed, 0);
  EXPECT_EQ(store.counters().published, 80u);
  EXPECT_EQ(store.counters().hits, 80u);
  EXPECT_EQ(store.counters().rejected, 0u);
  EXPECT_EQ(files_below(root()).size(), 6u);
}

}  // namespace
}  // namespace treeattn
