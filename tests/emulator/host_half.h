// The project's host conversions of 16-bit floats under a name of their own: kernels bring cfpp::to_float themselves.
#pragma once

#include <cstdint>
#include <cstring>

#define cfpp cfpp_host
#include "common/half.h"
#undef cfpp
