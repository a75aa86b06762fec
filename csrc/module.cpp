// The Python module of one backend: compiled once as _C (CPU) and once as _C_cuda, one line per op.
#include <pybind11/pybind11.h>

namespace cfpp {
void register_adaln_modulate(pybind11::module_& m);
void register_block_attention(pybind11::module_& m);
void register_denoise_update(pybind11::module_& m);
void register_gated_residual(pybind11::module_& m);
void register_kv_dequantize(pybind11::module_& m);
void register_kv_update(pybind11::module_& m);
}  // namespace cfpp

PYBIND11_MODULE(CFPP_MODULE, m) {
  cfpp::register_adaln_modulate(m);
  cfpp::register_block_attention(m);
  cfpp::register_denoise_update(m);
  cfpp::register_gated_residual(m);
  cfpp::register_kv_dequantize(m);
  cfpp::register_kv_update(m);
}
