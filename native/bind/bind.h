#pragma once
// The only folder that knows Python. It checks shapes, releases the GIL, calls ops, and maps C++ exceptions to Python ones.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>

#include "op/engine.h"

namespace nb = nanobind;
using namespace nomoat;

using Floats = nb::ndarray<float, nb::c_contig, nb::device::cpu>;
using ConstFloats = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using ConstInts = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ConstBytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// Never converted: a result would go into the copy, and the engine keeps addresses of weights and adapters.
inline auto array(const char* name) { return nb::arg(name).noconvert(); }

inline void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

inline Mode mode_of(const std::string& name) {
  if (name == "int8") return Mode::int8;
  if (name == "bf16") return Mode::bf16;
  if (name == "f32") return Mode::f32;
  throw std::invalid_argument("precision '" + name + "': expected int8, bf16 or f32");
}

inline Matrix matrix_view(int format, int rows, int cols, const ConstBytes& packed) {
  Matrix m = packed_matrix(Format(format), rows, cols);
  require(packed.size() == packed_bytes(m), "packed weights: " + std::to_string(packed.size()) + " bytes, expected " +
                                                std::to_string(packed_bytes(m)) + " for " + std::to_string(rows) + " x " +
                                                std::to_string(cols));
  m.data = packed.data();
  return m;
}

inline void check_ids(const ConstInts& ids, int limit, const char* what) {
  for (size_t i = 0; i < ids.shape(0); i++)
    require(ids.data()[i] >= 0 && ids.data()[i] < limit,
            std::string(what) + " " + std::to_string(ids.data()[i]) + ": expected 0 to " + std::to_string(limit - 1));
}

// native/bind/kernels.cpp: the machine, packed weights, optimizer, sampler; what the machine can do at most.
void bind_kernels(nb::module_& m);
