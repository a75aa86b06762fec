// The result of a launcher: an empty Status is success, anything else is the message for the user.
#pragma once

#include <string>

// Prefix of small functions that kernels call too.
#ifdef __CUDACC__
#define CFPP_HOST_DEVICE __host__ __device__
#else
#define CFPP_HOST_DEVICE
#endif

namespace cfpp {

using Status = std::string;

}  // namespace cfpp
