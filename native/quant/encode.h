#pragma once
// From float32 rows to GGUF bytes, in every format.

#include "quant/format.h"

namespace nomoat {

// Encodes rows[cols] that follow each other, all finite; `cols` is a whole number of the format's blocks. The same bytes for any
// number of threads. Throws std::invalid_argument for an unknown format.
void encode_rows(Format format, const float* x, int rows, int cols, uint8_t* out);

}  // namespace nomoat
