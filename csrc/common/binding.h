// How bindings call launchers and turn their Status into Python exceptions.
#pragma once

#include <stdexcept>

#include "common/checks.h"
#include "common/status.h"

namespace cfpp {

// Runs a CPU launcher without the GIL. Raises InputError with its message if it refuses a value of a tensor.
template <typename Launch>
void run_without_gil(const Launch& launch) {
  Status status;
  {
    const py::gil_scoped_release release;
    status = launch();
  }
  if (!status.empty()) raise_input_error(status);
}

// Raises RuntimeError if a CUDA launcher failed: the arguments have been checked before.
inline void raise_launch_error(const Status& status) {
  if (!status.empty()) throw std::runtime_error(status);
}

}  // namespace cfpp
