/* What products of dense and of int4 weights have in common. */

#pragma once

/* Tokens side by side, whose sums fill the registers. */
#define ABREAST 6
/* Bytes that a weight is fetched ahead of its turn, into the second cache: across pages, where the
processor does not by itself. */
#define AHEAD 65536
#define FETCH(address) __builtin_prefetch((const char *)(address) + AHEAD, 0, 2)

/* How many of those left to take next: about as many each time, since few would wait for their own
sums. */
static inline int num_abreast(int left) {
    int num_times = (left + ABREAST - 1) / ABREAST;
    return (left + num_times - 1) / num_times;
}
