// Exact products of unsigned and signed bytes, four to a lane of 32 bits, as one instruction of the processor.
#pragma once
#include "vector.h"

namespace tqdit {

// The kinds of integer instructions that kernels can be compiled to: numbers of NAMES in ../instructions.py.
enum Instructions { GENERIC = 0, AVX512_VNNI = 1, AVX2_VNNI = 2, AVX2 = 3, I8MM = 4, DOTPROD = 5 };

#if defined(__AVX512VNNI__)
#define TQDIT_DOTS
constexpr Instructions INSTRUCTIONS = AVX512_VNNI;
// Returns the sums, to which every lane adds the products of its four unsigned bytes with its four signed ones.
inline vint add_products(vint sums, vint left, vint right) {
  return reinterpret_cast<vint>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums), reinterpret_cast<__m512i>(left),
                                                    reinterpret_cast<__m512i>(right)));
}
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
#define TQDIT_DOTS
constexpr Instructions INSTRUCTIONS = AVX2_VNNI;
inline vint add_products(vint sums, vint left, vint right) {
  return reinterpret_cast<vint>(_mm256_dpbusd_avx_epi32(reinterpret_cast<__m256i>(sums), reinterpret_cast<__m256i>(left),
                                                        reinterpret_cast<__m256i>(right)));
}
#elif defined(__AVX2__)
constexpr Instructions INSTRUCTIONS = AVX2;  // pairs.h
#elif defined(__aarch64__) && defined(__ARM_FEATURE_MATMUL_INT8)
#define TQDIT_DOTS
constexpr Instructions INSTRUCTIONS = I8MM;
inline vint add_products(vint sums, vint left, vint right) {
  return vint(vusdotq_s32(int32x4_t(sums), uint8x16_t(left), int8x16_t(right)));
}
#elif defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#define TQDIT_DOTS
constexpr Instructions INSTRUCTIONS = DOTPROD;
// There is no instruction for mixed signs here: the signed bytes come as byte + BIAS.
inline vint add_products(vint sums, vint left, vint right) {
  return vint(vdotq_u32(uint32x4_t(sums), uint8x16_t(left), uint8x16_t(right)));
}
#else
constexpr Instructions INSTRUCTIONS = GENERIC;
#endif

// What `add_products` wants added to signed bytes; the sum of a row of the other side, times this, is then too much.
constexpr int32_t BIAS = INSTRUCTIONS == DOTPROD ? 128 : 0;

// Returns signed bytes as `add_products` wants them.
inline vint biased(vint bytes) { return BIAS ? bytes ^ static_cast<int32_t>(0x80808080u) : bytes; }

// Returns BIAS times the sum of `count` unsigned bytes.
inline int32_t excess(const uint8_t* bytes, int64_t count) {
  int32_t total = 0;
  for (int64_t k = 0; BIAS && k < count; ++k) total += bytes[k];
  return BIAS * total;
}

// How many vectors of sums stay in registers. AVX2 has 16 registers and the others 32; on ARM a number is broadcast from
// a register and not from memory, for which GCC takes several.
constexpr int SUMS = INSTRUCTIONS == AVX2_VNNI ? 12 : LANES == 4 ? 20 : 24;
// The most vectors of columns of R rows that are multiplied together, and how many are where there are more.
template <int R>
constexpr int MOST_VECTORS = SUMS / R < 6 ? SUMS / R : 6;
template <int R>
constexpr int NEXT_VECTORS = MOST_VECTORS<R> < 4 ? MOST_VECTORS<R> : 4;

}  // namespace tqdit
