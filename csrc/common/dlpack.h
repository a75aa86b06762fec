// The part of DLPack's C interface (major version 1, https://dmlc.github.io/dlpack/latest/c_api.html) that the bindings
// use: field for field as published, names ours. Capsules of __dlpack__() hold a Managed; __dlpack_c_exchange_api__ on
// a tensor type holds an ExchangeApi.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cfpp::dlpack {

struct Version {
  uint32_t major, minor;
};

enum DeviceType : int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3, kCudaManaged = 13 };

struct Device {
  int32_t type, index;
};

enum TypeCode : uint8_t { kInt = 0, kFloat = 2, kBFloat = 4, kFloat8E4M3FN = 10 };

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct View {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; before version 1.2 null says contiguous
  uint64_t byte_offset;
};

struct Managed {
  View view;
  void* context;
  void (*deleter)(Managed*);
};

struct ExchangeApi {
  Version version;
  const ExchangeApi* older;  // of an earlier major version; only version and older may be read before a check
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*view_from_object)(void* object, View* out);  // 0, or -1 with a Python error set; may be null
  int (*current_stream)(int32_t device_type, int32_t device_index, void** out);
};

static_assert(sizeof(void*) != 8 || (sizeof(View) == 48 && offsetof(View, ndim) == 16 && offsetof(View, dtype) == 20 &&
                                     offsetof(View, byte_offset) == 40 && sizeof(ExchangeApi) == 56 &&
                                     offsetof(ExchangeApi, view_from_object) == 40),
              "the layout is fixed by DLPack");

}  // namespace cfpp::dlpack
