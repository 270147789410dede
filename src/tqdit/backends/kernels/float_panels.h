// Products of many float rows with an int8 weight: codes become floats once for hundreds of rows, a panel of columns at a
// time. Codes are exact in bf16 and fp32, products of two bf16 values are exact in fp32, and sums are in fp32, in the
// order of the depth: a result does not depend on threads or on other rows.
#pragma once
#include "floats.h"
#include "linear.h"

namespace tqdit {

// x (rows, depth), codes (columns, depth), scale and bias (columns): out = (x codes^T) * scale + bias, (rows, columns).
// depth is a multiple of 4. type: of x, fp32 or where `tqdit_has_bfloat16` bf16; out_type: any `FloatType`.
struct ManyRowsCall {
  const void* x;
  const int8_t* codes;
  const float *scale, *bias;
  void* out;
  int64_t rows, columns, depth, type, out_type, threads;
};

// A cell has 32 bits: one float, or two of bf16 that follow each other along the depth. `expand` writes the cells of four
// codes of each column of a vector, those of the first codes at `cells`; `add` adds the products of a cell of x with a
// vector of cells.
struct SingleCells {
  static constexpr int64_t ITEMS = 1;
  static void expand(vint four, float* cells) {
    for (int i = 0; i < 4; ++i) store(cells + i * PANEL, to_float(four << (24 - 8 * i) >> 24));
  }
  // x - 0 is x, also where x is -0; so the compiler only copies it to all lanes.
  static vfloat add(vfloat sum, float x, vfloat cells) { return multiply_add(x - vfloat{}, cells, sum); }
};

#if defined(__AVX512BF16__)
struct PairCells {
  static constexpr int64_t ITEMS = 2;
  static void expand(vint four, float* cells) {
    for (int i = 0; i < 2; ++i) {
      const vuint first = bits_of<vuint>(to_float(four << (24 - 16 * i) >> 24));
      const vuint second = bits_of<vuint>(to_float(four << (16 - 16 * i) >> 24));
      store(cells + i * PANEL, bits_of<vfloat>(second | first >> 16));  // the low half of a code's float is 0
    }
  }
  static vfloat add(vfloat sum, float x, vfloat cells) {
    const __m512 pair = _mm512_set1_ps(x);  // copied, not computed with: as a float it is nothing
    return bits_of<vfloat>(_mm512_dpbf16_ps(bits_of<__m512>(sum), bits_of<__m512bh>(pair), bits_of<__m512bh>(cells)));
  }
};
#endif

constexpr int64_t CELLS = 1024;           // of a column at a time: 64 columns take a quarter of the second-level cache
constexpr int64_t MANY_ROWS = 512;        // about the rows of one task: its sums stay there as well
constexpr int64_t TILE_VECTORS = LANES == 16 ? 4 : 2;  // with TILE_ROWS they leave registers for one row and one column
constexpr int64_t LINE = 64;              // bytes

// Reads 16 bytes of each of LANES lines, in fours: lane j of fours[i] has the bytes from 4 i on of line j.
inline void fours_of(const int8_t* lines, vint* fours) {
#if defined(__AVX512F__)
  const auto line = [=](int64_t i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(lines + i * LINE)); };
  __m512i a[4];  // lines i, i + 4, i + 8 and i + 12, of which each has a quarter
  for (int i = 0; i < 4; ++i) {
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(line(i)), line(i + 4), 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(line(i + 8)), line(i + 12), 1);
    a[i] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
  const __m512i b[4] = {_mm512_unpacklo_epi32(a[0], a[1]), _mm512_unpacklo_epi32(a[2], a[3]),
                        _mm512_unpackhi_epi32(a[0], a[1]), _mm512_unpackhi_epi32(a[2], a[3])};
  for (int i = 0; i < 4; i += 2) {
    fours[i] = reinterpret_cast<vint>(_mm512_unpacklo_epi64(b[i], b[i + 1]));
    fours[i + 1] = reinterpret_cast<vint>(_mm512_unpackhi_epi64(b[i], b[i + 1]));
  }
#else
  for (int i = 0; i < 4; ++i)
    for (int64_t j = 0; j < LANES; ++j) {
      int32_t four;
      std::memcpy(&four, lines + j * LINE + 4 * i, 4);
      fours[i][j] = four;
    }
#endif
}

// Fills the cells of `wide` columns, those after them with 0: count codes, a multiple of 4, from `codes` on.
template <typename Cells>
void fill_panel(const int8_t* codes, int64_t depth, int64_t wide, int64_t count, float* cells) {
  alignas(64) int8_t lines[PANEL * LINE] = {};  // reading columns that are a power of two apart would evict them
  for (int64_t k = 0; k < count; k += LINE) {
    const int64_t n = count - k < LINE ? count - k : LINE;
    for (int64_t j = 0; j < wide; ++j) {
      if (n == LINE)
        std::memcpy(lines + j * LINE, codes + j * depth + k, LINE);
      else
        std::memcpy(lines + j * LINE, codes + j * depth + k, n);
    }
    for (int64_t i = 0; i < n; i += 16)
      for (int64_t j = 0; j < PANEL; j += LANES) {
        vint fours[4];
        fours_of(lines + j * LINE + i, fours);
        for (int64_t f = 0; f < 4 && i + 4 * f < n; ++f)
          Cells::expand(fours[f], cells + (k + i + 4 * f) / Cells::ITEMS * PANEL + j);
      }
  }
}

// Adds the products of R rows with TILE_VECTORS vectors of columns to their sums.
template <typename Cells, int R>
inline void float_tile(const float* x, int64_t stride, const float* cells, int64_t steps, float* sums) {
  vfloat total[R][TILE_VECTORS];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < TILE_VECTORS; ++j) total[r][j] = load(sums + r * PANEL + j * LANES);
  for (int64_t k = 0; k < steps; ++k) {
    vfloat right[TILE_VECTORS];
#pragma GCC unroll 8
    for (int j = 0; j < TILE_VECTORS; ++j) right[j] = load(cells + k * PANEL + j * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < TILE_VECTORS; ++j) total[r][j] = Cells::add(total[r][j], x[r * stride + k], right[j]);
#if defined(__AVX2__) && !defined(__AVX512F__)
      // One row after the other: GCC would read all rows first, and sums would go to memory for want of registers.
      asm volatile("" : "+x"(total[r][0]), "+x"(total[r][1]) : : "memory");
#endif
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < TILE_VECTORS; ++j) store(sums + r * PANEL + j * LANES, total[r][j]);
}

template <typename Cells>
void float_rows(const float* x, int64_t stride, int64_t rows, const float* cells, int64_t steps, float* sums) {
  for (; rows > 0; rows -= TILE_ROWS, x += TILE_ROWS * stride, sums += TILE_ROWS * PANEL)
    for (int64_t j = 0; j < PANEL; j += TILE_VECTORS * LANES) {
      switch (rows < TILE_ROWS ? rows : TILE_ROWS) {
        case 6: float_tile<Cells, 6>(x, stride, cells + j, steps, sums + j); break;
        case 5: float_tile<Cells, 5>(x, stride, cells + j, steps, sums + j); break;
        case 4: float_tile<Cells, 4>(x, stride, cells + j, steps, sums + j); break;
        case 3: float_tile<Cells, 3>(x, stride, cells + j, steps, sums + j); break;
        case 2: float_tile<Cells, 2>(x, stride, cells + j, steps, sums + j); break;
        case 1: float_tile<Cells, 1>(x, stride, cells + j, steps, sums + j); break;
      }
    }
}

// Computes some rows of the result, and of them the columns of one panel.
template <typename Cells, typename Item>
void float_panel(const ManyRowsCall& c, int64_t row, int64_t rows, int64_t begin, Item* out, float* cells, float* sums) {
  const int64_t stride = c.depth / Cells::ITEMS, wide = c.columns - begin < PANEL ? c.columns - begin : PANEL;
  const float* x = static_cast<const float*>(c.x) + row * stride;
  std::memset(sums, 0, rows * PANEL * sizeof *sums);
  for (int64_t k = 0; k < stride; k += CELLS) {
    const int64_t steps = stride - k < CELLS ? stride - k : CELLS;
    fill_panel<Cells>(c.codes + begin * c.depth + k * Cells::ITEMS, c.depth, wide, steps * Cells::ITEMS, cells);
    float_rows<Cells>(x + k, stride, rows, cells, steps, sums);
  }
  for (int64_t r = 0; r < rows; ++r)
    each_vector(wide, [&](int64_t j, auto n) {
      const vfloat y = load(sums + r * PANEL + j) * load(c.scale + begin + j, n) + load(c.bias + begin + j, n);
      store(out + (row + r) * c.columns + begin + j, y, n);
    });
}

template <typename Cells, typename Item>
void many_rows(const ManyRowsCall& c, Item* out) {
  const int64_t task = task_rows(c.rows, c.columns, c.threads, MANY_ROWS);
  const int64_t panels = (c.columns + PANEL - 1) / PANEL;
  deal(c.threads, (c.rows + task - 1) / task * panels, [&](const auto& next) {
    const Buffer<float> cells(CELLS * PANEL), sums(task * PANEL);
    for (int64_t i; next(i);) {
      const int64_t row = i / panels * task, rows = c.rows - row < task ? c.rows - row : task;
      float_panel<Cells>(c, row, rows, i % panels * PANEL, out, cells.data(), sums.data());
    }
  });
}

// Says whether rows of bf16 are multiplied as they are.
extern "C" int64_t tqdit_has_bfloat16() {
#if defined(__AVX512BF16__)
  return 1;
#else
  return 0;
#endif
}

extern "C" void tqdit_many_rows(const ManyRowsCall* call) {
  for_float_type(call->out_type, call->out, [=](auto* out) {
    in_large_pages(out, call->rows * call->columns * static_cast<int64_t>(sizeof *out));
#if defined(__AVX512BF16__)
    if (call->type == BFLOAT16) return many_rows<PairCells>(*call, out);
#endif
    many_rows<SingleCells>(*call, out);
  });
}

}  // namespace tqdit
