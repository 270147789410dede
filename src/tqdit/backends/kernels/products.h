// Exact products of unsigned and signed bytes, and the layouts they read.
#pragma once
#include <cstdlib>
#include <memory>
#include <new>

#include "blocks.h"
#include "dots.h"

namespace tqdit {

// Computes c[r][j] = sum_k a[r][k] b[k][j] for R rows and C vectors of columns. b is packed in fours: [k / 4][column][k % 4].
// surplus: the `excess` of every row.
template <int R, int C>
inline void dot_tile(const uint8_t* a, int64_t lda, const int8_t* b, int64_t columns, int64_t fours, int32_t* c,
                     int64_t ldc, [[maybe_unused]] const int32_t* surplus) {
#if defined(TQDIT_BLOCKS)
  if constexpr (R % 2 == 0) return block_tile<R, C>(a, lda, b, columns, fours, c, ldc);
#endif
#if defined(TQDIT_DOTS)
  vint sums[R][C];  // in registers, once the loops over it are unrolled
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) sums[r][j] = vint{};
  for (int64_t k = 0; k < fours; ++k) {
    decltype(right_of(vint{})) right[C];
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j)
      right[j] = right_of(load(reinterpret_cast<const int32_t*>(b + (k * columns + j * LANES) * 4)));
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int32_t four;
      std::memcpy(&four, a + r * lda + k * 4, 4);
      const auto left = left_of(four);
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) sums[r][j] = add_products(sums[r][j], left, right[j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) store(c + r * ldc + j * LANES, BIAS ? sums[r][j] - surplus[r] : sums[r][j]);
#else
  for (int r = 0; r < R; ++r) {
    int32_t sums[C * LANES] = {};
    for (int64_t k = 0; k < fours; ++k)
      for (int i = 0; i < 4; ++i) {
        const int32_t left = a[r * lda + k * 4 + i];
        for (int j = 0; j < C * LANES; ++j) sums[j] += left * b[(k * columns + j) * 4 + i];
      }
    std::memcpy(c + r * ldc, sums, sizeof sums);
  }
#endif
}

// Computes the last columns of R rows, at most C vectors of them.
template <int R, int C>
inline void dot_last(const uint8_t* a, int64_t lda, const int8_t* b, int64_t columns, int64_t fours, int32_t* c,
                     int64_t ldc, const int32_t* surplus, int64_t vectors) {
  if (vectors == C) return dot_tile<R, C>(a, lda, b, columns, fours, c, ldc, surplus);
  if constexpr (C > 1) dot_last<R, C - 1>(a, lda, b, columns, fours, c, ldc, surplus, vectors);
}

template <int R>
inline void dot_rows(const uint8_t* a, int64_t lda, const int8_t* b, int64_t columns, int64_t fours, int32_t* c,
                     int64_t ldc) {
  int32_t surplus[R];
  for (int r = 0; r < R; ++r) surplus[r] = excess(a + r * lda, fours * 4);
  int64_t j = 0;
  for (; columns - j > MOST_VECTORS<R> * LANES; j += NEXT_VECTORS<R> * LANES)
    dot_tile<R, NEXT_VECTORS<R>>(a, lda, b + j * 4, columns, fours, c + j, ldc, surplus);
  dot_last<R, MOST_VECTORS<R>>(a, lda, b + j * 4, columns, fours, c + j, ldc, surplus, (columns - j) / LANES);
}

// Multiplies (rows, 4 * fours) unsigned by packed signed bytes: (rows, columns) int32; columns is a multiple of LANES.
void dot(const uint8_t* a, int64_t lda, int64_t rows, const int8_t* b, int64_t columns, int64_t fours, int32_t* c,
         int64_t ldc) {
  int64_t r = 0;
#if defined(TQDIT_BLOCKS)  // the more rows, the less rearranging
  for (; r + 8 <= rows; r += 8) dot_rows<8>(a + r * lda, lda, b, columns, fours, c + r * ldc, ldc);
#endif
  for (; r + 4 <= rows; r += 4) dot_rows<4>(a + r * lda, lda, b, columns, fours, c + r * ldc, ldc);
  for (; r < rows; ++r) dot_rows<1>(a + r * lda, lda, b, columns, fours, c + r * ldc, ldc);
}

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

constexpr int64_t CACHED = 1 << 20;  // bytes of values that are certainly in a cache when they are read soon again

// Returns how many samples of `items` floats are computed together, where their values are read soon again.
inline int64_t samples_in_cache(int64_t items, int64_t batch) {
  const int64_t samples = CACHED / (items * static_cast<int64_t>(sizeof(float)));
  return samples < 1 ? 1 : samples < batch ? samples : batch;
}

// Scratch memory on a cache line boundary.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : items_(static_cast<T*>(std::aligned_alloc(64, round_up(count * sizeof(T), 64)))) {
    if (!items_) throw std::bad_alloc();
  }
  T* data() const { return items_.get(); }

 private:
  struct Free { void operator()(T* p) const { std::free(p); } };
  std::unique_ptr<T, Free> items_;
};

}  // namespace tqdit
