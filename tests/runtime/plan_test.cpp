#include "runtime/attention/plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <climits>
#include <functional>
#include <string>
#include <vector>

#include "treeattn/error.h"

namespace treeattn {
namespace {

PlanShape some_shape() {
  PlanShape shape{};
  shape.total_q = 300;
  shape.total_k = 500;
  shape.batch = 3;
  shape.num_views = 4;
  shape.views[0] = {16, 16};
  shape.views[1] = {64, 32};
  shape.views[2] = {32, 128};
  shape.views[3] = {128, 64};
  return shape;
}

TEST(PlanHeader, ConvertsBothWaysAndCountsBytes) {
  const PlanShape shape = some_shape();
  const Plan plan = to_plan(shape);
  const PlanShape again = to_plan_shape(plan);
  EXPECT_EQ(plan_offsets(again).total_ints, plan_offsets(shape).total_ints);
  EXPECT_EQ(plan_bytes(plan), static_cast<std::size_t>(plan_offsets(shape).total_ints) * 4);
  EXPECT_EQ(find_view(again, 32, 128), 2);
  EXPECT_EQ(find_view(again, 32, 64), -1);
}

TEST(PlanHeader, RefusesWhatIsNotAPlan) {
  const auto message = [](const std::function<void(Plan&)>& damage) -> std::string {
    Plan plan = to_plan(some_shape());
    damage(plan);
    try {
      to_plan_shape(plan);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
      return error.what();
    }
    return "accepted";
  };
  using ::testing::HasSubstr;
  EXPECT_THAT(message([](Plan& p) { p.version = 9; }), HasSubstr("plan.version is 9"));
  EXPECT_THAT(message([](Plan& p) { p.struct_size = 4; }), HasSubstr("plan.struct_size is 4"));
  EXPECT_THAT(message([](Plan& p) { p.total_q = -1; }), HasSubstr("plan.total_q is -1"));
  EXPECT_THAT(message([](Plan& p) { p.batch = INT_MAX; }), HasSubstr("plan.batch"));
  EXPECT_THAT(message([](Plan& p) { p.num_views = 9; }), HasSubstr("plan.num_views is 9"));
  EXPECT_THAT(message([](Plan& p) { p.views[1].block_n = 40; }),
              HasSubstr("plan.views[1].block_n is 40, expected a positive multiple of 16"));
  EXPECT_THAT(message([](Plan& p) { p.views[0].block_m = 6; }),
              HasSubstr("plan.views[0].block_m is 6, expected a positive multiple of 4"));
  EXPECT_EQ(message([](Plan& p) { p.views[0].block_m = 24; }), "accepted");
}

TEST(PlanReportTest, ABufferNobodyBuiltIsNotValid) {
  const PlanShape shape = some_shape();
  const std::vector<int> buffer(static_cast<std::size_t>(plan_report_ints(shape)), 0);
  EXPECT_FALSE(report_faults(shape, buffer.data()).valid);
}

}  // namespace
}  // namespace treeattn
