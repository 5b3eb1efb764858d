// The emulator finds what it is there to find.
#include "tests/emulator/device.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <stdexcept>
#include <string>

namespace emulator {
namespace {

using testing::HasSubstr;

constexpr unsigned kSmemBytes = 1024;

/// What is wrong with a kernel of four warps in some order of events; empty: nothing.
std::string trouble(void (*kernel)(const void*)) {
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    try {
      launch({128, kSmemBytes, kernel}, {1, 1, 1}, nullptr, seed);
    } catch (const std::runtime_error& error) {
      return error.what();
    }
  }
  return {};
}

TEST(Emulator, RunsWhatIsRight) {
  EXPECT_EQ(trouble([](const void*) {
              const unsigned i = thread_index().x;
              store_shared(kSharedBase + i * 4, i);
              meet_block();
              const unsigned other = load_shared<unsigned>(kSharedBase + (127 - i) * 4);
              if (other != 127 - i) fail("another number");
              if (reduce_add(1) != 32 || shuffle(i, 5) != i / 32 * 32 + 5) fail("other lanes");
            }),
            "");
}

TEST(Emulator, FindsABarrierThatSomeDoNotReach) {
  EXPECT_THAT(trouble([](const void*) {
                if (thread_index().x < 64) meet_block();
              }),
              HasSubstr("no thread can go on"));
}

TEST(Emulator, FindsAMissingBarrier) {
  EXPECT_THAT(trouble([](const void*) {
                const unsigned i = thread_index().x;
                store_shared(kSharedBase + i * 4, i);
                if (load_shared<unsigned>(kSharedBase + (127 - i) * 4) != 127 - i)
                  fail("too early");
              }),
              HasSubstr("too early"));
}

TEST(Emulator, FindsLanesThatMeetInDifferentInstructions) {
  EXPECT_THAT(trouble([](const void*) {
                if (thread_index().x % 2 == 0) {
                  reduce_or(1);
                } else {
                  reduce_add(1);
                }
              }),
              HasSubstr("different instructions"));
}

TEST(Emulator, FindsAccessesOutsideOfSharedMemory) {
  EXPECT_THAT(trouble([](const void*) { store_shared(kSharedBase + kSmemBytes, 1); }),
              HasSubstr("outside of shared memory, at 1024"));
  EXPECT_THAT(trouble([](const void*) { load_shared<int>(kSharedBase - 4); }),
              HasSubstr("outside of shared memory"));
  EXPECT_THAT(trouble([](const void*) { load_shared<int>(kSharedBase + 2); }),
              HasSubstr("not aligned"));
}

TEST(Emulator, FindsACopyThatIsNotWaitedFor) {
  EXPECT_THAT(trouble([](const void*) {
                alignas(16) static const int from[4] = {1, 2, 3, 4};
                const std::uint32_t at = kSharedBase + thread_index().x * 4;
                async_copy(at, from, 4, true);
                async_commit();
                async_wait(1);
                if (load_shared<int>(at) != 1) fail("too early");
              }),
              HasSubstr("too early"));
}

TEST(Emulator, FindsAnMbarrierThatExpectsMore) {
  EXPECT_THAT(trouble([](const void*) {
                if (thread_index().x == 0) mbarrier_init(kSharedBase, 2);
                meet_block();
                if (thread_index().x == 0) mbarrier_arrive(kSharedBase, 0);
                mbarrier_wait(kSharedBase, 0);
              }),
              HasSubstr("an mbarrier"));
}

}  // namespace
}  // namespace emulator
