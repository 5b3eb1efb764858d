#include "runtime/attention/half.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "runtime/attention/splitmix.h"

namespace treeattn {
namespace {

/// Value of a 16-bit float with `exponent_bits` bits of exponent, straight from its definition.
double decode(std::uint16_t bits, int exponent_bits) {
  const int mantissa_bits = 15 - exponent_bits;
  const int exponent = (bits & 0x7fff) >> mantissa_bits;
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const double sign = (bits & 0x8000) != 0 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) {
    return mantissa == 0 ? sign * std::numeric_limits<double>::infinity()
                         : std::numeric_limits<double>::quiet_NaN();
  }
  const double significand = exponent == 0 ? mantissa : mantissa + (1 << mantissa_bits);
  return sign * std::ldexp(significand, std::max(exponent, 1) - bias - mantissa_bits);
}

struct Format {
  const char* name;
  int exponent_bits;
  float (*load)(std::uint16_t);
  std::uint16_t (*store)(float);
};

class Half : public ::testing::TestWithParam<Format> {};

TEST_P(Half, EveryPatternDecodesAndComesBack) {
  const Format& format = GetParam();
  for (int bits = 0; bits < 0x10000; ++bits) {
    const auto pattern = static_cast<std::uint16_t>(bits);
    const double expected = decode(pattern, format.exponent_bits);
    const float value = format.load(pattern);
    if (std::isnan(expected)) {
      EXPECT_TRUE(std::isnan(value)) << bits;
      EXPECT_TRUE(std::isnan(format.load(format.store(value)))) << bits;
    } else {
      ASSERT_EQ(static_cast<double>(value), expected) << bits;
      ASSERT_EQ(format.store(value), pattern) << bits;
    }
  }
}

TEST_P(Half, MidpointsGoToEvenAndNeighboursToTheNearest) {
  const Format& format = GetParam();
  const int infinity = ((1 << format.exponent_bits) - 1) << (15 - format.exponent_bits);
  for (int bits = 0; bits < infinity; ++bits) {
    const auto low = static_cast<std::uint16_t>(bits);
    const double next = bits + 1 == infinity
                            ? 2 * decode(low, format.exponent_bits) -
                                  decode(static_cast<std::uint16_t>(bits - 1), format.exponent_bits)
                            : decode(static_cast<std::uint16_t>(bits + 1), format.exponent_bits);
    const double middle = (decode(low, format.exponent_bits) + next) / 2;
    const auto exact = static_cast<float>(middle);
    if (static_cast<double>(exact) != middle) continue;  // below float's own subnormals
    const int even = bits % 2 == 0 ? bits : bits + 1;
    ASSERT_EQ(format.store(exact), even) << bits;
    ASSERT_EQ(format.store(std::nextafter(exact, 0.0f)), bits) << bits;
    ASSERT_EQ(format.store(-std::nextafter(exact, std::numeric_limits<float>::infinity())),
              (bits + 1) | 0x8000)
        << bits;
  }
}

TEST_P(Half, NaNsWithSmallPayloadsStayNaN) {
  const Format& format = GetParam();
  for (std::uint32_t payload : {1u, 0x1000u, 0x7fffffu}) {
    const float nan = std::bit_cast<float>(0x7f800000u | payload);
    EXPECT_TRUE(std::isnan(format.load(format.store(nan)))) << payload;
  }
}

INSTANTIATE_TEST_SUITE_P(Formats, Half,
                         ::testing::Values(Format{"f16", 5, f16_to_float, float_to_f16},
                                           Format{"bf16", 8, bf16_to_float, float_to_bf16}),
                         [](const auto& format) { return std::string(format.param.name); });

TEST(SplitMix64, GivesThePublishedSequence) {
  SplitMix64 rng(1234567);
  EXPECT_EQ(rng.next(), 6457827717110365317u);
  EXPECT_EQ(rng.next(), 3203168211198807973u);
  EXPECT_EQ(rng.next(), 9817491932198370423u);
}

}  // namespace
}  // namespace treeattn
