// Keys and values in the layout of `dot`, signed.
#pragma once
#include "products.h"

namespace tqdit {

// Keys as the columns of Q K^T: four adjacent items of a key become one group. Codes turn signed; padding is 0.
void pack_keys(const uint8_t* keys, int64_t stride, int64_t tokens, int64_t dim, int8_t* packed, int64_t columns) {
  std::memset(packed, 0, columns * round_up(dim, 4));
  const int64_t whole = dim / 4 * 4, rest = dim - whole;
  for (int64_t j = 0; j < tokens; ++j) {
    const uint8_t* key = keys + j * stride;
    uint32_t four;
    for (int64_t k = 0; k < whole; k += 4) {
      std::memcpy(&four, key + k, 4);
      four ^= 0x80808080u;
      std::memcpy(packed + k * columns + j * 4, &four, 4);
    }
    for (int64_t i = 0; i < rest; ++i)
      packed[whole * columns + j * 4 + i] = static_cast<int8_t>(key[whole + i] ^ 0x80);
  }
}

// Values as the columns of P V: one item of four successive tokens becomes one group.
void pack_values(const uint8_t* values, int64_t stride, int64_t tokens, int64_t dim, int8_t* packed, int64_t columns,
                 int64_t fours) {
  for (int64_t group = 0; group < fours; ++group)
    for (int64_t j = 0; j < columns; j += LANES) {
      vint four{};
      for (int64_t i = 0; i < 4 && group * 4 + i < tokens; ++i) {
        const uint8_t* from = values + (group * 4 + i) * stride + j;
        vbyte bytes = vbyte{} + static_cast<uint8_t>(0x80);  // a padding lane has code 0
        if (dim - j >= LANES)
          std::memcpy(&bytes, from, LANES);
        else
          std::memcpy(&bytes, from, dim - j);
        four |= (widen(bytes) ^ 0x80) << (8 * i);
      }
      std::memcpy(packed + (group * columns + j) * 4, &four, sizeof four);
    }
}

// Returns the sums of the columns of a packed matrix. `ones` points to 4 * fours ones.
void column_sums(const uint8_t* ones, const int8_t* packed, int64_t columns, int64_t fours, int32_t* sums) {
  dot(ones, 0, 1, packed, columns, fours, sums, 0);
}

}  // namespace tqdit
