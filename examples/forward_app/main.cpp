// Several answers to one prompt, attended to in one call, checked against each answer alone behind
// a copy of the prompt. Runs on the CPU executor; a CUDA engine takes the same calls with device
// pointers and a stream.
#include <treeattn/treeattn.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

namespace {

constexpr int kHeads = 4;
constexpr int kHeadsKv = 2;
constexpr int kHeadDim = 64;

/// The result for one packed sequence, [tokens, heads, head_dim].
std::vector<float> attend(treeattn::Engine& engine, treeattn::PlanInputs inputs,
                          const std::vector<float>& q, const std::vector<float>& k,
                          const std::vector<float>& v) {
  const auto tokens = static_cast<std::int32_t>(q.size() / (kHeads * kHeadDim));
  const std::int32_t cu_seqlens[] = {0, tokens};  // a batch of one sequence
  inputs.cu_seqlens_q = cu_seqlens;
  inputs.cu_seqlens_k = cu_seqlens;

  const treeattn::Shape shape{
      .dtype = treeattn::DType::kF32, .heads = kHeads, .heads_kv = kHeadsKv, .head_dim = kHeadDim};
  // The plan holds who sees whom. It is made once per batch and serves every layer.
  const treeattn::Plan plan = engine.plan_for(tokens, tokens, 1, {&shape, 1});
  std::vector<std::int32_t> plan_buffer(treeattn::plan_bytes(plan) / sizeof(std::int32_t));
  engine.build_plan(plan, inputs, plan_buffer.data());
  if (const auto report = engine.validate(plan, plan_buffer.data()); !report.valid) {
    throw treeattn::Error(treeattn::ErrorCode::kInvalidTree, report.message);
  }

  std::vector<float> out(q.size());
  std::vector<std::byte> workspace(engine.forward_workspace_bytes(plan, shape));
  treeattn::ForwardArgs args;
  args.dtype = shape.dtype;
  args.heads = kHeads;
  args.heads_kv = kHeadsKv;
  args.head_dim = kHeadDim;
  args.q = {q.data(), kHeads * kHeadDim, kHeadDim};  // data, token stride, head stride
  args.k = {k.data(), kHeadsKv * kHeadDim, kHeadDim};
  args.v = {v.data(), kHeadsKv * kHeadDim, kHeadDim};
  args.out = {out.data(), kHeads * kHeadDim, kHeadDim};
  args.softmax_scale = 1.0 / std::sqrt(kHeadDim);
  args.plan = &plan;
  args.plan_buffer = plan_buffer.data();
  args.workspace = workspace.data();
  args.workspace_bytes = workspace.size();
  engine.forward(args);
  return out;
}

/// The rows [0, prompt) and [begin, end) of a [tokens, width] array.
std::vector<float> path_rows(const std::vector<float>& all, int width, std::int64_t prompt,
                             std::int64_t begin, std::int64_t end) {
  std::vector<float> rows(all.begin(), all.begin() + prompt * width);
  rows.insert(rows.end(), all.begin() + begin * width, all.begin() + end * width);
  return rows;
}

int run() {
  // A prompt of 96 tokens and three answers below it: {parent, tokens} of each node.
  const treeattn::TreeNode nodes[] = {{-1, 96}, {0, 32}, {0, 57}, {0, 24}};
  const auto tree = treeattn::Tree::from_nodes(nodes);
  std::vector<std::int32_t> start;
  std::vector<std::int32_t> end;
  tree.append_arrays(start, end);
  treeattn::PlanInputs inputs;
  inputs.tree_dfs_order_start_q = start.data();
  inputs.tree_dfs_order_end_k = end.data();

  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const auto tensor = [&](int heads) {
    std::vector<float> values(tree.tokens() * heads * kHeadDim);
    std::generate(values.begin(), values.end(), [&] { return normal(random); });
    return values;
  };
  const auto q = tensor(kHeads);
  const auto k = tensor(kHeadsKv);
  const auto v = tensor(kHeadsKv);

  treeattn::Engine engine({.kind = treeattn::EngineKind::kCpu});
  const auto out = attend(engine, inputs, q, k, v);
  std::printf("%s: %lld tokens in place of %lld\n", engine.description().c_str(),
              static_cast<long long>(tree.tokens()),
              static_cast<long long>(tree.unshared_tokens()));

  float worst = 0;
  const std::int64_t prompt = nodes[0].length;
  std::int64_t begin = prompt;
  for (std::size_t answer = 1; answer < std::size(nodes); ++answer) {
    const std::int64_t past = begin + nodes[answer].length;
    treeattn::PlanInputs causal;
    causal.lowering = treeattn::Lowering::kCausal;
    const auto alone = attend(engine, causal, path_rows(q, kHeads * kHeadDim, prompt, begin, past),
                              path_rows(k, kHeadsKv * kHeadDim, prompt, begin, past),
                              path_rows(v, kHeadsKv * kHeadDim, prompt, begin, past));
    const auto shared = path_rows(out, kHeads * kHeadDim, prompt, begin, past);
    for (std::size_t i = 0; i < alone.size(); ++i) {
      // Written so that a NaN counts as a difference.
      if (!(std::abs(alone[i] - shared[i]) <= worst)) worst = std::abs(alone[i] - shared[i]);
    }
    begin = past;
  }
  std::printf("largest difference from each answer alone: %.2g\n", static_cast<double>(worst));
  return worst < 1e-5F ? 0 : 1;
}

}  // namespace

int main() {
  try {
    return run();
  } catch (const treeattn::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
