#pragma once

#include "numbers.h"

/* Where a sequence's position lies in a cache. */
INLINE int64_t slot_of(const int32_t *block_table, int position, int block_size) {
    int64_t block = block_table[position / block_size];
    return block * block_size + position % block_size;
}

/* What a query has found so far. */
struct found {
    float *sums; /* of values times weights, which are relative to the peak: [head_dim] */
    float peak, total; /* of scores, of weights */
};

/* A query's next scores, still to be multiplied by `scale`, become weights: the first n of `size`,
the others 0. What was found before becomes relative to the new peak. */
INLINE void weigh(
    float *scores, int n, int size, float scale, struct found *found, int head_dim,
    enum dtype dtype) {
    float before = found->peak;
    for (int i = n; i < size; i++) scores[i] = -INFINITY;
    floats peaks = (floats){} + before, sums = {};
    for (int i = 0; i < size; i += LANES) {
        floats some = load(scores, i, FLOAT32);
        peaks = where((ints)(some > peaks), some, peaks);
    }
    float peak = maximum(peaks);
    float base = peak == -INFINITY ? 0 : peak; /* what scores are relative to */
    for (int i = 0; i < size; i += LANES) {
        floats weight = exp_of((load(scores, i, FLOAT32) - base) * scale);
        store(scores, i, weight, dtype);
        sums += weight;
    }
    float rescale = exp_of((floats){} + (before - base) * scale)[0];
    found->peak = peak;
    found->total = found->total * rescale + sum(sums);
    for (int d = 0; d < head_dim && rescale != 1; d += LANES)
        store(found->sums, d, load(found->sums, d, FLOAT32) * rescale, FLOAT32);
}
