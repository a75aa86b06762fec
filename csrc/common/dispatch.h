// Run-time dtype codes to compile-time types.
#pragma once

#include <cstdint>

namespace cfpp {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16, kFloat64, kFloat8E4M3, kInt32, kInt64 };

constexpr int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
    case DType::kInt64:
      return 8;
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    case DType::kFloat8E4M3:
      return 1;
    default:
      return 2;
  }
}

// Returns the name that PyTorch prints.
constexpr const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "torch.float32";
    case DType::kBFloat16:
      return "torch.bfloat16";
    case DType::kFloat16:
      return "torch.float16";
    case DType::kFloat64:
      return "torch.float64";
    case DType::kFloat8E4M3:
      return "torch.float8_e4m3fn";
    case DType::kInt32:
      return "torch.int32";
    default:
      return "torch.int64";
  }
}

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
