#include "runtime/cuda/tensor_map.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>

#include "tests/support/fake_driver.h"
#include "treeattn/error.h"

namespace treeattn {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

alignas(16) std::byte memory[64];

TensorMapRequest request() {
  return {memory,
          KernelDType::kBF16,
          /*dims=*/72,
          /*heads=*/4,
          /*tokens=*/1000,
          /*token_stride=*/4 * 72,
          /*head_stride=*/72,
          /*rows=*/64};
}

TEST(TensorMap, AsksTheDriverForBoxesOfOneHead) {
  const test::FakeDriver driver;
  const TensorMap map = encode_tensor_map(request());
  EXPECT_NE(map.opaque[0], 0U);
  ASSERT_THAT(driver.tensor_maps(), SizeIs(1));
  const auto seen = driver.tensor_maps()[0];
  EXPECT_EQ(seen.type, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16);
  EXPECT_EQ(seen.data, memory);
  EXPECT_THAT(seen.sizes, ElementsAre(72, 4, 1000));
  EXPECT_THAT(seen.strides, ElementsAre(2 * 72, 2 * 4 * 72));
  EXPECT_THAT(seen.box, ElementsAre(64, 1, 64));
  EXPECT_EQ(seen.swizzle, CU_TENSOR_MAP_SWIZZLE_128B);
}

TEST(TensorMap, DTypeIsTheTensors) {
  const test::FakeDriver driver;
  TensorMapRequest f16 = request();
  f16.dtype = KernelDType::kF16;
  encode_tensor_map(f16);
  ASSERT_THAT(driver.tensor_maps(), SizeIs(1));
  EXPECT_EQ(driver.tensor_maps()[0].type, CU_TENSOR_MAP_DATA_TYPE_FLOAT16);
}

TEST(TensorMap, AnEmptyTensorNeedsNone) {
  const test::FakeDriver driver;
  TensorMapRequest empty = request();
  empty.tokens = 0;
  empty.data = nullptr;
  EXPECT_TRUE(fits_tensor_map(empty));
  EXPECT_THAT(encode_tensor_map(empty).opaque, Each(0U));
  EXPECT_THAT(driver.tensor_maps(), IsEmpty());
}

TEST(TensorMap, StridesOfASingleTokenOrHeadAreIgnored) {
  const test::FakeDriver driver;
  TensorMapRequest one = request();
  one.tokens = one.heads = 1;
  one.token_stride = 0;
  one.head_stride = -8;
  EXPECT_TRUE(fits_tensor_map(one));
  encode_tensor_map(one);
  ASSERT_THAT(driver.tensor_maps(), SizeIs(1));
  EXPECT_THAT(driver.tensor_maps()[0].strides, ElementsAre(16, 16));
}

TEST(TensorMap, HeadsWithoutAStrideAreOne) {
  const test::FakeDriver driver;
  TensorMapRequest shared = request();
  EXPECT_EQ(shared.head_step(), 1);
  shared.head_stride = 0;
  EXPECT_EQ(shared.head_step(), 0);
  encode_tensor_map(shared);
  ASSERT_THAT(driver.tensor_maps(), SizeIs(1));
  EXPECT_THAT(driver.tensor_maps()[0].sizes, ElementsAre(72, 1, 1000));
}

TEST(TensorMap, ABoxMayHoldSeveralHeads) {
  const test::FakeDriver driver;
  TensorMapRequest packed = request();
  packed.box_heads = 4;
  packed.rows = 16;
  EXPECT_TRUE(fits_tensor_map(packed));
  encode_tensor_map(packed);
  ASSERT_THAT(driver.tensor_maps(), SizeIs(1));
  EXPECT_THAT(driver.tensor_maps()[0].sizes, ElementsAre(72, 4, 1000));
  EXPECT_THAT(driver.tensor_maps()[0].box, ElementsAre(64, 4, 16));
  packed.head_stride = 0;  // all heads are the map's one
  EXPECT_FALSE(fits_tensor_map(packed));
}

TEST(TensorMap, StridesThatItCannotHoldDoNotFit) {
  EXPECT_TRUE(fits_tensor_map(request()));
  for (const std::int64_t stride : {std::int64_t{0}, std::int64_t{-64}, std::int64_t{1} << 39}) {
    TensorMapRequest bad = request();
    bad.token_stride = stride;
    EXPECT_FALSE(fits_tensor_map(bad)) << stride;
    bad = request();
    bad.head_stride = stride;
    EXPECT_EQ(fits_tensor_map(bad), stride == 0) << stride;
  }
}

TEST(TensorMapCache, AsksAgainForAnyOtherRequestOnly) {
  const test::FakeDriver driver;
  TensorMapCache cache;
  const TensorMap first = cache.get(request());
  EXPECT_EQ(cache.get(request()).opaque[0], first.opaque[0]);
  EXPECT_THAT(driver.tensor_maps(), SizeIs(1));
  std::size_t asked = 1;
  const auto changes = std::to_array<void (*)(TensorMapRequest&)>({
      [](TensorMapRequest& r) { r.data = memory + 16; },
      [](TensorMapRequest& r) { r.dtype = KernelDType::kF16; },
      [](TensorMapRequest& r) { r.dims = 64; },
      [](TensorMapRequest& r) { r.heads = 2; },
      [](TensorMapRequest& r) { r.tokens = 999; },
      [](TensorMapRequest& r) { r.token_stride += 8; },
      [](TensorMapRequest& r) { r.head_stride += 8; },
      [](TensorMapRequest& r) { r.rows = 16; },
      [](TensorMapRequest& r) { r.box_heads = 2; },
  });
  for (const auto change : changes) {
    TensorMapRequest other = request();
    change(other);
    const TensorMap map = cache.get(other);
    ASSERT_THAT(driver.tensor_maps(), SizeIs(++asked));
    EXPECT_EQ(cache.get(other).opaque[0], map.opaque[0]);
    EXPECT_NE(cache.get(request()).opaque[0], map.opaque[0]);
    asked = driver.tensor_maps().size();  // the first one again, where it was displaced
  }
}

TEST(TensorMapCache, ARefusedRequestIsNotKept) {
  test::FakeDriver driver;
  TensorMapCache cache;
  driver.tensor_map_result = CUDA_ERROR_INVALID_VALUE;
  EXPECT_THROW(cache.get(request()), Error);
  driver.tensor_map_result = CUDA_SUCCESS;
  EXPECT_NE(cache.get(request()).opaque[0], 0U);
}

TEST(TensorMap, ARefusalNamesTheTensor) {
  test::FakeDriver driver;
  driver.tensor_map_result = CUDA_ERROR_INVALID_VALUE;
  try {
    encode_tensor_map(request());
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kCudaError);
    EXPECT_THAT(error.what(), HasSubstr("1000 tokens x 4 heads x 72 dims"));
  }
}

}  // namespace
}  // namespace treeattn
