// The Python module of one backend, compiled once as _C (CPU) and once as _C_cuda. The bindings are headers of this one
// translation unit: pybind11 costs seconds in each that includes it.
#include <pybind11/pybind11.h>

#include "block_attention/block_attention_binding.h"
#include "kv_dequantize/kv_dequantize_binding.h"
#include "kv_update/kv_update_binding.h"
#if !CFPP_CUDA
#include "adaln_modulate/adaln_modulate_binding.h"
#include "denoise_update/denoise_update_binding.h"
#include "gated_residual/gated_residual_binding.h"
#endif

PYBIND11_MODULE(CFPP_MODULE, m) {
  cfpp::register_block_attention(m);
  cfpp::register_kv_dequantize(m);
  cfpp::register_kv_update(m);
#if !CFPP_CUDA
  cfpp::register_adaln_modulate(m);
  cfpp::register_denoise_update(m);
  cfpp::register_gated_residual(m);
#endif
}
