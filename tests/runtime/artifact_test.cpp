#include "runtime/cache/artifact.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "runtime/support/digest.h"
#include "tests/support/fake_artifact.h"
#include "treeattn/error.h"

namespace treeattn {
namespace {

using test::fake_artifact;
using testing::HasSubstr;

using Bytes = std::vector<std::byte>;

std::string footer_of(const Bytes& file, const Artifact& artifact) {
  const std::size_t begin = artifact.cubin.size();
  return {reinterpret_cast<const char*>(file.data()) + begin, file.size() - begin - 16};
}

// A file with this footer and a right trailer. `sign` gives the footer a right last line.
Bytes file_with_footer(const Bytes& cubin, std::string footer, bool sign = true) {
  if (sign) footer += "footer_sha256=" + to_hex(sha256(footer)) + "\n";
  std::string tail = footer;
  for (int i = 0; i < 8; ++i) tail += static_cast<char>(footer.size() >> (8 * i) & 0xff);
  tail += "treeattn";
  Bytes file = cubin;
  for (const char c : tail) file.push_back(static_cast<std::byte>(c));
  return file;
}

std::string unsigned_footer(const Artifact& artifact) {
  const std::string footer = footer_of(encode_artifact(artifact), artifact);
  return footer.substr(0, footer.rfind("footer_sha256="));
}

std::string why_refused(const Bytes& file) {
  std::string why;
  return decode_artifact(file, why) ? "accepted" : why;
}

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  const std::size_t at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  return text.replace(at, from.size(), to);
}

TEST(Artifact, RoundTrips) {
  Artifact artifact = fake_artifact();
  std::string why;
  EXPECT_EQ(decode_artifact(encode_artifact(artifact), why), artifact) << why;
  artifact.entries.clear();
  EXPECT_EQ(decode_artifact(encode_artifact(artifact), why), artifact) << why;
}

TEST(Artifact, TheFileIsTheCubinThenTextThenLengthAndMagic) {
  const Artifact artifact = fake_artifact();
  const Bytes file = encode_artifact(artifact);
  EXPECT_TRUE(std::equal(artifact.cubin.begin(), artifact.cubin.end(), file.begin()));
  const std::string footer = footer_of(file, artifact);
  EXPECT_THAT(footer, HasSubstr("treeattn_artifact=1\nkey=" + artifact.key.hex() +
                                "\nspec=" + artifact.spec + "\ntarget=sm_90\nnvrtc=13.0.88\n"));
  EXPECT_THAT(footer, HasSubstr("\nentry.1.name=treeattn_fwd_two\nentry.1.threads=256\n"));
  EXPECT_THAT(footer, HasSubstr("\ncubin_sha256=" + to_hex(sha256(artifact.cubin)) + "\n"));
  EXPECT_EQ(file, file_with_footer(artifact.cubin, footer, false));
}

TEST(Artifact, EqualArtifactsGiveEqualBytes) {
  EXPECT_EQ(encode_artifact(fake_artifact()), encode_artifact(fake_artifact()));
  EXPECT_NE(encode_artifact(fake_artifact(1)), encode_artifact(fake_artifact(2)));
}

TEST(Artifact, EveryFlippedBitIsNoticed) {
  Artifact artifact = fake_artifact();
  artifact.cubin = test::fake_cubin(7, 300);
  const Bytes file = encode_artifact(artifact);
  for (std::size_t i = 0; i < file.size(); ++i) {
    for (int bit = 0; bit < 8; ++bit) {
      Bytes flipped = file;
      flipped[i] ^= static_cast<std::byte>(1 << bit);
      std::string why;
      ASSERT_FALSE(decode_artifact(flipped, why)) << "byte " << i << " bit " << bit;
      ASSERT_FALSE(why.empty());
    }
  }
}

TEST(Artifact, EveryTruncationAndExtensionIsNoticed) {
  Artifact artifact = fake_artifact();
  artifact.cubin = test::fake_cubin(7, 300);
  const Bytes file = encode_artifact(artifact);
  for (std::size_t size = 0; size < file.size(); ++size) {
    ASSERT_NE(why_refused(Bytes(file.begin(), file.begin() + static_cast<std::ptrdiff_t>(size))),
              "accepted")
        << size;
    ASSERT_NE(why_refused(Bytes(file.begin() + static_cast<std::ptrdiff_t>(size) + 1, file.end())),
              "accepted")
        << size;
  }
  Bytes longer = file;
  longer.push_back(std::byte{0});
  EXPECT_NE(why_refused(longer), "accepted");
  Bytes padded = file;
  padded.insert(padded.begin() + 300, std::byte{0});
  EXPECT_EQ(why_refused(padded), "its length is not what its footer says");
}

TEST(Artifact, TakesAnyBytes) {
  std::mt19937 random(42);
  const Bytes file = encode_artifact(fake_artifact());
  for (int round = 0; round < 3000; ++round) {
    Bytes bytes;
    if (round % 3 == 0) {  // noise that ends like an entry
      bytes.resize(random() % 600);
      for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
      std::copy(
          file.end() - std::min<std::ptrdiff_t>(16, static_cast<std::ptrdiff_t>(bytes.size())),
          file.end(),
          bytes.end() - std::min<std::ptrdiff_t>(16, static_cast<std::ptrdiff_t>(bytes.size())));
    } else if (round % 3 == 1) {  // a footer with some bytes overwritten, rightly signed
      std::string footer = unsigned_footer(fake_artifact());
      for (int n = 0; n < 3; ++n) footer[random() % footer.size()] = static_cast<char>(random());
      bytes = file_with_footer(fake_artifact().cubin, footer);
      if (footer == unsigned_footer(fake_artifact())) continue;
    } else {  // a run of an entry overwritten
      bytes = file;
      const std::size_t begin = random() % bytes.size();
      const std::size_t end = std::min(bytes.size(), begin + random() % 64);
      for (std::size_t i = begin; i < end; ++i) bytes[i] = static_cast<std::byte>(random());
      if (bytes == file) continue;
    }
    std::string why;
    const auto decoded = decode_artifact(bytes, why);
    // A rightly signed footer may say other things, but never something that is not written back
    // so.
    if (decoded) {
      ASSERT_EQ(round % 3, 1);
      ASSERT_NE(*decoded, fake_artifact());
    } else {
      ASSERT_FALSE(why.empty());
    }
  }
}

TEST(Artifact, SaysWhatIsWrongFirst) {
  const Artifact artifact = fake_artifact();
  const Bytes file = encode_artifact(artifact);
  const std::string footer = unsigned_footer(artifact);
  EXPECT_EQ(why_refused({}), "it is empty");
  EXPECT_THAT(why_refused(artifact.cubin), HasSubstr("does not end in this library's magic"));

  Bytes flipped = file;
  flipped[1000] ^= std::byte{1};
  EXPECT_EQ(why_refused(flipped), "its code fails its sha256");
  flipped = file;
  flipped[artifact.cubin.size() + 40] ^= std::byte{1};
  EXPECT_EQ(why_refused(flipped), "its footer fails its sha256");
  flipped = file;
  flipped[file.size() - 10] = std::byte{0xff};
  EXPECT_EQ(why_refused(flipped), "its footer length is impossible");

  const auto edited = [&](const std::string& from, const std::string& to) {
    return why_refused(file_with_footer(artifact.cubin, replaced(footer, from, to)));
  };
  EXPECT_EQ(edited("artifact=1", "artifact=2"), "its schema is '2', this version reads 1");
  EXPECT_THAT(edited("nvrtc=", "compiler="), HasSubstr("no field 'nvrtc'"));
  EXPECT_THAT(edited("registers=255", "registers=many"), HasSubstr("'entry.0.registers' is not a"));
  EXPECT_THAT(edited("registers=255", "registers=255 "), HasSubstr("'entry.0.registers' is not a"));
  EXPECT_THAT(edited("entries=2", "entries=4000000000"), HasSubstr("no field 'entry.2.name'"));
  EXPECT_THAT(edited("cubin_bytes=5000", "cubin_bytes=4999"), HasSubstr("its length is not"));
  EXPECT_THAT(edited("key=", "key=0"), HasSubstr("'key' is not a key"));
  EXPECT_THAT(edited("nvrtc=13.0.88", "nvrtc=thirteen"), HasSubstr("has no major"));
  EXPECT_THAT(why_refused(file_with_footer(artifact.cubin, footer, false)),
              HasSubstr("its footer fails its sha256"));
  EXPECT_THAT(why_refused(file_with_footer(artifact.cubin, footer + "more=1\n")),
              HasSubstr("no field 'footer_sha256'"));
}

TEST(Artifact, WantsACudaElf) {
  Artifact artifact = fake_artifact();
  artifact.cubin[18] = std::byte{62};  // x86-64
  EXPECT_EQ(refuse_artifact(artifact), "its code is not a CUDA ELF image");
  artifact = fake_artifact();
  artifact.cubin[0] = std::byte{0};
  EXPECT_EQ(refuse_artifact(artifact), "its code is not a CUDA ELF image");
  artifact.cubin.clear();
  EXPECT_EQ(refuse_artifact(artifact), "its code is not a CUDA ELF image");

  // Also where the digests are right.
  Artifact other = fake_artifact();
  std::string footer = unsigned_footer(other);
  Bytes cubin = other.cubin;
  cubin[18] = std::byte{62};
  footer = replaced(footer, to_hex(sha256(other.cubin)), to_hex(sha256(cubin)));
  EXPECT_EQ(why_refused(file_with_footer(cubin, footer)), "its code is not a CUDA ELF image");
}

TEST(Artifact, RefusesToEncodeWhatItCouldNotReadBack) {
  const auto refused = [](auto change) {
    Artifact artifact = fake_artifact();
    change(artifact);
    EXPECT_THROW(encode_artifact(artifact), Error);
    return refuse_artifact(artifact).value_or("accepted");
  };
  EXPECT_THAT(refused([](Artifact& a) { a.spec += "\nnvrtc=1"; }), HasSubstr("its spec"));
  EXPECT_THAT(refused([](Artifact& a) { a.target.clear(); }), HasSubstr("its target"));
  EXPECT_THAT(refused([](Artifact& a) { a.nvrtc = "unknown"; }), HasSubstr("has no major"));
  EXPECT_THAT(refused([](Artifact& a) { a.entries[0].name = "a\rb"; }), HasSubstr("entry name"));
  EXPECT_THAT(refused([](Artifact& a) { a.spec.assign(5000, 'x'); }), HasSubstr("its spec"));
  EXPECT_THAT(refused([](Artifact& a) { a.entries.resize(1000, a.entries[0]); }),
              HasSubstr("too many entries"));
  EXPECT_EQ(refuse_artifact(fake_artifact()), std::nullopt);
}

TEST(Artifact, TheLargestAcceptedFooterIsReadBack) {
  Artifact artifact = fake_artifact();
  artifact.spec.assign(4096, 's');
  artifact.entries.assign(128, artifact.entries[0]);
  for (EntryFacts& entry : artifact.entries) entry.name.assign(4096, 'e');
  std::string why;
  EXPECT_EQ(decode_artifact(encode_artifact(artifact), why), artifact) << why;
}

TEST(NvrtcMajor, IsTheFirstNumber) {
  EXPECT_EQ(nvrtc_major("13.0.88"), 13);
  EXPECT_EQ(nvrtc_major("12"), 12);
  for (const char* bad : {"", "13x", "x13", "0.1", "-1.2", " 13", "99999999999"}) {
    EXPECT_EQ(nvrtc_major(bad), std::nullopt) << bad;
  }
}

}  // namespace
}  // namespace treeattn
