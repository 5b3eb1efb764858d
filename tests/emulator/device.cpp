#include "tests/emulator/device.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <unordered_map>
#include <utility>

#include "runtime/attention/half.h"
#include "runtime/attention/splitmix.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {
namespace {

using Task = std::function<void()>;

constexpr std::size_t kStackBytes = std::size_t{256} << 10;
constexpr int kWarp = 32;
constexpr int kWarpgroup = 128;

/// A counter that changes once, and who waits for that.
struct Wait {
  const std::uint32_t* counter = nullptr;  ///< null: runnable
  std::uint32_t seen = 0;
  const char* what = "";
};

struct Thread {
  Index index;
  ucontext_t context{};
  std::unique_ptr<std::byte[]> stack{new std::byte[kStackBytes]};
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
#else
  jmp_buf jump{};
  bool started = false;
#endif
  Wait wait;
  bool done = false;
  std::vector<Task> open_copies;
  std::vector<std::vector<Task>> copy_groups;
  std::vector<Task> bulk;
  std::vector<std::pair<int, WarpgroupMma>> mmas;  ///< with their groups; those not yet executed
  int mmas_issued = 0;
  int mma_group = 0;
};

struct Meeting {
  int arrived = 0;
  std::uint32_t generation = 0;
  std::array<void*, kWarp> brought{};
  void (*compute)(void* const*) = nullptr;
};

struct Counted {
  std::uint32_t arrived = 0;
  std::uint32_t generation = 0;
};

struct Mbarrier {
  std::uint32_t arrivals = 0;
  std::uint32_t pending = 0;
  std::int64_t bytes = 0;
  std::uint32_t phase = 0;
};

struct Block {
  const Entry* kernel = nullptr;
  const void* params = nullptr;
  Index index, grid, size;
  std::vector<Thread> threads;
  std::vector<unsigned char> shared;
  std::vector<Meeting> warps;
  std::vector<Counted> warpgroups;
  std::array<Counted, 16> barriers;
  std::unordered_map<std::uint32_t, Mbarrier> mbarriers;
  std::vector<Task> engine;  ///< what the copy engine has to do
#if defined(__SANITIZE_ADDRESS__)
  ucontext_t scheduler{};
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_stack_bytes = 0;
#else
  jmp_buf scheduler_jump{};
#endif
  Thread* current = nullptr;  ///< null: the scheduler runs
  std::string error;
  treeattn::SplitMix64 rng{0};
  std::vector<int> slowness;  ///< a warp gets on once in so many rounds
  int laziness = 1;           ///< what need not happen yet happens once in so many opportunities
};

Block* block = nullptr;

// Threads and the scheduler take turns on one stack each. swapcontext() asks the kernel for the
// signal mask every time, so that it only starts threads; AddressSanitizer knows no other way.
#if defined(__SANITIZE_ADDRESS__)

void to_scheduler(bool last) {
  Thread& thread = *block->current;
  __sanitizer_start_switch_fiber(last ? nullptr : &thread.fake_stack, block->scheduler_stack,
                                 block->scheduler_stack_bytes);
  swapcontext(&thread.context, &block->scheduler);
  __sanitizer_finish_switch_fiber(thread.fake_stack, nullptr, nullptr);
}

void to_thread(Thread& thread) {
  block->current = &thread;
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, thread.stack.get(), kStackBytes);
  swapcontext(&block->scheduler, &thread.context);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
  block->current = nullptr;
}

void begin_thread() {
  __sanitizer_finish_switch_fiber(nullptr, &block->scheduler_stack, &block->scheduler_stack_bytes);
}

#else

void to_scheduler(bool) {
  if (_setjmp(block->current->jump) == 0) _longjmp(block->scheduler_jump, 1);
}

void to_thread(Thread& thread) {
  block->current = &thread;
  if (_setjmp(block->scheduler_jump) == 0) {
    if (thread.started) _longjmp(thread.jump, 1);
    thread.started = true;
    setcontext(&thread.context);
  }
  block->current = nullptr;
}

void begin_thread() {}

#endif

void wait_for_change(const std::uint32_t& counter, std::uint32_t seen, const char* what) {
  while (counter == seen) {
    block->current->wait = {&counter, seen, what};
    to_scheduler(false);
  }
}

void thread_main() {
  begin_thread();
  block->kernel->run(block->params);
  Thread& thread = *block->current;
  if (!thread.mmas.empty()) fail("a thread ends while its MMAs run");
  if (!thread.bulk.empty()) fail("a thread ends while its bulk operations run");
  thread.done = true;
  to_scheduler(true);
}

bool runnable(const Thread& thread) {
  if (thread.done) return false;
  return thread.wait.counter == nullptr || *thread.wait.counter != thread.wait.seen;
}

bool chance(int one_in) {
  return block->rng.below(one_in) == 0;
}

void run_all(std::vector<Task>& tasks) {
  for (const Task& task : tasks) task();
  tasks.clear();
}

/// Now or later.
void hand_to_engine(Task task) {
  if (chance(block->laziness)) {
    task();
  } else {
    block->engine.push_back(std::move(task));
  }
}

void run_some_of_the_engine() {
  std::vector<Task> left;
  for (Task& task : std::exchange(block->engine, {})) {
    if (chance(block->laziness)) {
      task();
    } else {
      left.push_back(std::move(task));
    }
  }
  block->engine = std::move(left);
}

void run_one_of_the_engine() {
  std::vector<Task>& tasks = block->engine;
  const auto at =
      static_cast<std::size_t>(block->rng.below(static_cast<std::int64_t>(tasks.size())));
  const Task task = std::move(tasks[at]);
  tasks.erase(tasks.begin() + static_cast<std::ptrdiff_t>(at));
  task();
}

std::string describe_deadlock() {
  std::string text = "no thread can go on:";
  for (std::size_t first = 0; first < block->threads.size(); first += kWarp) {
    const Thread& thread = block->threads[first];
    text += "\n  warp " + std::to_string(first / kWarp) + ": " +
            (thread.done ? "done" : thread.wait.what);
  }
  return text;
}

void run_block() {
  Block& b = *block;
  std::vector<int> order(b.threads.size() / kWarp);
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
  while (true) {
    bool all_done = true;
    bool progress = false;
    for (std::size_t i = order.size(); i > 1; --i) {
      std::swap(order[i - 1],
                order[static_cast<std::size_t>(b.rng.below(static_cast<std::int64_t>(i)))]);
    }
    for (const int warp : order) {
      const bool held_up = !chance(b.slowness[static_cast<std::size_t>(warp)]);
      for (int lane = 0; lane < kWarp; ++lane) {
        Thread& thread = b.threads[static_cast<std::size_t>(warp) * kWarp + lane];
        all_done = all_done && thread.done;
        if (!runnable(thread)) continue;
        progress = true;
        if (held_up) continue;
        thread.wait = {};
        to_thread(thread);
        if (!b.error.empty()) throw std::runtime_error(std::exchange(b.error, {}));
      }
    }
    if (all_done) break;
    if (progress) {
      run_some_of_the_engine();
    } else if (!b.engine.empty()) {
      run_one_of_the_engine();
    } else {
      throw std::runtime_error(describe_deadlock());
    }
    if (!b.error.empty()) throw std::runtime_error(std::exchange(b.error, {}));
  }
  if (!b.engine.empty()) throw std::runtime_error("the block ended while copies were under way");
}

Mbarrier& mbarrier(std::uint32_t address) {
  const auto found = block->mbarriers.find(address);
  if (found == block->mbarriers.end()) fail("a barrier is used before it was made");
  return found->second;
}

void settle(Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.arrivals;
}

/// With the 128-byte swizzle: bits 4..6 of an address are exchanged with 7..9 (PTX ISA, matrices in
/// shared memory).
std::uint32_t swizzled(std::uint32_t address) {
  return address ^ ((address >> 7 & 7) << 4);
}

std::uint32_t descriptor_start(std::uint64_t descriptor) {
  return static_cast<std::uint32_t>(descriptor & 0x3fff) << 4;
}
std::uint32_t descriptor_leading(std::uint64_t descriptor) {
  return static_cast<std::uint32_t>(descriptor >> 16 & 0x3fff) << 4;
}
std::uint32_t descriptor_stride(std::uint64_t descriptor) {
  return static_cast<std::uint32_t>(descriptor >> 32 & 0x3fff) << 4;
}

constexpr int kDepth = 16;

/// Executes the oldest MMA of a warpgroup; every thread has issued it.
void execute_mma(std::size_t warpgroup) {
  Thread* const threads = block->threads.data() + warpgroup * kWarpgroup;
  const WarpgroupMma& first = threads[0].mmas.front().second;
  const int columns = first.columns;
  std::vector<float> a(std::size_t{64} * kDepth);
  std::vector<float> b(static_cast<std::size_t>(columns) * kDepth);
  const auto number = [&](std::uint32_t address) {
    return first.decode(load_shared<std::uint16_t>(swizzled(address)));
  };
  for (int t = 0; t < kWarpgroup; ++t) {
    const WarpgroupMma& mma = threads[t].mmas.front().second;
    if (mma.b != first.b || mma.a != first.a || mma.columns != columns) {
      fail("threads of a warpgroup issue different MMAs");
    }
    if (mma.a_registers == nullptr) continue;
    const int row = t / kWarp * 16 + t % kWarp / 4;
    for (int i = 0; i < 4; ++i) {
      for (int e = 0; e < 2; ++e) {
        const int k = t % 4 * 2 + i / 2 * 8 + e;
        a[static_cast<std::size_t>(row + i % 2 * 8) * kDepth + k] =
            first.decode(static_cast<std::uint16_t>(mma.a_registers[i] >> 16 * e));
      }
    }
  }
  if (first.a_registers == nullptr) {
    for (int row = 0; row < 64; ++row) {
      for (int k = 0; k < kDepth; ++k) {
        a[static_cast<std::size_t>(row) * kDepth + k] =
            number(descriptor_start(first.a) + row / 8 * descriptor_stride(first.a) +
                   row % 8 * 128 + k * 2);
      }
    }
  }
  for (int n = 0; n < columns; ++n) {
    for (int k = 0; k < kDepth; ++k) {
      const std::uint32_t at =
          first.b_transposed ? n / 64 * descriptor_leading(first.b) +
                                   k / 8 * descriptor_stride(first.b) + k % 8 * 128 + n % 64 * 2
                             : n / 8 * descriptor_stride(first.b) + n % 8 * 128 + k * 2;
      b[static_cast<std::size_t>(n) * kDepth + k] = number(descriptor_start(first.b) + at);
    }
  }
  for (int t = 0; t < kWarpgroup; ++t) {
    const WarpgroupMma& mma = threads[t].mmas.front().second;
    const int row = t / kWarp * 16 + t % kWarp / 4;
    for (int i = 0; i < columns / 2; ++i) {
      const float* x = &a[static_cast<std::size_t>(row + i / 2 % 2 * 8) * kDepth];
      const float* y = &b[static_cast<std::size_t>(i / 4 * 8 + t % 4 * 2 + i % 2) * kDepth];
      float sum = mma.accumulate ? mma.d[i] : 0.0F;
      for (int k = 0; k < kDepth; ++k) sum += x[k] * y[k];
      mma.d[i] = sum;
    }
    threads[t].mmas.erase(threads[t].mmas.begin());
  }
}

/// The block's memory is kept from launch to launch.
Block& scratch(std::size_t threads) {
  static Block kept;
  kept.threads.resize(std::max(kept.threads.size(), threads));
  return kept;
}

std::vector<Kernel>& registered() {
  static std::vector<Kernel> all;
  return all;
}

}  // namespace

Registration::Registration(Kernel kernel) {
  registered().push_back(std::move(kernel));
}

const std::vector<Kernel>& kernels() {
  return registered();
}

void launch(const Entry& kernel, Index grid, const void* params, std::uint64_t seed) {
  Block& b = scratch(kernel.threads);
  b.threads.resize(kernel.threads);
  b.kernel = &kernel;
  b.params = params;
  b.grid = grid;
  b.size = {kernel.threads, 1, 1};
  b.rng = treeattn::SplitMix64(seed);
  constexpr int kLaziness[] = {1, 2, 8, 200};
  b.laziness = kLaziness[b.rng.below(std::size(kLaziness))];
  block = &b;
  for (unsigned i = 0; i < grid.x * grid.y * grid.z; ++i) {
    b.index = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
    b.shared.assign(kernel.smem_bytes, 0xff);
    b.warps.assign(kernel.threads / kWarp, {});
    b.slowness.clear();
    for (unsigned warp = 0; warp < kernel.threads / kWarp; ++warp) {
      constexpr int kSlowness[] = {1, 2, 2, 50};
      b.slowness.push_back(kSlowness[b.rng.below(std::size(kSlowness))]);
    }
    b.warpgroups.assign(kernel.threads / kWarpgroup + 1, {});
    b.barriers = {};
    b.mbarriers.clear();
    b.engine.clear();
    for (unsigned t = 0; t < kernel.threads; ++t) {
      Thread& thread = b.threads[t];
      thread.index = {t, 0, 0};
      thread.wait = {};
      thread.done = false;
#if !defined(__SANITIZE_ADDRESS__)
      thread.started = false;
#endif
      thread.open_copies.clear();
      thread.copy_groups.clear();
      thread.bulk.clear();
      thread.mmas.clear();
      thread.mmas_issued = thread.mma_group = 0;
      getcontext(&thread.context);
      thread.context.uc_stack = {thread.stack.get(), 0, kStackBytes};
      thread.context.uc_link = nullptr;
      makecontext(&thread.context, thread_main, 0);
    }
    run_block();
  }
}

const Index& thread_index() {
  return block->current->index;
}
const Index& block_index() {
  return block->index;
}
const Index& grid_size() {
  return block->grid;
}
const Index& block_size() {
  return block->size;
}

void fail(std::string what) {
  const Thread* thread = block->current;
  if (thread == nullptr) throw std::runtime_error(what + " (by the copy engine)");
  // The scheduler throws it: an exception does not cross stacks. Nothing on this one is destroyed.
  what += " (block " + std::to_string(block->index.x) + ", thread ";
  what += std::to_string(thread->index.x) + ")";
  block->error = std::move(what);
  while (true) to_scheduler(false);
}

unsigned char* shared(std::uint32_t address, std::uint32_t bytes) {
  if (address % bytes != 0) fail("an address in shared memory is not aligned");
  if (address < kSharedBase || address + bytes > kSharedBase + block->shared.size()) {
    fail("an access outside of shared memory, at " + std::to_string(address - kSharedBase));
  }
  return block->shared.data() + (address - kSharedBase);
}

void meet_warp(void* mine, void (*compute)(void* const* lanes)) {
  const unsigned thread = thread_index().x;
  Meeting& meeting = block->warps[thread / kWarp];
  if (meeting.arrived == 0) meeting.compute = compute;
  if (meeting.compute != compute) fail("lanes of a warp meet in different instructions");
  meeting.brought[thread % kWarp] = mine;
  const std::uint32_t generation = meeting.generation;
  if (++meeting.arrived < kWarp) {
    wait_for_change(meeting.generation, generation, "the other lanes");
    return;
  }
  compute(meeting.brought.data());
  meeting.arrived = 0;
  ++meeting.generation;
}

void named_barrier(std::uint32_t id, std::uint32_t threads, bool wait) {
  Counted& barrier = block->barriers.at(id);
  const std::uint32_t generation = barrier.generation;
  if (++barrier.arrived > threads) fail("more threads at a barrier than it is for");
  if (barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.generation;
  } else if (wait) {
    wait_for_change(barrier.generation, generation, "a named barrier");
  }
}

void meet_block() {
  named_barrier(0, block->kernel->threads, true);
}

void async_copy(std::uint32_t to, const void* from, std::uint32_t bytes, bool valid) {
  if (valid && reinterpret_cast<std::uintptr_t>(from) % bytes != 0) {
    fail("cp.async reads from an address that is not aligned");
  }
  block->current->open_copies.push_back([to, from, bytes, valid] {
    unsigned char* target = shared(to, bytes);
    if (valid) {
      std::memcpy(target, from, bytes);
    } else {
      std::memset(target, 0, bytes);
    }
  });
  if (chance(block->laziness)) run_all(block->current->open_copies);
}

void async_commit() {
  Thread& thread = *block->current;
  thread.copy_groups.push_back(std::exchange(thread.open_copies, {}));
  if (chance(block->laziness)) {
    for (auto& group : thread.copy_groups) run_all(group);
  }
}

void async_wait(int pending) {
  Thread& thread = *block->current;
  while (static_cast<int>(thread.copy_groups.size()) > pending) {
    run_all(thread.copy_groups.front());
    thread.copy_groups.erase(thread.copy_groups.begin());
  }
}

void bulk_add(float* to, std::uint32_t from, std::uint32_t bytes) {
  if (reinterpret_cast<std::uintptr_t>(to) % 16 != 0 || from % 16 != 0 || bytes % 16 != 0) {
    fail("a bulk operation is not aligned");
  }
  std::vector<Task>& tasks = block->current->bulk;
  tasks.push_back([=] {
    for (std::uint32_t i = 0; i < bytes / 4; ++i) to[i] += load_shared<float>(from + i * 4);
  });
  if (chance(block->laziness)) run_all(tasks);
}

void bulk_wait() {
  run_all(block->current->bulk);
}

void mbarrier_init(std::uint32_t address, std::uint32_t arrivals) {
  shared(address, 8);
  block->mbarriers[address] = {arrivals, arrivals, 0, 0};
}

void mbarrier_arrive(std::uint32_t address, std::uint32_t expected_bytes) {
  Mbarrier& barrier = mbarrier(address);
  if (barrier.pending == 0) fail("more arrivals than a barrier was made for");
  barrier.bytes += expected_bytes;
  --barrier.pending;
  settle(barrier);
}

void mbarrier_arrive_after_copies(std::uint32_t address) {
  Thread& thread = *block->current;
  std::vector<Task> copies;
  for (auto& group : std::exchange(thread.copy_groups, {})) {
    copies.insert(copies.end(), group.begin(), group.end());
  }
  copies.insert(copies.end(), thread.open_copies.begin(), thread.open_copies.end());
  thread.open_copies.clear();
  hand_to_engine([address, copies]() mutable {
    run_all(copies);
    mbarrier_arrive(address, 0);
  });
}

void mbarrier_wait(std::uint32_t address, std::uint32_t parity) {
  const Mbarrier& barrier = mbarrier(address);
  while ((barrier.phase & 1) == parity)
    wait_for_change(barrier.phase, barrier.phase, "an mbarrier");
}

void tensor_load(std::uint32_t to, const void* map, std::uint32_t barrier, int dim, int head,
                 int token) {
  constexpr int kBoxDims = 64;
  const Tensor& tensor = **static_cast<const Tensor* const*>(map);
  if (to % 128 != 0) fail("the copy engine's target is not aligned");
  hand_to_engine([=, &tensor] {
    for (int row = 0; row < tensor.box_heads * tensor.box_tokens; ++row) {
      const int h = head + row % tensor.box_heads;
      const std::int64_t t = std::int64_t{token} + row / tensor.box_heads;
      for (int d = 0; d < kBoxDims; ++d) {
        const bool inside =
            dim + d < tensor.dims && h >= 0 && h < tensor.heads && t >= 0 && t < tensor.tokens;
        const std::uint16_t value =
            inside ? tensor.data[t * tensor.token_stride + h * tensor.head_stride + dim + d] : 0;
        store_shared(swizzled(to + row * 128 + d * 2), value);
      }
    }
    Mbarrier& counts = mbarrier(barrier);
    counts.bytes -= std::int64_t{tensor.box_heads} * tensor.box_tokens * 128;
    settle(counts);
  });
}

void wgmma(const WarpgroupMma& mma) {
  Thread& thread = *block->current;
  thread.mmas.emplace_back(thread.mma_group, mma);
  ++thread.mmas_issued;
  const std::size_t warpgroup = thread.index.x / kWarpgroup;
  const Thread* threads = block->threads.data() + warpgroup * kWarpgroup;
  // Whoever comes last may see it done at once, with all before it.
  for (int t = 0; t < kWarpgroup; ++t) {
    if (threads[t].mmas_issued < thread.mmas_issued) return;
  }
  if (!chance(block->laziness)) return;
  while (!thread.mmas.empty()) execute_mma(warpgroup);
}

void wgmma_commit() {
  ++block->current->mma_group;
}

void wgmma_wait(int pending) {
  Thread& thread = *block->current;
  const std::size_t warpgroup = thread.index.x / kWarpgroup;
  Counted& meeting = block->warpgroups[warpgroup];
  const std::uint32_t generation = meeting.generation;
  if (++meeting.arrived < kWarpgroup) {
    wait_for_change(meeting.generation, generation, "the warpgroup's MMAs");
    return;
  }
  meeting.arrived = 0;
  ++meeting.generation;
  while (!thread.mmas.empty() && thread.mmas.front().first < thread.mma_group - pending) {
    execute_mma(warpgroup);
  }
}

namespace {

struct Reduced {
  std::uint32_t value;
  std::uint32_t result;
};

template <class Combine>
void reduce(void* const* lanes, Combine combine) {
  std::uint32_t all = static_cast<Reduced*>(lanes[0])->value;
  for (int i = 1; i < kWarp; ++i) all = combine(all, static_cast<Reduced*>(lanes[i])->value);
  for (int i = 0; i < kWarp; ++i) static_cast<Reduced*>(lanes[i])->result = all;
}

struct Matrices {
  std::uint32_t* registers;
  int count;
  bool transposed;
  std::uint32_t address;
};

struct Product {
  float* d;
  const std::uint32_t* a;
  const std::uint32_t* b;
  int depth;
  float (*decode)(std::uint16_t);
};

}  // namespace

float decode_f16(std::uint16_t bits) {
  return treeattn::f16_to_float(bits);
}
float decode_bf16(std::uint16_t bits) {
  return treeattn::bf16_to_float(bits);
}
std::uint16_t encode_f16(float value) {
  return treeattn::float_to_f16(value);
}
std::uint16_t encode_bf16(float value) {
  return treeattn::float_to_bf16(value);
}

std::uint32_t reduce_or(std::uint32_t value) {
  Reduced mine{value, 0};
  meet_warp(&mine, [](void* const* lanes) {
    reduce(lanes, [](std::uint32_t a, std::uint32_t b) { return a | b; });
  });
  return mine.result;
}

std::uint32_t reduce_add(std::uint32_t value) {
  Reduced mine{value, 0};
  meet_warp(&mine, [](void* const* lanes) {
    reduce(lanes, [](std::uint32_t a, std::uint32_t b) { return a + b; });
  });
  return mine.result;
}

int reduce_min(int value) {
  Reduced mine{static_cast<std::uint32_t>(value), 0};
  meet_warp(&mine, [](void* const* lanes) {
    reduce(lanes, [](std::uint32_t a, std::uint32_t b) {
      return static_cast<std::uint32_t>(std::min(static_cast<int>(a), static_cast<int>(b)));
    });
  });
  return static_cast<int>(mine.result);
}

int reduce_max(int value) {
  return ~reduce_min(~value);
}

std::uint32_t match(std::uint32_t value) {
  Reduced mine{value, 0};
  meet_warp(&mine, [](void* const* lanes) {
    for (int i = 0; i < kWarp; ++i) {
      auto* lane = static_cast<Reduced*>(lanes[i]);
      for (int j = 0; j < kWarp; ++j) {
        if (static_cast<Reduced*>(lanes[j])->value == lane->value) lane->result |= 1U << j;
      }
    }
  });
  return mine.result;
}

std::uint32_t ballot(bool value) {
  return reduce_or(value ? 1U << thread_index().x % kWarp : 0);
}

void ldmatrix(std::uint32_t* registers, int count, bool transposed, std::uint32_t address) {
  Matrices mine{registers, count, transposed, address};
  meet_warp(&mine, [](void* const* lanes) {
    for (int l = 0; l < kWarp; ++l) {
      const auto& lane = *static_cast<const Matrices*>(lanes[l]);
      for (int m = 0; m < lane.count; ++m) {
        std::uint32_t value = 0;
        for (int e = 0; e < 2; ++e) {
          const int row = lane.transposed ? l % 4 * 2 + e : l / 4;
          const int column = lane.transposed ? l / 4 : l % 4 * 2 + e;
          const std::uint32_t at = static_cast<const Matrices*>(lanes[m * 8 + row])->address;
          shared(at, 16);
          value |= std::uint32_t{load_shared<std::uint16_t>(at + column * 2)} << 16 * e;
        }
        lane.registers[m] = value;
      }
    }
  });
}

void stmatrix(std::uint32_t address, const std::uint32_t* registers, bool transposed) {
  Matrices mine{const_cast<std::uint32_t*>(registers), 4, transposed, address};
  meet_warp(&mine, [](void* const* lanes) {
    for (int l = 0; l < kWarp; ++l) {
      const auto& lane = *static_cast<const Matrices*>(lanes[l]);
      for (int m = 0; m < lane.count; ++m) {
        for (int e = 0; e < 2; ++e) {
          const int row = lane.transposed ? l % 4 * 2 + e : l / 4;
          const int column = lane.transposed ? l / 4 : l % 4 * 2 + e;
          const std::uint32_t at = static_cast<const Matrices*>(lanes[m * 8 + row])->address;
          shared(at, 16);
          store_shared(at + column * 2, static_cast<std::uint16_t>(lane.registers[m] >> 16 * e));
        }
      }
    }
  });
}

void mma(float* d, const std::uint32_t* a, const std::uint32_t* b, int depth,
         float (*decode)(std::uint16_t)) {
  Product mine{d, a, b, depth, decode};
  meet_warp(&mine, [](void* const* lanes) {
    float left[16][16];
    float right[8][16];
    const auto steps = static_cast<std::size_t>(static_cast<const Product*>(lanes[0])->depth / 8);
    for (int l = 0; l < kWarp; ++l) {
      const auto& lane = *static_cast<const Product*>(lanes[l]);
      for (std::size_t step = 0; step < steps; ++step) {
        for (std::size_t e = 0; e < 2; ++e) {
          const std::size_t k = step * 8 + static_cast<std::size_t>(l % 4) * 2 + e;
          const auto half = [&](std::uint32_t pair) {
            return lane.decode(static_cast<std::uint16_t>(pair >> 16 * e));
          };
          left[l / 4][k] = half(lane.a[step * 2]);
          left[l / 4 + 8][k] = half(lane.a[step * 2 + 1]);
          right[l / 4][k] = half(lane.b[step]);
        }
      }
    }
    for (int l = 0; l < kWarp; ++l) {
      const auto& lane = *static_cast<const Product*>(lanes[l]);
      for (int i = 0; i < 4; ++i) {
        float sum = lane.d[i];
        for (int k = 0; k < lane.depth; ++k) {
          sum += left[l / 4 + i / 2 * 8][k] * right[l % 4 * 2 + i % 2][k];
        }
        lane.d[i] = sum;
      }
    }
  });
}

}  // namespace emulator
