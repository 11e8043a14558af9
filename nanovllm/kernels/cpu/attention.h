#pragma once

#include "numbers.h"

/* Where a sequence's position lies in a cache. */
INLINE int64_t slot_of(const int32_t *block_table, int position, int block_size) {
    int64_t block = block_table[position / block_size];
    return block * block_size + position % block_size;
}

/* The first n of `size` scores become weights relative to the peak so far, the others 0.

Returns what sums of weights relative to the peak before are multiplied by. */
INLINE float weigh(float *scores, int n, int size, float *peak, float *total) {
    float before = *peak;
    for (int i = n; i < size; i++) scores[i] = -INFINITY;
    floats peaks = (floats){} + before, sums = {};
    for (int i = 0; i < size; i += LANES) {
        floats some = load(scores, i, FLOAT32);
        peaks = where((ints)(some > peaks), some, peaks);
    }
    for (int i = 0; i < LANES; i++) *peak = peaks[i] > *peak ? peaks[i] : *peak;
    for (int i = 0; i < size; i += LANES) {
        floats weight = exp_of(load(scores, i, FLOAT32) - *peak);
        store(scores, i, weight, FLOAT32);
        sums += weight;
    }
    float rescale = exp_of((floats){} + (before - *peak))[0];
    *total = *total * rescale + sum(sums);
    return rescale;
}
