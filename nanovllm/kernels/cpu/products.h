/* Products of tokens with panels of a matrix. */

#pragma once

#include "numbers.h"

/* Tokens side by side, whose sums fill the registers. */
#define ABREAST 6
/* Rows of a matrix that make a panel, and the vectors that hold them. */
#define VECTORS (LANES == 16 ? 4 : 2)
#define ROWS (VECTORS * LANES)
/* Bytes ahead that a weight is fetched, into the second cache, where several passes are made over
each of its parts: memory would rest in all but the first. In one the processor does it better. */
#define AHEAD 65536

/* Products of some tokens' inputs with a part of a panel are summed up, or added to sums there are.

x: the first token's, rows of x_stride elements. panel: input after input, each with ROWS elements;
of bfloat16, pair of inputs after pair, a row's two side by side; what lies so many bytes ahead is
fetched. sums: rows of sums_stride. */
typedef void multiply(
    const void *x, int64_t x_stride, const void *panel, int num_inputs, float *sums,
    int64_t sums_stride, int adds, int ahead);

/* By dtype, up to BFLOAT16, and number of tokens. */
extern __attribute__((visibility("hidden"))) multiply *const MULTIPLY[3][ABREAST + 1];

/* How many of those left to take next: about as many each time, since few would wait for their own
sums. */
static inline int num_abreast(int left) {
    int num_times = (left + ABREAST - 1) / ABREAST;
    return (left + num_times - 1) / num_times;
}
