// Run-time dtype codes (shared with cfpp_rt/ops/_library.py) to compile-time types.
#pragma once

#include <cstdint>

namespace cfpp {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

constexpr int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Calls f(tag) with a value-initialised Float, BFloat or Half, the caller's types for the three codes.
template <typename Float, typename BFloat, typename Half, typename F>
auto dispatch_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kBFloat16:
      return f(BFloat{});
    case DType::kFloat16:
      return f(Half{});
    default:
      return f(Float{});
  }
}

}  // namespace cfpp
