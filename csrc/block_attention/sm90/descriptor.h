// The layout of the Hopper kernel's tiles in shared memory, as the hardware describes it: the swizzled address of an
// element, the matrix descriptors of wgmma and the arguments of the TMA tensor maps. It includes no CUDA header, so
// that CPU tests can compare all three. A tile of 16-bit elements is a row of slabs, each 64 columns wide and as tall
// as the tile: a row of a slab has 128 bytes, the widest that TMA and wgmma swizzle. The 16-byte chunks of every 8 rows
// are permuted, which keeps both free of bank conflicts. Slabs are aligned to 1024 bytes.
#pragma once

#include <cstdint>

#include "common/status.h"

namespace cfpp {

constexpr int kSlabColumns = 64;
constexpr int kSlabRowBytes = 128;
constexpr int kSwizzleBytes = 8 * kSlabRowBytes;  // the pattern's period and a slab's alignment
constexpr int kMmaDepth = 16;                     // elements that one wgmma sums over

// Returns the matrix descriptor of an operand with 128-byte swizzle. `leading_bytes` is the distance of two slabs;
// wgmma uses it if the summed index is not the contiguous one and the tile has more than one slab.
CFPP_HOST_DEVICE constexpr uint64_t matrix_descriptor(uint32_t shared_address, int leading_bytes) {
  constexpr uint64_t kSwizzle128 = 1;
  return static_cast<uint64_t>((shared_address & 0x3ffff) >> 4) | static_cast<uint64_t>(leading_bytes >> 4) << 16 |
         static_cast<uint64_t>(kSwizzleBytes >> 4) << 32 | kSwizzle128 << 62;
}

// Returns the descriptor of the same tile from `bytes` on. The sum fits in the 14 address bits, because shared memory
// ends below 256 KiB.
CFPP_HOST_DEVICE constexpr uint64_t advance(uint64_t descriptor, int bytes) {
  return descriptor + static_cast<uint64_t>(bytes >> 4);
}

// Q and K, contiguous along the summed index: bytes from the tile's start to the operand of k-step `step`.
CFPP_HOST_DEVICE constexpr int k_major_step(int step, int rows) {
  constexpr int kStepsPerSlab = kSlabColumns / kMmaDepth;
  return step / kStepsPerSlab * rows * kSlabRowBytes + step % kStepsPerSlab * kMmaDepth * 2;
}

// V, whose rows are the summed index.
CFPP_HOST_DEVICE constexpr int mn_major_step(int step) { return step * kMmaDepth * kSlabRowBytes; }

// Arguments of cuTensorMapEncodeTiled. A box is one tile in the layout above, because the slab index is a dimension of
// its own that comes after the rows: dimensions are {column within the slab, token, slab, head, batch}.
struct TensorMapArguments {
  static constexpr int kRank = 5;
  const void* address;
  uint64_t sizes[kRank];              // elements
  uint64_t strides_bytes[kRank - 1];  // of dimensions 1 and up; dimension 0 is contiguous
  uint32_t box[kRank];                // elements

  // Bytes that one load writes, rows past the end of the tensor included: they are written as zeros.
  constexpr uint32_t box_bytes() const { return 2 * box[0] * box[1] * box[2] * box[3] * box[4]; }
};

// Returns the arguments for a 16-bit tensor [B, H, tokens, head_dim] with strides (B, H, token) in elements, in boxes
// of `rows` tokens.
inline TensorMapArguments tile_map(const void* address, int64_t batch, int64_t heads, int64_t tokens, int64_t head_dim,
                                   const int64_t (&stride)[3], int rows) {
  const auto unsign = [](int64_t value) { return static_cast<uint64_t>(value); };
  TensorMapArguments map{};
  map.address = address;
  const uint64_t slabs = unsign(head_dim) / kSlabColumns;
  const uint64_t sizes[] = {kSlabColumns, unsign(tokens), slabs, unsign(heads), unsign(batch)};
  // The stride of a dimension of size 1 is never used and may be any number, but the map requires a valid one.
  const int64_t head_stride = heads > 1 ? stride[1] : head_dim, batch_stride = batch > 1 ? stride[0] : head_dim;
  const int64_t token_stride = tokens > 1 ? stride[2] : head_dim;
  const uint64_t strides[] = {2 * unsign(token_stride), kSlabRowBytes, 2 * unsign(head_stride),
                              2 * unsign(batch_stride)};
  const uint32_t box[] = {kSlabColumns, static_cast<uint32_t>(rows), static_cast<uint32_t>(slabs), 1, 1};
  for (int i = 0; i < map.kRank; ++i) map.sizes[i] = sizes[i], map.box[i] = box[i];
  for (int i = 0; i < map.kRank - 1; ++i) map.strides_bytes[i] = strides[i];
  return map;
}

// Returns an empty Status if the hardware accepts the map, else the reason why not.
inline Status tensor_map_fault(const TensorMapArguments& map) {
  if (reinterpret_cast<uintptr_t>(map.address) % 16 != 0) return "the address must be a multiple of 16 bytes";
  for (uint64_t size : map.sizes) {
    if (size < 1 || size > (uint64_t{1} << 32)) return "sizes must be 1 to 2^32, got " + std::to_string(size);
  }
  for (uint64_t stride : map.strides_bytes) {
    if (stride % 16 != 0 || stride >= (uint64_t{1} << 40)) {
      return "strides must be multiples of 16 bytes below 2^40, got " + std::to_string(stride);
    }
  }
  for (uint32_t box : map.box) {
    if (box < 1 || box > 256) return "boxes must be 1 to 256 wide, got " + std::to_string(box);
  }
  if (map.box[0] * 2 > kSlabRowBytes) return "a box row must not be wider than the swizzle";
  return {};
}

}  // namespace cfpp
