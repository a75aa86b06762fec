// Checks of modulation rows for bindings: shift, scale and gate have one row of channels per latent frame.
#pragma once

#include <string>

#include "common/checks.h"

namespace cfpp {

// rows [B or 1, F, dim] for tokens x [B, S, dim], F a divisor of S. frames: the required F, or negative for any.
inline void check_frame_rows(const Tensor& rows, const Tensor& x, int64_t frames = -1) {
  const bool fits = rows.dim() == 3 && (rows.size(0) == 1 || rows.size(0) == x.size(0)) && rows.size(1) > 0 &&
                    x.size(1) % rows.size(1) == 0 && (frames < 0 || rows.size(1) == frames) &&
                    rows.size(2) == x.size(2);
  if (fits) return;
  const std::string divisor = "F a divisor of S=" + std::to_string(x.size(1));
  rows.refuse("[B=" + std::to_string(x.size(0)) + " or 1, F, dim=" + std::to_string(x.size(2)) + "] with " +
                  (frames < 0 ? divisor : "F=" + std::to_string(frames)),
              rows.shape_text());
}

}  // namespace cfpp
