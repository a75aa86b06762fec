// descriptor.h: literal values of the fields that the hardware reads, and the swizzled tile as three units access it,
// which must agree on every element: TMA that writes it, and wgmma that reads it along rows (Q, K) or down columns (V).
#include <string>

#include "block_attention/sm90/descriptor.h"
#include "csrc/check.h"

using namespace cfpp;

constexpr int kKeys = 176;

// Byte within a tile of `rows` rows that holds element (row, column), as the head of descriptor.h describes it.
constexpr int tile_byte(int row, int column, int rows) {
  return column / 64 * rows * 128 + row * 128 + ((column % 64 * 2) ^ ((row & 7) << 4));
}

void check_literals() {
  constexpr uint64_t kQuery = matrix_descriptor(0x8000, 0), kValue = matrix_descriptor(0x8000, kKeys * kSlabRowBytes);
  static_assert(kQuery >> 32 == 0x40000040, "128-byte swizzle, 1024 bytes from 8 rows to the next 8");
  static_assert(static_cast<uint32_t>(kQuery) == 0x800);
  static_assert(kValue >> 32 == 0x40000040);
  static_assert(static_cast<uint32_t>(kValue) == (0x800 | 1408u << 16), "22528 bytes from slab to slab");
  static_assert(static_cast<uint32_t>(matrix_descriptor(0x8000, 128 * kSlabRowBytes)) >> 16 == 16384 >> 4);
  static_assert(static_cast<uint32_t>(matrix_descriptor(0x8000, 192 * kSlabRowBytes)) >> 16 == 24576 >> 4);
  // k-steps: 32 bytes apart within a slab, then the next slab; 16 rows of 128 bytes apart in V.
  static_assert(k_major_step(3, kKeys) == 96 && k_major_step(4, kKeys) == 22528 && k_major_step(7, 128) == 16384 + 96);
  static_assert(mn_major_step(1) == 2048 && mn_major_step(10) == 20480);
  // The last operand of a CTA's shared memory still fits in the 14 bits of the address.
  constexpr uint64_t kLast = advance(matrix_descriptor(232448 - 1024, 22528), 1008);
  static_assert(kLast >> 14 == matrix_descriptor(0, 22528) >> 14);
  static_assert((kLast & 0x3fff) << 4 == 232448 - 16);
}

// The hardware swizzles addresses: bits 4 to 6 are XORed with bits 7 to 9.
int swizzled(int address) { return address ^ ((address >> 7 & 7) << 4); }

int field(uint64_t descriptor, int bit) { return static_cast<int>(descriptor >> bit & 0x3fff) << 4; }

void check_tile(int rows, int columns, int base) {
  for (int row = 0; row < rows; ++row) {
    for (int column = 0; column < columns; ++column) {
      const std::string context = std::to_string(rows) + " rows, element " + std::to_string(row) + ", " +
                                  std::to_string(column) + " at " + std::to_string(base);
      const int here = base + tile_byte(row, column, rows);
      // TMA writes its box densely, dimension 0 first: column in the slab, row, slab.
      const int dense = ((column / 64 * rows + row) * 64 + column % 64) * 2;
      CHECK(swizzled(base + dense) == here, context);
      // wgmma, contiguous along the summed index: the column.
      const uint64_t along =
          advance(matrix_descriptor(static_cast<uint32_t>(base), 0), k_major_step(column / 16, rows));
      CHECK(swizzled(field(along, 0) + row / 8 * field(along, 32) + row % 8 * 128 + column % 16 * 2) == here, context);
      // wgmma, summed over rows.
      const uint64_t down =
          advance(matrix_descriptor(static_cast<uint32_t>(base), rows * 128), mn_major_step(row / 16));
      const int k = row % 16;
      const int walked = field(down, 0) + column / 64 * field(down, 16) + k / 8 * field(down, 32) + k % 8 * 128;
      CHECK(swizzled(walked + column % 64 * 2) == here, context);
    }
  }
}

void check_maps() {
  alignas(16) static char memory[64];
  // A view [B=2, H=12, tokens=1560, D=128] of [B, tokens, H, D] with 20 more rows per batch.
  const int64_t stride[] = {1580 * 12 * 128, 128, 12 * 128};
  const TensorMapArguments map = tile_map(memory, 2, 12, 1560, 128, stride, kKeys);
  const uint64_t sizes[] = {64, 1560, 2, 12, 2}, strides[] = {3072, 128, 256, 1580 * 3072};
  const uint32_t box[] = {64, kKeys, 2, 1, 1};
  for (int i = 0; i < 5; ++i) CHECK(map.sizes[i] == sizes[i] && map.box[i] == box[i], "dimension " + std::to_string(i));
  for (int i = 0; i < 4; ++i) CHECK(map.strides_bytes[i] == strides[i], "stride " + std::to_string(i));
  CHECK(map.address == memory, "address");
  CHECK(map.box_bytes() == 45056, "K or V of a tile");
  CHECK(tile_map(memory, 2, 12, 1560, 64, stride, 128).box_bytes() == 16384, "Q at head_dim 64");
  CHECK(tensor_map_fault(map).empty(), tensor_map_fault(map));

  // What a dimension of size 1 has for a stride does not matter.
  const int64_t odd[] = {3, 5, 128};
  CHECK(tensor_map_fault(tile_map(memory, 1, 1, 9, 128, odd, kKeys)).empty(), "strides of dimensions of size 1");

  const auto refused = [&](const TensorMapArguments& bad, const char* word) {
    CHECK(tensor_map_fault(bad).find(word) != std::string::npos, word);
  };
  refused(tile_map(memory + 2, 2, 12, 1560, 128, stride, kKeys), "address");
  refused(tile_map(memory, 2, 12, 1560, 128, odd, kKeys), "16 bytes");
  refused(tile_map(memory, 2, 12, 0, 128, stride, kKeys), "sizes");
  refused(tile_map(memory, 2, 12, 1560, 128, stride, 257), "boxes");
  const int64_t far[] = {int64_t{1} << 39, 128, 1536};
  refused(tile_map(memory, 2, 12, 1560, 128, far, kKeys), "2^40");
}

int main() {
  check_literals();
  for (int rows : {64, 128, 144, kKeys, 192}) {
    for (int columns : {64, 128}) {
      for (int base : {0, 1024, 33 * 1024}) check_tile(rows, columns, base);
    }
  }
  check_maps();
  return 0;
}
