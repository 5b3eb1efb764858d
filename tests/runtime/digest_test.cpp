#include "runtime/support/digest.h"

#include <gtest/gtest.h>

#include <string>

namespace treeattn {
namespace {

TEST(Digest, MatchesThePublishedVectors) {
  EXPECT_EQ(to_hex(sha256("")), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(to_hex(sha256("abc")),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}

TEST(Digest, HexRoundTrips) {
  const Digest digest = sha256("x");
  EXPECT_EQ(digest_from_hex(to_hex(digest)), digest);
}

TEST(Digest, RefusesOtherHex) {
  const std::string hex = to_hex(sha256("abc"));
  EXPECT_FALSE(digest_from_hex(""));
  EXPECT_FALSE(digest_from_hex(hex.substr(1)));
  EXPECT_FALSE(digest_from_hex(hex + "00"));
  std::string upper = hex;
  upper[0] = 'B';
  EXPECT_FALSE(digest_from_hex(upper));
  std::string other = hex;
  other[5] = 'g';
  EXPECT_FALSE(digest_from_hex(other));
  other[5] = '\0';
  EXPECT_FALSE(digest_from_hex(other));
}

TEST(FieldHasher, PrefixesEveryFieldWithItsLength) {
  const std::string encoded = std::string("\2\0\0\0\0\0\0\0ab", 10) +
                              std::string("\0\0\0\0\0\0\0\0", 8) +
                              std::string("\x34\x12\0\0\0\0\0\0", 8);
  EXPECT_EQ(FieldHasher().field("ab").field("").number(0x1234).finish(), sha256(encoded));
}

TEST(FieldHasher, TellsAmbiguousSequencesApart) {
  const Digest joined = FieldHasher().field("ab").field("c").finish();
  EXPECT_NE(joined, FieldHasher().field("a").field("bc").finish());
  EXPECT_NE(joined, FieldHasher().field("abc").finish());
  EXPECT_NE(joined, FieldHasher().field("abc").field("").finish());
  EXPECT_NE(FieldHasher().field("").finish(), FieldHasher().finish());
}

}  // namespace
}  // namespace treeattn
