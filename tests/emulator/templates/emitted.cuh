// What the generator emits for a spec's dtype and sizes (generator/emit.cpp), for the emulator.
#pragma once

namespace treeattn {

inline constexpr bool kIsF16 = kConfig.dtype == KernelDType::kF16;
inline constexpr auto kDecode = kIsF16 ? emulator::decode_f16 : emulator::decode_bf16;
inline constexpr auto kEncode = kIsF16 ? emulator::encode_f16 : emulator::encode_bf16;

inline void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  emulator::mma(d, a, b, 16, kDecode);
}
inline void mma_m16n8k8(float (&d)[4], const unsigned (&a)[2], const unsigned (&b)[1]) {
  emulator::mma(d, a, b, 8, kDecode);
}
inline unsigned pack2(float lo, float hi) {
  return kEncode(lo) | static_cast<unsigned>(kEncode(hi)) << 16;
}

inline float unpack_low(unsigned x) {
  return kDecode(static_cast<unsigned short>(x));
}
inline float unpack_high(unsigned x) {
  return kDecode(static_cast<unsigned short>(x >> 16));
}

template <int kSize>
void wgmma_qk(float (&d)[kSize], unsigned long long a, unsigned long long b, int accumulate) {
  emulator::wgmma({d, kSize * 2, nullptr, a, b, accumulate != 0, false, kDecode});
}
template <int kSize>
void wgmma_pv(float (&d)[kSize], const unsigned (&a)[4], unsigned long long b) {
  emulator::wgmma({d, kSize * 2, a, 0, b, true, true, kDecode});
}

}  // namespace treeattn
