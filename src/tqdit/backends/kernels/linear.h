// Linear layers on codes: the integer product, tile by tile; each tile goes to an epilogue (epilogues.h).
#pragma once
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "matrices.h"
#include "operands.h"
#include "pairs.h"
#include "products.h"
#include "team.h"
#include "tiles.h"

namespace tqdit {

// A linear layer on codes. Either `packed` (see tqdit_pack_weight) and the codes are given, and the sums are computed
// here; or the sums are, zero points taken out, from a product elsewhere. `second`: the other plane of two regions.
struct LinearCall {
  const uint8_t *first, *second;         // (batch, tokens, depth) codes
  const int8_t* packed;                  // null: use the sums
  const int32_t* column_sums;            // (columns) of the packed weight
  const float *first_sums, *second_sums;  // (batch, tokens, columns)
  const float *weight, *bias;            // (columns): weight scale, bias
  const float* steps;                    // (batch, tokens) of a source on the grid of rows, or null
  int64_t batch, tokens, depth, columns, threads;
  Operand source;
};

constexpr int64_t PANEL = 64;        // columns of a packed weight that lie together
constexpr int64_t SLICE = 16;        // columns of the last panel are a multiple of this
constexpr int64_t TILE_ROWS = 6;     // 6 x 4 vectors of sums leave registers for one row and one column
#if defined(TQDIT_TILES)
constexpr int64_t TASK_STEP = 2 * TILE_SIDE;  // a task has a multiple of these rows
#else
constexpr int64_t TASK_STEP = TILE_ROWS;
#endif
#if defined(TQDIT_PAIRS) || defined(TQDIT_BLOCKS)
constexpr int64_t TASK_ROWS = 128;   // about the rows of one task: their rearranged codes stay in the second-level cache
#else
constexpr int64_t TASK_ROWS = 256;   // about the rows of one task
#endif
constexpr int64_t LEAST_ROWS = 24;
constexpr int64_t FINISHED_ROWS = 8;  // of one task, where the product is computed elsewhere

int64_t panel_width(int64_t columns, int64_t begin) {
  const int64_t rest = round_up(columns - begin, SLICE);
  return rest < PANEL ? rest : PANEL;
}

constexpr int64_t LARGE_PAGE = 1 << 21, LARGE_RESULT = 1 << 25;  // bytes; allocators map such a result anew

// Asks for large pages for a result that nobody has written to yet, since the first write to each page costs time.
inline void in_large_pages(void* result, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  if (bytes < LARGE_RESULT) return;
  const int64_t address = reinterpret_cast<int64_t>(result), begin = round_up(address, LARGE_PAGE);
  madvise(reinterpret_cast<void*>(begin), (address + bytes) / LARGE_PAGE * LARGE_PAGE - begin, MADV_HUGEPAGE);
#else
  (void)result, (void)bytes;
#endif
}

// Returns the rows of one task of a product, about `wished`. Long tasks reuse a panel; with many threads they are
// shorter, so that all have work to the end.
int64_t task_rows(int64_t rows, int64_t columns, int64_t threads, int64_t wished) {
  const int64_t panels = (columns + PANEL - 1) / PANEL, wanted = (4 * threads + panels - 1) / panels;
  int64_t parts = (rows + wished / 2) / wished;
  if (parts < wanted) parts = wanted;
  const int64_t task = round_up((rows + parts - 1) / parts, TASK_STEP);
  return task < LEAST_ROWS ? LEAST_ROWS : task;
}

void dot_tile_rows(int64_t rows, const uint8_t* a, int64_t lda, const int8_t* panel, int64_t width, int64_t fours,
                   int32_t* c) {
  switch (rows) {
    case 6: dot_rows<6>(a, lda, panel, width, fours, c, PANEL); break;
    case 5: dot_rows<5>(a, lda, panel, width, fours, c, PANEL); break;
    case 4: dot_rows<4>(a, lda, panel, width, fours, c, PANEL); break;
    case 3: dot_rows<3>(a, lda, panel, width, fours, c, PANEL); break;
    case 2: dot_rows<2>(a, lda, panel, width, fours, c, PANEL); break;
    case 1: dot_rows<1>(a, lda, panel, width, fours, c, PANEL); break;
  }
}

// piece(j, n) for every vector of `count` columns: n lanes from j on. A whole panel is unrolled with n a constant,
// which lets the long chains of exp and divisions of four vectors overlap.
template <typename Piece>
inline void each_vector(int64_t count, const Piece& piece) {
  if (count == PANEL) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < PANEL; j += LANES) piece(j, std::integral_constant<int64_t, LANES>{});
  } else {
    for (int64_t j = 0; j < count; j += LANES) piece(j, count - j);
  }
}

// An operation finishes the sums of its product. `Finish::at(sample)` looks up the constants that rows of a sample
// share; `row<SOURCE>(index, begin, count, first, second)` of the result takes `count` float sums of one row, from column
// `begin` on. SOURCE: TWO_REGION if there are two sums, ROW, or UNIFORM for every other grid of the source.

// Returns the zero point of a source's unsigned codes; those of two regions count from 0.
inline int32_t code_zero(const Operand& source, int64_t sample) {
  if (source.grid == TWO_REGION) return 0;
  return source.grid == MERGED ? 1 << (source.bits - 1) : zero_point(source.entry(sample)) + 128;
}

// Finishes one row of the sums of a panel, zero points still in them. `begin`: the panel's first column; `centres`: what
// the zero point adds to the sums of each column.
template <int SOURCE, typename Rows>
inline void finish_row(const LinearCall& c, const Rows& rows, int64_t row, int64_t begin, const int32_t* centres,
                       const int32_t* first, const int32_t* second) {
  alignas(64) float sums[2][PANEL];
  const int64_t rest = c.columns - begin, count = rest < PANEL ? rest : PANEL;
  for (int64_t j = 0; j < count; j += LANES) {
    store(sums[0] + j, to_float(load(first + j) - load(centres + j)));
    if (SOURCE == TWO_REGION) store(sums[1] + j, to_float(load(second + j)));
  }
  rows.template row<SOURCE>(row, begin, count, sums[0], sums[1]);
}

// What a thread multiplies with: the rows of codes of a task with one panel, `together` of them at a time, or all that are
// left if they are fewer than `most`.
#if defined(TQDIT_TILES)
struct Multiplier {
  const int64_t together = 2 * TILE_SIDE, most = 3 * TILE_SIDE;  // so that the last rows are a whole tile at least
  const TileRegisters registers;
  const TileProduct product;
  const Buffer<int32_t> first{most * PANEL}, second{most * PANEL};
  Multiplier(int64_t, bool) {}
  void operator()(const uint8_t* a, int64_t lda, int64_t rows, const int8_t* panel, int64_t width, int64_t fours,
                  int32_t* c) const {
    product(a, lda, rows, panel, width, fours, c, PANEL);
  }
};
#elif defined(TQDIT_PAIRS) || defined(TQDIT_BLOCKS)
struct Multiplier {
  const int64_t together, most;
  const TaskProduct product;
  const Buffer<int32_t> first, second;
  Multiplier(int64_t task, bool two)
      : together(task), most(task), product(task, PANEL), first(task * PANEL), second(two ? task * PANEL : PANEL) {}
  void operator()(const uint8_t* a, int64_t lda, int64_t rows, const int8_t* panel, int64_t width, int64_t fours,
                  int32_t* c) const {
    product(a, lda, rows, panel, width, fours, c, PANEL);
  }
};
#else
struct Multiplier {
  const int64_t together = TILE_ROWS, most = TILE_ROWS;
  const Buffer<int32_t> first{TILE_ROWS * PANEL}, second{TILE_ROWS * PANEL};
  Multiplier(int64_t, bool) {}
  void operator()(const uint8_t* a, int64_t lda, int64_t rows, const int8_t* panel, int64_t width, int64_t fours,
                  int32_t* c) const {
    dot_tile_rows(rows, a, lda, panel, width, fours, c);
  }
};
#endif

template <int SOURCE, typename Finish>
void run_task(const LinearCall& c, int64_t row, int64_t end, int64_t begin, const Finish& finish, const Multiplier& m) {
  const int64_t width = panel_width(c.columns, begin), fours = c.depth / 4;
  const int8_t* panel = c.packed + begin * c.depth;
  int32_t *const first = m.first.data(), *const second = m.second.data();
  const int64_t columns = c.columns - begin < PANEL ? c.columns - begin : PANEL;
  alignas(64) int32_t centres[PANEL];
  while (row < end) {
    const int64_t rows = end - row < m.most ? end - row : m.together;
    m(c.first + row * c.depth, c.depth, rows, panel, width, fours, first);
    if (SOURCE == TWO_REGION) m(c.second + row * c.depth, c.depth, rows, panel, width, fours, second);
    for (const int64_t last = row + rows; row < last;) {
      const int64_t sample = row / c.tokens;
      const int64_t stop = (sample + 1) * c.tokens < last ? (sample + 1) * c.tokens : last;
      const int32_t zero = code_zero(c.source, sample);
      const auto rows_of_sample = finish.at(sample);
      for (int64_t j = 0; j < columns; j += LANES)
        store(centres + j, zero * load(c.column_sums + begin + j, columns - j));
      for (; row < stop; ++row) {
        const int64_t at = (rows - (last - row)) * PANEL;
        finish_row<SOURCE>(c, rows_of_sample, row, begin, centres, first + at,
                           SOURCE == TWO_REGION ? second + at : nullptr);
      }
    }
  }
}

template <int SOURCE, typename Finish>
void linear_from(const LinearCall& c, const Finish& finish) {
  const int64_t rows = c.batch * c.tokens;
  if (!c.packed)
    return deal_rows(c.threads, rows, FINISHED_ROWS, [&](int64_t row, int64_t end) {
      for (; row < end; ++row)
        finish.at(row / c.tokens).template row<SOURCE>(row, 0, c.columns, c.first_sums + row * c.columns,
                                                       c.second_sums ? c.second_sums + row * c.columns : nullptr);
    });
  const int64_t task = task_rows(rows, c.columns, c.threads, TASK_ROWS), panels = (c.columns + PANEL - 1) / PANEL;
  deal(c.threads, (rows + task - 1) / task * panels, [&](const auto& next) {
    const Multiplier multiplier(task, SOURCE == TWO_REGION);
    for (int64_t i; next(i);) {
      const int64_t row = i / panels * task;
      run_task<SOURCE>(c, row, rows - row < task ? rows : row + task, i % panels * PANEL, finish, multiplier);
    }
  });
}

template <typename Finish>
void linear(const LinearCall& c, const Finish& finish) {
  switch (c.source.grid) {
    case TWO_REGION: return linear_from<TWO_REGION>(c, finish);
    case ROW: return linear_from<ROW>(c, finish);
    default: return linear_from<UNIFORM>(c, finish);
  }
}

// Returns the number of the integer instructions to which this was compiled.
extern "C" int64_t tqdit_has_instructions() { return INSTRUCTIONS; }

// Says whether products belong here. TQDIT_FORCE_PANELS: also where they are slow, for tests on any processor.
extern "C" int64_t tqdit_has_products() {
#if defined(TQDIT_FORCE_PANELS)
  return 1;
#else
  return INSTRUCTIONS != GENERIC;
#endif
}

// Packs weight codes (columns, depth), depth a multiple of 4, into panels of 64 columns (the last: a multiple of 16) in
// the layout of dot_tile, and the sums of each column. packed: (columns rounded up to 16) * depth bytes.
extern "C" void tqdit_pack_weight(const int8_t* codes, int64_t columns, int64_t depth, int8_t* packed, int32_t* sums,
                       int64_t threads) {
  deal_rows(threads, columns, PANEL, [=](int64_t begin, int64_t) {
    const int64_t width = panel_width(columns, begin);
    int8_t* panel = packed + begin * depth;
    for (int64_t j = 0; j < width; ++j) {
      const int8_t* from = codes + (begin + j) * depth;
      int32_t total = 0;
      for (int64_t k = 0; k < depth; k += 4) {
        int32_t four = 0;
        if (begin + j < columns) std::memcpy(&four, from + k, 4);
        std::memcpy(panel + (k / 4 * width + j) * 4, &four, 4);
      }
      if (begin + j >= columns) continue;
      for (int64_t k = 0; k < depth; ++k) total += from[k];
      sums[begin + j] = total;
    }
  });
}

}  // namespace tqdit
