/* RMSNorm of a row. Twin: nanovllm.layers.layernorm.rms_norm. */

#pragma once

#include "numbers.h"

INLINE void norm_row(
    const void *x, const void *weight, float eps, int size, void *out, enum dtype dtype) {
    floats squares = {};
    for (int i = 0; i < size; i += LANES) {
        floats v = load(x, i, dtype);
        squares += v * v;
    }
    float factor = 1 / sqrtf(sum(squares) / size + eps);
    for (int i = 0; i < size; i += LANES) {
        floats normed = rounded(load(x, i, dtype) * factor, dtype);
        store(out, i, normed * load(weight, i, dtype), dtype);
    }
}
