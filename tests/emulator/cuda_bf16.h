// Stands in for the CUDA header of this name.
#pragma once

#include "host_half.h"

using __nv_bfloat16 = cfpp_host::bfloat16;
inline float __bfloat162float(__nv_bfloat16 value) { return cfpp_host::to_float(value); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return cfpp_host::from_float<__nv_bfloat16>(value); }
