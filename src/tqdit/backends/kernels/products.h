// Exact products of unsigned and signed bytes, and the layouts they read.
#pragma once
#include <cstdlib>
#include <memory>
#include <new>

#include "vector.h"

namespace tqdit {

// Computes c[r][j] = sum_k a[r][k] b[k][j] for R rows and C vectors of columns. b is packed in fours: [k / 4][column][k % 4].
template <int R, int C>
inline void dot_tile(const uint8_t* a, int64_t lda, const int8_t* b, int64_t columns, int64_t fours, int32_t* c,
                     int64_t ldc) {
#if defined(__AVX512VNNI__)
  __m512i sums[R][C];  // in registers, once the loops over it are unrolled
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) sums[r][j] = _mm512_setzero_si512();
  for (int64_t k = 0; k < fours; ++k) {
    __m512i right[C];
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) right[j] = _mm512_loadu_si512(b + k * columns * 4 + j * 64);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int32_t left;
      std::memcpy(&left, a + r * lda + k * 4, 4);
      const __m512i four = _mm512_set1_epi32(left);
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) sums[r][j] = _mm512_dpbusd_epi32(sums[r][j], four, right[j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) _mm512_storeu_si512(c + r * ldc + j * LANES, sums[r][j]);
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

template <int R>
inline void dot_rows(const uint8_t* a, int64_t lda, const int8_t* b, int64_t columns, int64_t fours, int32_t* c,
                     int64_t ldc) {
  int64_t j = 0;
  for (; columns - j > 6 * LANES; j += 4 * LANES)
    dot_tile<R, 4>(a, lda, b + j * 4, columns, fours, c + j, ldc);
  switch ((columns - j) / LANES) {
    case 6: dot_tile<R, 6>(a, lda, b + j * 4, columns, fours, c + j, ldc); break;
    case 5: dot_tile<R, 5>(a, lda, b + j * 4, columns, fours, c + j, ldc); break;
    case 4: dot_tile<R, 4>(a, lda, b + j * 4, columns, fours, c + j, ldc); break;
    case 3: dot_tile<R, 3>(a, lda, b + j * 4, columns, fours, c + j, ldc); break;
    case 2: dot_tile<R, 2>(a, lda, b + j * 4, columns, fours, c + j, ldc); break;
    case 1: dot_tile<R, 1>(a, lda, b + j * 4, columns, fours, c + j, ldc); break;
  }
}

// Multiplies (rows, 4 * fours) unsigned by packed signed bytes: (rows, columns) int32; columns is a multiple of LANES.
void dot(const uint8_t* a, int64_t lda, int64_t rows, const int8_t* b, int64_t columns, int64_t fours, int32_t* c,
         int64_t ldc) {
  int64_t r = 0;
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
