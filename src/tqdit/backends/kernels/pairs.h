// Exact products of bytes on processors of AVX2 without VNNI, two at a time: 16-bit operands, 32-bit sums. Those of many
// rows: `dot` would take the bytes of a weight apart again for every few of them.
#pragma once
#include "products.h"

#if defined(TQDIT_PAIRS)

namespace tqdit {

constexpr int64_t PAIR_ROWS = 6;      // 6 x 2 vectors of sums leave registers for one row and 8 columns
constexpr int64_t PAIR_COLUMNS = 8;
constexpr int64_t PAIR_DEPTH = 512;   // 6 rows and 8 columns of this depth fit the first-level cache

// Computes c[r][j] = sum_k a[r][k] b[k][j], or adds it, for R rows and 8 columns. b: [k / 4][column][k % 4].
template <int R>
inline void pair_tile(const int16_t* a, int64_t lda, const int16_t* b, int64_t fours, int32_t* c, int64_t ldc, bool add) {
  __m256i sums[R][2];  // two sums of each of 4 columns
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = _mm256_setzero_si256();
  for (int64_t k = 0; k < fours; ++k) {
    const __m256i low = _mm256_load_si256(reinterpret_cast<const __m256i*>(b + k * 32));
    const __m256i high = _mm256_load_si256(reinterpret_cast<const __m256i*>(b + k * 32 + 16));
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int64_t left;
      std::memcpy(&left, a + r * lda + k * 4, 8);
      const __m256i four = _mm256_set1_epi64x(left);
      sums[r][0] = _mm256_add_epi32(sums[r][0], _mm256_madd_epi16(four, low));
      sums[r][1] = _mm256_add_epi32(sums[r][1], _mm256_madd_epi16(four, high));
      // One row after the other: GCC would read all rows first, and sums would go to memory for want of registers.
      asm volatile("" : "+x"(sums[r][0]), "+x"(sums[r][1]) : : "memory");
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    __m256i total = _mm256_permute4x64_epi64(_mm256_hadd_epi32(sums[r][0], sums[r][1]), 0xD8);
    __m256i* const to = reinterpret_cast<__m256i*>(c + r * ldc);
    if (add) total = _mm256_add_epi32(total, _mm256_loadu_si256(to));
    _mm256_storeu_si256(to, total);
  }
}

// Widens `count` bytes.
inline void widen(const uint8_t* from, int64_t count, int16_t* to) {
  int64_t k = 0;
  for (; k + 16 <= count; k += 16) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + k));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + k), _mm256_cvtepu8_epi16(bytes));
  }
  for (; k < count; ++k) to[k] = from[k];
}

// Multiplies rows of codes by one panel of a packed weight, in memory of its own.
class PairProduct {
 public:
  explicit PairProduct(int64_t rows, int64_t width) : left_(rows * PAIR_DEPTH), right_(width * PAIR_DEPTH) {}

  // c (rows, width), rows `ldc` apart. panel: [k / 4][column][k % 4], of `width` columns, a multiple of 8.
  void operator()(const uint8_t* a, int64_t lda, int64_t rows, const int8_t* panel, int64_t width, int64_t fours,
                  int32_t* c, int64_t ldc) const {
    for (int64_t k = 0; k < fours; k += PAIR_DEPTH / 4) {
      const int64_t part = fours - k < PAIR_DEPTH / 4 ? fours - k : PAIR_DEPTH / 4;
      for (int64_t r = 0; r < rows; ++r) widen(a + r * lda + k * 4, part * 4, left_.data() + r * PAIR_DEPTH);
      widen_panel(panel + k * width * 4, width, part);
      for (int64_t j = 0; j < width; j += PAIR_COLUMNS)
        for (int64_t r = 0; r < rows; r += PAIR_ROWS)
          tile(rows - r, left_.data() + r * PAIR_DEPTH, right_.data() + j * PAIR_DEPTH, part, c + r * ldc + j, ldc, k > 0);
    }
  }

 private:
  // Writes the columns of a panel eight at a time, so that a tile reads its own one after the other.
  void widen_panel(const int8_t* panel, int64_t width, int64_t fours) const {
    for (int64_t k = 0; k < fours; ++k)
      for (int64_t j = 0; j < width; j += PAIR_COLUMNS) {
        const __m128i* const from = reinterpret_cast<const __m128i*>(panel + (k * width + j) * 4);
        __m256i* const to = reinterpret_cast<__m256i*>(right_.data() + j * PAIR_DEPTH + k * 32);
        _mm256_store_si256(to, _mm256_cvtepi8_epi16(_mm_loadu_si128(from)));
        _mm256_store_si256(to + 1, _mm256_cvtepi8_epi16(_mm_loadu_si128(from + 1)));
      }
  }

  static void tile(int64_t rows, const int16_t* a, const int16_t* b, int64_t fours, int32_t* c, int64_t ldc, bool add) {
    switch (rows < PAIR_ROWS ? rows : PAIR_ROWS) {
      case 6: return pair_tile<6>(a, PAIR_DEPTH, b, fours, c, ldc, add);
      case 5: return pair_tile<5>(a, PAIR_DEPTH, b, fours, c, ldc, add);
      case 4: return pair_tile<4>(a, PAIR_DEPTH, b, fours, c, ldc, add);
      case 3: return pair_tile<3>(a, PAIR_DEPTH, b, fours, c, ldc, add);
      case 2: return pair_tile<2>(a, PAIR_DEPTH, b, fours, c, ldc, add);
      case 1: return pair_tile<1>(a, PAIR_DEPTH, b, fours, c, ldc, add);
    }
  }

  Buffer<int16_t> left_, right_;
};
typedef PairProduct TaskProduct;

}  // namespace tqdit
#endif
