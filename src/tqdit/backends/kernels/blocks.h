// Exact products on ARM processors with i8mm: one instruction multiplies two rows of eight bytes by two columns.
#pragma once
#include "vector.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_MATMUL_INT8)
#define TQDIT_BLOCKS

namespace tqdit {

// The sums of R rows, an even number, and 4 * C columns, in blocks of 2 x 2.
template <int R, int C>
struct Blocks {
  int32x4_t sums[R / 2][2 * C];
  Blocks() {
#pragma GCC unroll 8
    for (int p = 0; p < R / 2; ++p)
#pragma GCC unroll 16
      for (int j = 0; j < 2 * C; ++j) sums[p][j] = vdupq_n_s32(0);
  }

  // Adds eight products to every sum. left(p): eight bytes of row 2 p, and of the next. right[j]: of column 2 j, and of
  // the next.
  template <typename Left>
  void add(const Left& left, const int8x16_t (&right)[2 * C]) {
#pragma GCC unroll 8
    for (int p = 0; p < R / 2; ++p) {
      const uint8x16_t rows = left(p);
#pragma GCC unroll 16
      for (int j = 0; j < 2 * C; ++j) sums[p][j] = vusmmlaq_s32(sums[p][j], rows, right[j]);
    }
  }

  // Calls write(r, j, four): the sums of row r and the columns from 4 * j on.
  template <typename Write>
  void each(const Write& write) const {
#pragma GCC unroll 8
    for (int p = 0; p < R / 2; ++p)
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) {
        const int32x4_t left = sums[p][2 * j], right = sums[p][2 * j + 1];
        write(2 * p, j, vint(vcombine_s32(vget_low_s32(left), vget_low_s32(right))));
        write(2 * p + 1, j, vint(vcombine_s32(vget_high_s32(left), vget_high_s32(right))));
      }
  }
};

// Turns two vectors of four columns, four bytes of each, into eight bytes of two columns, and of the next two.
inline void eights_of(int32x4_t low, int32x4_t high, int8x16_t& first, int8x16_t& second) {
  first = vreinterpretq_s8_s32(vzip1q_s32(low, high));
  second = vreinterpretq_s8_s32(vzip2q_s32(low, high));
}

// Computes what `dot_tile` does for an even number of rows.
template <int R, int C>
inline void block_tile(const uint8_t* a, int64_t lda, const int8_t* b, int64_t columns, int64_t fours, int32_t* c,
                       int64_t ldc) {
  Blocks<R, C> blocks;
  const auto add = [&](int64_t k, auto size) {  // of 8 bytes, or of 4
    int8x16_t right[2 * C];
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) {
      const int8_t* const from = b + (k * columns + j * 4) * 4;
      const int32x4_t low = vreinterpretq_s32_s8(vld1q_s8(from));
      int32x4_t high = vdupq_n_s32(0);
      if (size == 8) high = vreinterpretq_s32_s8(vld1q_s8(from + columns * 4));
      eights_of(low, high, right[2 * j], right[2 * j + 1]);
    }
    blocks.add(
        [=](int p) {
          uint64_t first = 0, second = 0;
          std::memcpy(&first, a + 2 * p * lda + k * 4, size);
          std::memcpy(&second, a + (2 * p + 1) * lda + k * 4, size);
          return vcombine_u8(vcreate_u8(first), vcreate_u8(second));
        },
        right);
  };
  int64_t k = 0;
  for (; k + 2 <= fours; k += 2) add(k, std::integral_constant<int64_t, 8>{});
  if (k < fours) add(k, std::integral_constant<int64_t, 4>{});
  blocks.each([=](int r, int j, vint sums) { store(c + r * ldc + j * LANES, sums); });
}

}  // namespace tqdit
#endif
