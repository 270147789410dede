// Products of many rows of codes on ARM processors with i8mm (blocks.h), whose operands are rearranged once before.
#pragma once
#include "products.h"

#if defined(TQDIT_BLOCKS)

namespace tqdit {

constexpr int64_t MATRIX_ROWS = 8;      // 8 x 8 sums are 16 registers
constexpr int64_t MATRIX_COLUMNS = 8;
constexpr int64_t MATRIX_DEPTH = 1024;  // 8 rows and 8 columns of this depth fit the first-level cache

// Computes c[r][j] = sum_k a[r][k] b[k][j], or adds it, for at most R rows and 8 columns. a: pairs of rows
// `MATRIX_DEPTH * 2` apart, each [k / 8][row][k % 8]. b: [k / 8][column][k % 8].
template <int R>
inline void matrix_tile(const uint8_t* a, const int8_t* b, int64_t eights, int64_t rows, int32_t* c, int64_t ldc,
                        bool add) {
  Blocks<R, 2> blocks;
  for (int64_t k = 0; k < eights; ++k) {
    int8x16_t right[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) right[j] = vld1q_s8(b + k * 64 + j * 16);
    blocks.add([=](int p) { return vld1q_u8(a + p * MATRIX_DEPTH * 2 + k * 16); }, right);
  }
  blocks.each([=](int r, int j, vint sums) {
    int32_t* const to = c + r * ldc + j * LANES;
    if (r < rows) store(to, add ? sums + load(to) : sums);
  });
}

// Multiplies rows of codes by one panel of a packed weight, in memory of its own.
class MatrixProduct {
 public:
  explicit MatrixProduct(int64_t rows, int64_t width)
      : left_(round_up(rows, 2) * MATRIX_DEPTH), right_(width * MATRIX_DEPTH) {}

  // c (rows, width), rows `ldc` apart. panel: [k / 4][column][k % 4], of `width` columns, a multiple of 8.
  void operator()(const uint8_t* a, int64_t lda, int64_t rows, const int8_t* panel, int64_t width, int64_t fours,
                  int32_t* c, int64_t ldc) const {
    for (int64_t k = 0; k < fours; k += MATRIX_DEPTH / 4) {
      const int64_t part = fours - k < MATRIX_DEPTH / 4 ? fours - k : MATRIX_DEPTH / 4;
      pair_rows(a + k * 4, lda, rows, part * 4);
      pair_columns(panel + k * width * 4, width, part);
      for (int64_t j = 0; j < width; j += MATRIX_COLUMNS)
        for (int64_t r = 0; r < rows; r += MATRIX_ROWS)
          tile(rows - r, left_.data() + r * MATRIX_DEPTH, right_.data() + j * MATRIX_DEPTH, (part + 1) / 2,
               c + r * ldc + j, ldc, k > 0);
    }
  }

 private:
  // Writes rows two by two, eight bytes of one after eight of the other. What is missing is 0.
  void pair_rows(const uint8_t* a, int64_t lda, int64_t rows, int64_t depth) const {
    for (int64_t r = 0; r < round_up(rows, 2); ++r) {
      uint8_t* const to = left_.data() + r / 2 * 2 * MATRIX_DEPTH + r % 2 * 8;
      for (int64_t k = 0; k < depth; k += 8) {
        uint64_t eight = 0;
        if (r < rows) std::memcpy(&eight, a + r * lda + k, depth - k < 8 ? 4 : 8);
        std::memcpy(to + k * 2, &eight, 8);
      }
    }
  }

  // Writes the columns of a panel eight at a time, eight bytes of each together. What is missing is 0.
  void pair_columns(const int8_t* panel, int64_t width, int64_t fours) const {
    for (int64_t k = 0; k < fours; k += 2)
      for (int64_t j = 0; j < width; j += 4) {
        const int8_t* const from = panel + (k * width + j) * 4;
        int8_t* const to = right_.data() + j / 8 * 8 * MATRIX_DEPTH + k * 32 + j % 8 * 8;
        const int32x4_t low = vreinterpretq_s32_s8(vld1q_s8(from));
        const int32x4_t high = k + 1 < fours ? vreinterpretq_s32_s8(vld1q_s8(from + width * 4)) : vdupq_n_s32(0);
        int8x16_t first, second;
        eights_of(low, high, first, second);
        vst1q_s8(to, first);
        vst1q_s8(to + 16, second);
      }
  }

  static void tile(int64_t rows, const uint8_t* a, const int8_t* b, int64_t eights, int32_t* c, int64_t ldc, bool add) {
    switch (rows < MATRIX_ROWS ? (rows + 1) / 2 : MATRIX_ROWS / 2) {
      case 4: return matrix_tile<8>(a, b, eights, rows, c, ldc, add);
      case 3: return matrix_tile<6>(a, b, eights, rows, c, ldc, add);
      case 2: return matrix_tile<4>(a, b, eights, rows, c, ldc, add);
      case 1: return matrix_tile<2>(a, b, eights, rows, c, ldc, add);
    }
  }

  Buffer<uint8_t> left_;
  Buffer<int8_t> right_;
};
typedef MatrixProduct TaskProduct;

}  // namespace tqdit
#endif
