// Tile sizes, roles and registers of the Hopper kernel: every number that was tuned.
#pragma once

namespace cfpp {
namespace sm90 {

// One producer warpgroup and two consumer warpgroups, each of which owns 64 of the tile's queries. A tile has 176 keys
// because 9 such tiles cover a latent frame of 1560 tokens with 1.5 % to spare, and because the logits, probabilities
// and output of a much wider tile do not fit in the registers of two consumers. ptxas reserves 168 registers per thread
// for 384 threads; the producer gives up most of its own.
constexpr int kWarpgroup = 128, kConsumers = 2, kThreads = kWarpgroup * (1 + kConsumers);
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
constexpr int kGroupRows = 64, kRows = kConsumers * kGroupRows, kKeys = 176;
// Number of tiles of K, and of V, in shared memory: as many as fit in 227 KiB.
constexpr int stages_of(int head_dim) { return head_dim == 128 ? 2 : 4; }

constexpr int kConsumerBarrier = 1;  // a named barrier; 0 is __syncthreads()

}  // namespace sm90
}  // namespace cfpp
