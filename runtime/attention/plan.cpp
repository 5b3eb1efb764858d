#include "runtime/attention/plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <climits>
#include <cstddef>
#include <string>
#include <string_view>

#include "templates/shared/params.h"
#include "treeattn/error.h"

namespace treeattn {

static_assert(static_cast<int>(Lowering::kTree) == kLowerTree);
static_assert(static_cast<int>(Lowering::kCausal) == kLowerCausal);
static_assert(static_cast<int>(Lowering::kFull) == kLowerFull);
static_assert(static_cast<int>(Lowering::kIntervals) == kLowerIntervals);
static_assert(sizeof(Plan::views) / sizeof(Plan::View) == kMaxPlanViews);
static_assert(sizeof(QueryTile) == kQueryTileInts * sizeof(int));
static_assert(sizeof(KeyTile) == kKeyTileInts * sizeof(int));
static_assert(sizeof(KeyOrder) == 4 * sizeof(int));

namespace {

constexpr std::uint32_t kPlanVersion = 1;

[[noreturn]] void refuse(std::string_view what, std::int64_t value, std::string_view expected) {
  throw Error(ErrorCode::kInvalidArgument,
              fmt::format("plan.{} is {}, expected {}", what, value, expected),
              "use a header that plan_for() returned, unchanged");
}

void check_block(int view, std::string_view name, int block, int step) {
  if (block > 0 && block % step == 0) return;
  refuse(fmt::format("views[{}].{}", view, name), block,
         fmt::format("a positive multiple of {}", step));
}

/// The rule that a sequence with these fault bits breaks.
std::string describe_fault(int fault) {
  std::string text;
  const auto add = [&](int bit, std::string_view what) {
    if ((fault & bit) == 0) return;
    if (!text.empty()) text += "; ";
    text += what;
  };
  add(kFaultCuSeqlensQ, "cu_seqlens_q must start at 0, never decrease and stay within total_q");
  add(kFaultCuSeqlensK, "cu_seqlens_k must start at 0, never decrease and stay within total_k");
  add(kFaultStartDecreases,
      "tree_dfs_order_start_q must not decrease inside a sequence: pack tokens in DFS pre-order");
  add(kFaultInterval, "an interval (first, len) leaves the query rows of its key's sequence");
  return text;
}

}  // namespace

PlanShape to_plan_shape(const Plan& plan) {
  // Called by every forward: nothing is formatted or allocated unless something is wrong.
  if (plan.struct_size != sizeof(Plan)) {
    refuse("struct_size", plan.struct_size, fmt::format("{}", sizeof(Plan)));
  }
  if (plan.version != kPlanVersion) {
    refuse("version", plan.version, fmt::format("{}", kPlanVersion));
  }
  if (plan.total_q < 0) refuse("total_q", plan.total_q, ">= 0");
  if (plan.total_k < 0) refuse("total_k", plan.total_k, ">= 0");
  // Slot numbers are int32 and grow with totals and batch.
  const int most_batch =
      INT_MAX - std::max(plan.total_q / kViewRowsStep, plan.total_k / kGranuleKeys) - 2;
  if (plan.batch < 0 || plan.batch > most_batch) {
    refuse("batch", plan.batch, fmt::format("0 to {}", most_batch));
  }
  if (plan.num_views < 0 || plan.num_views > kMaxPlanViews) {
    refuse("num_views", plan.num_views, fmt::format("0 to {}", kMaxPlanViews));
  }
  PlanShape shape{};
  shape.total_q = plan.total_q;
  shape.total_k = plan.total_k;
  shape.batch = plan.batch;
  shape.num_views = plan.num_views;
  for (int v = 0; v < plan.num_views; ++v) {
    const Plan::View& view = plan.views[v];
    check_block(v, "block_m", view.block_m, kViewRowsStep);
    check_block(v, "block_n", view.block_n, kGranuleKeys);
    shape.views[v] = {view.block_m, view.block_n};
  }
  return shape;
}

Plan to_plan(const PlanShape& shape) {
  Plan plan;
  plan.total_q = shape.total_q;
  plan.total_k = shape.total_k;
  plan.batch = shape.batch;
  plan.num_views = shape.num_views;
  for (int v = 0; v < shape.num_views; ++v) {
    plan.views[v] = {shape.views[v].block_m, shape.views[v].block_n};
  }
  return plan;
}

std::size_t plan_bytes(const Plan& plan) {
  return static_cast<std::size_t>(plan_offsets(to_plan_shape(plan)).total_ints) *
         sizeof(std::int32_t);
}

int find_view(const PlanShape& shape, int block_m, int block_n) {
  for (int v = 0; v < shape.num_views; ++v) {
    if (shape.views[v].block_m == block_m && shape.views[v].block_n == block_n) return v;
  }
  return -1;
}

long long plan_report_ints(const PlanShape& shape) {
  return plan_offsets(shape).first;
}

PlanReport report_faults(const PlanShape& shape, const int* buffer) {
  PlanReport report;
  if (buffer[kMetaMagic] != kPlanMagic) {
    report.valid = false;
    report.message = "the buffer holds no plan: build_plan was not called on it";
    return report;
  }
  report.bad_sequences = buffer[kMetaBadSequences];
  if (report.bad_sequences == 0) return report;
  report.valid = false;
  report.first_bad_token = buffer[kMetaFirstBadToken];

  const PlanReader plan(shape, buffer);
  int sequence = 0;
  while (sequence < shape.batch && plan.seq_fault()[sequence] == kFaultNone) ++sequence;
  const int fault = sequence < shape.batch ? plan.seq_fault()[sequence] : buffer[kMetaBadKind];
  report.message =
      fmt::format("{} of {} sequences invalid, first sequence {}: {} (first offending {} {})",
                  report.bad_sequences, shape.batch, sequence, describe_fault(fault),
                  fault == kFaultInterval ? "key" : "token", report.first_bad_token);
  return report;
}

}  // namespace treeattn
