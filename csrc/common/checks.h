// Checks of tensor arguments for bindings. Each throws InputError "<op>: <argument> must be <wanted>, got <got>".
#pragma once

#include <algorithm>
#include <initializer_list>
#include <string>

#include "common/tensor.h"

namespace cfpp {

// A required axis: its name in messages and its size; a negative size accepts any.
struct Axis {
  const char* name;
  int64_t size;
};

inline void check_shape(const Tensor& tensor, std::initializer_list<Axis> wanted) {
  bool fits = tensor.dim() == static_cast<int>(wanted.size());
  int i = 0;
  for (const Axis& axis : wanted) {
    if (!fits) break;
    fits = axis.size < 0 || tensor.size(i) == axis.size;
    ++i;
  }
  if (fits) return;
  std::string text;
  for (const Axis& axis : wanted) {
    text += (text.empty() ? "" : ", ") + std::string(axis.name);
    if (axis.size >= 0) text += "=" + std::to_string(axis.size);
  }
  tensor.refuse("[" + text + "]", tensor.shape_text());
}

inline void check_dtype(const Tensor& tensor, DType wanted) {
  if (tensor.dtype() != wanted) tensor.refuse(name_of(wanted), name_of(tensor.dtype()));
}

inline void check_dtype(const Tensor& tensor, std::initializer_list<DType> wanted) {
  if (std::find(wanted.begin(), wanted.end(), tensor.dtype()) != wanted.end()) return;
  std::string text;
  for (const DType dtype : wanted) text += (text.empty() ? "" : " or ") + std::string(name_of(dtype));
  tensor.refuse(text, name_of(tensor.dtype()));
}

inline void check_same_dtype(const Tensor& tensor, const Tensor& like) {
  if (tensor.dtype() != like.dtype()) {
    tensor.refuse(std::string(name_of(like.dtype())) + " like " + like.name(), name_of(tensor.dtype()));
  }
}

inline void check_same_device(const Tensor& tensor, const Tensor& like) {
  if (tensor.is_cuda() != like.is_cuda() || tensor.device_index() != like.device_index()) {
    tensor.refuse("on " + like.device_text() + " like " + like.name(), tensor.device_text());
  }
}

// A compiled module runs on one device type only.
inline void check_device(const Tensor& tensor, bool is_cuda) {
  if (tensor.is_cuda() != is_cuda) tensor.refuse(is_cuda ? "on a CUDA device" : "on the CPU", tensor.device_text());
}

// The last axis must have stride 1, unless its size is 0 or 1.
inline void check_contiguous_rows(const Tensor& tensor) {
  const int last = tensor.dim() - 1;
  if (last >= 0 && tensor.size(last) > 1 && tensor.stride(last) != 1) {
    tensor.refuse("contiguous in its last dimension", "stride " + std::to_string(tensor.stride(last)));
  }
}

inline void check_contiguous(const Tensor& tensor) {
  if (!tensor.is_contiguous()) tensor.refuse("contiguous", tensor.strides_text() + " as strides");
}

// Token ranges [B, G, R, 2] in int32. queries: if given, the number of queries, which G must divide.
inline void check_ranges(const Tensor& ranges, int64_t batch, int64_t queries = 0) {
  if (ranges.dim() != 4 || ranges.size(0) != batch || ranges.size(1) < 1 || ranges.size(2) < 1 || ranges.size(3) != 2 ||
      queries % ranges.size(1) != 0) {
    const std::string divisor = queries == 0 ? "" : " with G a divisor of Sq=" + std::to_string(queries);
    ranges.refuse("[B=" + std::to_string(batch) + ", G, R, 2]" + divisor, ranges.shape_text());
  }
  check_dtype(ranges, DType::kInt32);
  check_contiguous(ranges);
}

}  // namespace cfpp
