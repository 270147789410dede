// Exact products of unsigned and signed bytes, four to a lane of 32 bits, in few instructions of the processor.
//
// TQDIT_DOTS says that there are such instructions. Then `left_of` broadcasts four unsigned bytes, `right_of` takes four
// signed bytes of every lane, and `add_products` adds to every lane of the sums the products of its four with its four.
#pragma once
#include "vector.h"

namespace tqdit {

// The kinds of integer instructions that kernels can be compiled to: numbers of NAMES in ../instructions.py.
enum Instructions { GENERIC = 0, AMX_INT8 = 1, AVX512_VNNI = 2, AVX2_VNNI = 3, AVX2 = 4, I8MM = 5, DOTPROD = 6 };

#if defined(__AVX512VNNI__)
#define TQDIT_DOTS
constexpr Instructions DOTS = AVX512_VNNI;
inline vint left_of(int32_t four) { return vint{} + four; }
inline vint right_of(vint fours) { return fours; }
inline vint add_products(vint sums, vint left, vint right) {
  return reinterpret_cast<vint>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums), reinterpret_cast<__m512i>(left),
                                                    reinterpret_cast<__m512i>(right)));
}

#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
#define TQDIT_DOTS
constexpr Instructions DOTS = AVX2_VNNI;
inline vint left_of(int32_t four) { return vint{} + four; }
inline vint right_of(vint fours) { return fours; }
inline vint add_products(vint sums, vint left, vint right) {
  return reinterpret_cast<vint>(_mm256_dpbusd_avx_epi32(reinterpret_cast<__m256i>(sums), reinterpret_cast<__m256i>(left),
                                                        reinterpret_cast<__m256i>(right)));
}

#elif defined(__AVX2__) && (defined(__AVX512BW__) || !defined(__AVX512F__))
#define TQDIT_DOTS
#define TQDIT_PAIRS
constexpr Instructions DOTS = AVX2;
// The first and third byte of every four, and the second and fourth, as 16 bits each.
typedef int16_t vshort __attribute__((vector_size(LANES * 4)));
struct Pairs { vshort first, second; };
inline Pairs left_of(int32_t four) {
  typedef uint16_t vunsigned __attribute__((vector_size(LANES * 4)));
  const vunsigned fours = vunsigned(vint{} + four);
  return {vshort(fours & 0xFF), vshort(fours >> 8)};
}
inline Pairs right_of(vint fours) { return {vshort(fours) << 8 >> 8, vshort(fours) >> 8}; }
inline vint add_products(vint sums, Pairs left, Pairs right) {
#if defined(__AVX512F__)
  return sums + vint(_mm512_madd_epi16(__m512i(left.first), __m512i(right.first))) +
         vint(_mm512_madd_epi16(__m512i(left.second), __m512i(right.second)));
#else
  return sums + vint(_mm256_madd_epi16(__m256i(left.first), __m256i(right.first))) +
         vint(_mm256_madd_epi16(__m256i(left.second), __m256i(right.second)));
#endif
}

#elif defined(__aarch64__) && defined(__ARM_FEATURE_MATMUL_INT8)
#define TQDIT_DOTS
constexpr Instructions DOTS = I8MM;
inline vint left_of(int32_t four) { return vint{} + four; }
inline vint right_of(vint fours) { return fours; }
inline vint add_products(vint sums, vint left, vint right) {
  return vint(vusdotq_s32(int32x4_t(sums), uint8x16_t(left), int8x16_t(right)));
}

#elif defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#define TQDIT_DOTS
constexpr Instructions DOTS = DOTPROD;
// There is no instruction for mixed signs here: the signed bytes become byte + BIAS.
inline vint left_of(int32_t four) { return vint{} + four; }
inline vint right_of(vint fours) { return fours ^ static_cast<int32_t>(0x80808080u); }
inline vint add_products(vint sums, vint left, vint right) {
  return vint(vdotq_u32(uint32x4_t(sums), uint8x16_t(left), uint8x16_t(right)));
}

#else
constexpr Instructions DOTS = GENERIC;
#endif

// With AMX most products are of tiles (tiles.h), and few rows are multiplied as above.
#if defined(__AMX_INT8__) && !defined(TQDIT_NO_TILES)
#define TQDIT_TILES
constexpr Instructions INSTRUCTIONS = AMX_INT8;
#else
constexpr Instructions INSTRUCTIONS = DOTS;
#endif

// What `right_of` adds to every byte. The sums of a row are then too large by the `excess` of its bytes.
constexpr int32_t BIAS = DOTS == DOTPROD ? 128 : 0;
inline int32_t excess(const uint8_t* bytes, int64_t count) {
  int32_t total = 0;
  for (int64_t k = 0; BIAS && k < count; ++k) total += bytes[k];
  return BIAS * total;
}

// How many vectors of sums, and of columns, stay in registers beside what GCC needs for the operands. AVX2 has 16
// registers, and the others have 32.
constexpr int SUMS = DOTS == AVX2 ? 8
                     : DOTS == AVX2_VNNI ? 12
                     : DOTS == I8MM ? 16
                     : DOTS == DOTPROD ? 20 : 24;
constexpr int VECTORS = DOTS == AVX2 ? 2 : 6;
// The most vectors of columns of R rows that are multiplied together, and how many are where there are more.
template <int R>
constexpr int MOST_VECTORS = SUMS / R < VECTORS ? SUMS / R : VECTORS;
template <int R>
constexpr int NEXT_VECTORS = MOST_VECTORS<R> < 4 ? MOST_VECTORS<R> : 4;

}  // namespace tqdit
