// CUDA on the CPU, as far as this project's kernels go: their own text is compiled for the host,
// with the PTX wrappers of this folder in place of templates/device's, and every thread of a block
// is a fiber. What the hardware does beside the threads (cp.async, the copy engine, wgmma) happens
// at a random moment between the earliest and the latest that the program allows, and warps run in
// a random order, so that a wait that is missing shows for some seed. Accesses to shared memory are
// checked; those to global memory are left to AddressSanitizer. Not modelled: the memory model
// (every write is seen at once), registers, time.
//
// One block at a time, on one thread of the process.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

namespace emulator {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

/// One kernel of a source.
struct Entry {
  unsigned threads = 0;
  unsigned smem_bytes = 0;  ///< of the dynamic kind
  void (*run)(const void* params) = nullptr;
};
/// The kernels of a spec, in launch order.
struct Kernel {
  std::string spec;
  std::vector<Entry> entries;
};
struct Registration {
  explicit Registration(Kernel kernel);
};
/// Every spec that was compiled for the emulator.
const std::vector<Kernel>& kernels();

/// An entry's function with the parameters at an address.
template <auto kFunction>
void run_entry(const void* params) {
  const auto call = [params]<class Params>(void (*function)(Params)) {
    function(*static_cast<const std::remove_cvref_t<Params>*>(params));
  };
  call(kFunction);
}

/// Runs the blocks of a grid one after another. Throws std::runtime_error for a deadlock, an access
/// outside of shared memory and whatever else the hardware leaves undefined.
void launch(const Entry& kernel, Index grid, const void* params, std::uint64_t seed);

// --- for kernels: where a thread is

const Index& thread_index();
const Index& block_index();
const Index& grid_size();
const Index& block_size();

// --- for the PTX wrappers

/// Reports a misuse and stops the launch.
[[noreturn]] void fail(std::string what);

/// Bytes of shared memory, checked.
unsigned char* shared(std::uint32_t address, std::uint32_t bytes);
inline constexpr std::uint32_t kSharedBase = 1024;

template <class T>
T load_shared(std::uint32_t address) {
  return *reinterpret_cast<const T*>(shared(address, sizeof(T)));
}
template <class T>
void store_shared(std::uint32_t address, const T& value) {
  *reinterpret_cast<T*>(shared(address, sizeof(T))) = value;
}

/// All lanes of a warp meet; the last one computes with what each brought. All must bring the same
/// function.
void meet_warp(void* mine, void (*compute)(void* const* lanes));
/// All threads of a block.
void meet_block();
void named_barrier(std::uint32_t id, std::uint32_t threads, bool wait);

void async_copy(std::uint32_t to, const void* from, std::uint32_t bytes, bool valid);
void async_commit();
void async_wait(int pending);

/// Adds f32s in shared memory to global memory, some time before bulk_wait().
void bulk_add(float* to, std::uint32_t from, std::uint32_t bytes);
void bulk_wait();

void mbarrier_init(std::uint32_t address, std::uint32_t arrivals);
void mbarrier_arrive(std::uint32_t address, std::uint32_t expected_bytes);
/// Once this thread's async copies so far have landed.
void mbarrier_arrive_after_copies(std::uint32_t address);
void mbarrier_wait(std::uint32_t address, std::uint32_t parity);

/// A [tokens, heads, dims] tensor of 2-byte numbers, as a tensor map describes it. A kernel's map
/// holds a pointer to one in its first word.
struct Tensor {
  const std::uint16_t* data;
  int dims, heads;
  std::int64_t tokens, token_stride, head_stride;
  int box_heads, box_tokens;
};
void tensor_load(std::uint32_t to, const void* map, std::uint32_t barrier, int dim, int head,
                 int token);

/// One wgmma of a warpgroup, as one of its threads issues it.
struct WarpgroupMma {
  float* d;
  int columns;
  const std::uint32_t* a_registers;  ///< null: a is in shared memory
  std::uint64_t a;
  std::uint64_t b;
  bool accumulate;
  bool b_transposed;  ///< MN-major
  float (*decode)(std::uint16_t);
};
void wgmma(const WarpgroupMma& mma);
void wgmma_commit();
void wgmma_wait(int pending);

// --- numbers

float decode_f16(std::uint16_t bits);
float decode_bf16(std::uint16_t bits);
std::uint16_t encode_f16(float value);
std::uint16_t encode_bf16(float value);

// --- collectives

template <class T>
T shuffle(T value, unsigned from) {
  struct Lane {
    T value;
    T result;
    unsigned from;
  };
  Lane mine{value, value, from % 32};
  meet_warp(&mine, [](void* const* lanes) {
    for (int i = 0; i < 32; ++i) {
      auto* lane = static_cast<Lane*>(lanes[i]);
      lane->result = static_cast<const Lane*>(lanes[lane->from])->value;
    }
  });
  return mine.result;
}

/// Combines all lanes' values.
std::uint32_t reduce_or(std::uint32_t value);
std::uint32_t reduce_add(std::uint32_t value);
int reduce_min(int value);
int reduce_max(int value);
/// The lanes that bring the same value.
std::uint32_t match(std::uint32_t value);
std::uint32_t ballot(bool value);

void ldmatrix(std::uint32_t* registers, int count, bool transposed, std::uint32_t address);
void stmatrix(std::uint32_t address, const std::uint32_t* registers, bool transposed);
/// d += a b of 16 x 8 x `depth` (16 or 8).
void mma(float* d, const std::uint32_t* a, const std::uint32_t* b, int depth,
         float (*decode)(std::uint16_t));

}  // namespace emulator

// The names kernels use. Macros where they must be.
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))
#define threadIdx (::emulator::thread_index())
#define blockIdx (::emulator::block_index())
#define gridDim (::emulator::grid_size())
#define blockDim (::emulator::block_size())

inline void __syncthreads() {
  emulator::meet_block();
}
inline void __syncwarp() {
  emulator::reduce_or(0);
}
template <class T>
T __shfl_sync(unsigned, T value, int from) {
  return emulator::shuffle(value, static_cast<unsigned>(from));
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::shuffle(value, emulator::thread_index().x % 32 ^ static_cast<unsigned>(mask));
}
template <class T>
T __shfl_up_sync(unsigned, T value, int distance) {
  const int lane = static_cast<int>(emulator::thread_index().x % 32);
  return emulator::shuffle(value, static_cast<unsigned>(lane < distance ? lane : lane - distance));
}
inline unsigned __ballot_sync(unsigned, bool value) {
  return emulator::ballot(value);
}
inline bool __any_sync(unsigned, bool value) {
  return emulator::ballot(value) != 0;
}
inline unsigned __reduce_or_sync(unsigned, unsigned value) {
  return emulator::reduce_or(value);
}
inline unsigned __reduce_add_sync(unsigned, unsigned value) {
  return emulator::reduce_add(value);
}
inline int __reduce_min_sync(unsigned, int value) {
  return emulator::reduce_min(value);
}
inline int __reduce_max_sync(unsigned, int value) {
  return emulator::reduce_max(value);
}
inline unsigned __match_any_sync(unsigned, unsigned value) {
  return emulator::match(value);
}
inline int __clz(int value) {
  return std::countl_zero(static_cast<unsigned>(value));
}
inline int __popc(unsigned value) {
  return std::popcount(value);
}
inline int __ffs(int value) {
  return value == 0 ? 0 : std::countr_zero(static_cast<unsigned>(value)) + 1;
}
inline float __int_as_float(int bits) {
  return std::bit_cast<float>(bits);
}
inline float __uint_as_float(unsigned bits) {
  return std::bit_cast<float>(bits);
}
inline int min(int a, int b) {
  return a < b ? a : b;
}
inline int max(int a, int b) {
  return a > b ? a : b;
}
/// Atomics change what is there to combine(what is there) and answer what was there.
template <class T, class Combine>
T atomic_change(T* at, Combine combine) {
  const T before = *at;
  *at = combine(before);
  return before;
}
template <class T>
T atomicAdd(T* at, T value) {
  return atomic_change(at, [value](T before) { return before + value; });
}
inline int atomicOr(int* at, int value) {
  return atomic_change(at, [value](int before) { return before | value; });
}
inline int atomicMin(int* at, int value) {
  return atomic_change(at, [value](int before) { return min(before, value); });
}
inline int atomicMax(int* at, int value) {
  return atomic_change(at, [value](int before) { return max(before, value); });
}
template <class T>
T atomicCAS(T* at, T expected, T value) {
  return atomic_change(at, [=](T before) { return before == expected ? value : before; });
}
