#pragma once
// From float32 rows to GGUF bytes, in every format.

#include "quant/format.h"

namespace nomoat {

// Encodes `count` values that follow each other, a whole number of the format's blocks, all finite. The same bytes for any split.
// Throws std::invalid_argument for an unknown format.
void encode(Format format, const float* x, int64_t count, uint8_t* out);

}  // namespace nomoat
