// Stands in for the CUDA header of this name.
#pragma once

#include "host_half.h"

using __half = cfpp_host::float16;
inline float __half2float(__half value) { return cfpp_host::to_float(value); }
inline __half __float2half_rn(float value) { return cfpp_host::from_float<__half>(value); }
