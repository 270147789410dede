// Exact products of bytes in the tile registers of AMX. One instruction multiplies 16 rows of 64 unsigned bytes by 16
// columns of 64 signed bytes. A tile of columns is read from a packed weight as it lies: `dot_tile`'s layout is AMX's.
#pragma once
#include "products.h"

namespace tqdit {

#if defined(TQDIT_TILES)

constexpr int64_t TILE_SIDE = 16, TILE_DEPTH = 64;  // rows or columns of a tile, and bytes of each

// Configures the tile registers of this thread, all eight alike, while an object of this class lives.
class TileRegisters {
 public:
  TileRegisters() {
    struct alignas(64) { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } shape{};
    static_assert(sizeof shape == 64, "the layout of ldtilecfg");
    shape.palette = 1;
    for (int tile = 0; tile < 8; ++tile) shape.bytes[tile] = TILE_DEPTH, shape.rows[tile] = TILE_SIDE;
    memory_is_read(&shape);
    _tile_loadconfig(&shape);
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

  // The compiler does not know what a tile instruction reads; this completes all writes before it.
  static void memory_is_read(const void* p) { asm volatile("" : : "r"(p) : "memory"); }
};

// Multiplies rows of codes by packed columns in tiles, in a thread that has `TileRegisters`.
class TileProduct {
 public:
  TileProduct() : left_(2 * TILE_SIDE * TILE_DEPTH), right_(2 * TILE_SIDE * TILE_DEPTH) {
    std::memset(left_.data(), 0, 2 * TILE_SIDE * TILE_DEPTH);
    std::memset(right_.data(), 0, 2 * TILE_SIDE * TILE_DEPTH);
  }

  // c (rows, columns), rows `ldc` apart, as `dot` computes it. columns: a multiple of 16. The depth is the same in all
  // calls of one object. The last rows share a tile with rows before them, whose sums are computed twice.
  void operator()(const uint8_t* a, int64_t lda, int64_t rows, const int8_t* b, int64_t columns, int64_t fours,
                  int32_t* c, int64_t ldc) const {
    TileRegisters::memory_is_read(a);
    if (rows < TILE_SIDE) return dot(a, lda, rows, b, columns, fours, c, ldc);
    for (int64_t j = 0; j < columns; j += 2 * TILE_SIDE) {
      const Piece piece{a, b + j * 4, lda, columns * 4, fours * 4, c + j, ldc};
      columns - j < 2 * TILE_SIDE ? all_rows<1>(piece, rows) : all_rows<2>(piece, rows);
    }
  }

 private:
  struct Piece {
    const uint8_t* a;  // rows `lda` apart
    const int8_t* b;   // groups of four bytes of depth, `ldb` apart
    int64_t lda, ldb, depth;
    int32_t* c;
    int64_t ldc;
  };

  template <int C>
  void all_rows(const Piece& p, int64_t rows) const {
    int64_t r = 0;
    for (; rows - r >= 2 * TILE_SIDE; r += 2 * TILE_SIDE) multiply<2, C>(from_row(p, r));
    if (rows - r >= TILE_SIDE) multiply<1, C>(from_row(p, r)), r += TILE_SIDE;
    if (r < rows) multiply<1, C>(from_row(p, rows - TILE_SIDE));
  }

  static Piece from_row(Piece p, int64_t row) {
    p.a += row * p.lda, p.c += row * p.ldc;
    return p;
  }

  // Computes R x C tiles of sums, in registers 0 to 3. Registers 4 and 5 have the rows, 6 and 7 the columns.
  template <int R, int C>
  void multiply(const Piece& p) const {
    _tile_zero(0);
    if constexpr (C == 2) _tile_zero(1);
    if constexpr (R == 2) _tile_zero(2);
    if constexpr (R == 2 && C == 2) _tile_zero(3);
    const int64_t whole = p.depth / TILE_DEPTH * TILE_DEPTH;
    for (int64_t k = 0; k < whole; k += TILE_DEPTH) add<R, C>(p.a + k, p.lda, p.b + k / 4 * p.ldb, p.ldb);
    if (whole < p.depth) {
      copy_last<R, C>(p, whole);
      add<R, C>(left_.data(), TILE_DEPTH, right_.data(), 2 * TILE_DEPTH);
    }
    _tile_stored(0, p.c, p.ldc * 4);
    if constexpr (C == 2) _tile_stored(1, p.c + TILE_SIDE, p.ldc * 4);
    if constexpr (R == 2) _tile_stored(2, p.c + TILE_SIDE * p.ldc, p.ldc * 4);
    if constexpr (R == 2 && C == 2) _tile_stored(3, p.c + TILE_SIDE * p.ldc + TILE_SIDE, p.ldc * 4);
  }

  template <int R, int C>
  static void add(const uint8_t* a, int64_t lda, const int8_t* b, int64_t ldb) {
    _tile_loadd(6, b, ldb);
    _tile_loadd(4, a, lda);
    _tile_dpbusd(0, 4, 6);
    if constexpr (C == 2) {
      _tile_loadd(7, b + TILE_DEPTH, ldb);
      _tile_dpbusd(1, 4, 7);
    }
    if constexpr (R == 2) {
      _tile_loadd(5, a + TILE_SIDE * lda, lda);
      _tile_dpbusd(2, 5, 6);
    }
    if constexpr (R == 2 && C == 2) _tile_dpbusd(3, 5, 7);
  }

  // Copies what is left of the depth from `begin` on. The rest of the copies stays 0.
  template <int R, int C>
  void copy_last(const Piece& p, int64_t begin) const {
    for (int64_t r = 0; r < R * TILE_SIDE; ++r)
      std::memcpy(left_.data() + r * TILE_DEPTH, p.a + r * p.lda + begin, p.depth - begin);
    for (int64_t k = 0; k < (p.depth - begin) / 4; ++k)
      std::memcpy(right_.data() + k * 2 * TILE_DEPTH, p.b + (begin / 4 + k) * p.ldb, C * TILE_DEPTH);
    TileRegisters::memory_is_read(left_.data());
  }

  const Buffer<uint8_t> left_;
  const Buffer<int8_t> right_;
};

#else

struct TileRegisters {};
struct TileProduct {
  void operator()(const uint8_t* a, int64_t lda, int64_t rows, const int8_t* b, int64_t columns, int64_t fours,
                  int32_t* c, int64_t ldc) const {
    dot(a, lda, rows, b, columns, fours, c, ldc);
  }
};

#endif

}  // namespace tqdit
