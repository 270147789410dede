// The tile instructions of AMX in plain C++, for tests of the kernels on a processor without AMX: g++ -include tiles.h.
// A tile that was not configured, or that an instruction reads in another shape than it has, ends the process.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace emulated {

struct Tile { int rows, bytes; uint8_t data[16][64]; };
inline thread_local Tile tiles[8];

inline void need(bool condition) {
  if (!condition) std::abort();
}

inline void load_config(const void* config) {
  const uint8_t* from = static_cast<const uint8_t*>(config);
  need(from[0] == 1 && from[1] == 0);
  for (int i = 2; i < 16; ++i) need(from[i] == 0);
  for (int i = 0; i < 16; ++i) {
    uint16_t bytes;
    std::memcpy(&bytes, from + 16 + 2 * i, 2);
    const int rows = from[48 + i];
    need(i < 8 ? bytes <= 64 && rows <= 16 : bytes == 0 && rows == 0);
    if (i < 8) tiles[i] = Tile{rows, bytes, {}};
  }
}

inline void release() {
  for (Tile& tile : tiles) tile = Tile{};
}

inline Tile& used(int number) {
  need(tiles[number].rows > 0 && tiles[number].bytes > 0);
  return tiles[number];
}

inline void zero(int number) { std::memset(used(number).data, 0, sizeof(Tile::data)); }

inline void load(int number, const void* base, long stride) {
  Tile& tile = used(number);
  zero(number);
  for (int r = 0; r < tile.rows; ++r) std::memcpy(tile.data[r], static_cast<const uint8_t*>(base) + r * stride, tile.bytes);
}

inline void store(int number, void* base, long stride) {
  const Tile& tile = used(number);
  for (int r = 0; r < tile.rows; ++r) std::memcpy(static_cast<uint8_t*>(base) + r * stride, tile.data[r], tile.bytes);
}

// sums[m][n] += sum over k, i of left[m][4k + i] right[k][4n + i], unsigned and signed bytes.
inline void add_products(int sums, int left, int right) {
  Tile &c = used(sums), &a = used(left), &b = used(right);
  need(sums != left && sums != right && left != right);
  need(a.rows == c.rows && b.bytes == c.bytes && a.bytes == 4 * b.rows);
  for (int m = 0; m < c.rows; ++m)
    for (int n = 0; n < c.bytes / 4; ++n) {
      int32_t total;
      std::memcpy(&total, c.data[m] + 4 * n, 4);
      for (int k = 0; k < b.rows; ++k)
        for (int i = 0; i < 4; ++i) total += a.data[m][4 * k + i] * static_cast<int8_t>(b.data[k][4 * n + i]);
      std::memcpy(c.data[m] + 4 * n, &total, 4);
    }
}

}  // namespace emulated

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbusd
#define _tile_loadconfig emulated::load_config
#define _tile_release emulated::release
#define _tile_zero emulated::zero
#define _tile_loadd emulated::load
#define _tile_stored emulated::store
#define _tile_dpbusd emulated::add_products
#define __AMX_TILE__ 1
#define __AMX_INT8__ 1
