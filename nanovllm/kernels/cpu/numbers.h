/* What the kernels compute with: vectors of numbers, which come in any dtype.

The vectors are GCC's, which clang has too: a processor with shorter ones takes several of its own.
Elements of any dtype are read to float32, computed with there, and rounded where the PyTorch twins
round. Functions that are handed a dtype to compile for are inlined, once for each.
*/

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

/* True if a processor multiplies pairs of bfloat16. */
#ifdef __AVX512BF16__
#define HAS_PAIRS 1
#else
#define HAS_PAIRS 0
#endif

#ifdef __AVX512F__
#include <immintrin.h>
#define LANES 16
#else
#define LANES 8
#endif
#define INLINE static inline __attribute__((always_inline, unused))
/* Elements from which on a second thread is worth waking. */
#define MANY 32768

/* As build.py numbers them. */
enum dtype { FLOAT32, FLOAT16, BFLOAT16, E4M3 };

typedef float floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t signed_ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t shorts __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef uint8_t bytes __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef _Float16 halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

INLINE int64_t size_of(enum dtype dtype) { return dtype == FLOAT32 ? 4 : dtype == E4M3 ? 1 : 2; }

/* Where an element of an array lies. */
INLINE void *at(const void *array, int64_t index, enum dtype dtype) {
    return (char *)array + index * size_of(dtype);
}

/* `yes` where a comparison holds, else `no`. */
INLINE floats where(ints holds, floats yes, floats no) {
    return (floats)(((ints)yes & holds) | ((ints)no & ~holds));
}

INLINE ints widened(shorts x) {
#ifdef __AVX512F__
    return (ints)_mm512_cvtepu16_epi32((__m256i)x); /* GCC's own takes five instructions */
#else
    return __builtin_convertvector(x, ints);
#endif
}

/* LANES elements from one on. */
INLINE floats load(const void *array, int64_t index, enum dtype dtype) {
    const void *x = at(array, index, dtype);
    if (dtype == FLOAT32) return *(const floats *)x;
    if (dtype == FLOAT16) return __builtin_convertvector(*(const halves *)x, floats);
    if (dtype == BFLOAT16) return (floats)(widened(*(const shorts *)x) << 16);
    /* Sign, exponent and mantissa of e4m3 at their places in float32, whose bias is 120 more. */
    ints bits = __builtin_convertvector(*(const bytes *)x, ints);
    return (floats)((bits & 0x80) << 24 | (bits & 0x7f) << 20) * 0x1p120f;
}

/* The nearest; what is below its normal numbers may become 0, as in its products. */
INLINE shorts to_bfloat16(floats x) {
#if HAS_PAIRS
    return (shorts)_mm512_cvtneps_pbh((__m512)x);
#else
    ints bits = (ints)x;
    ints nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    ints is_nan = (ints)(x != x);
    return __builtin_convertvector((nearest & ~is_nan) | (0x7fc0 & is_nan), shorts);
#endif
}

INLINE void store(void *array, int64_t index, floats x, enum dtype dtype) {
    void *out = at(array, index, dtype);
    if (dtype == FLOAT32) *(floats *)out = x;
    if (dtype == FLOAT16) *(halves *)out = __builtin_convertvector(x, halves);
    if (dtype == BFLOAT16) *(shorts *)out = to_bfloat16(x);
}

/* To the numbers that a dtype has. */
INLINE floats rounded(floats x, enum dtype dtype) {
    if (dtype == FLOAT16)
        return __builtin_convertvector(__builtin_convertvector(x, halves), floats);
    if (dtype == BFLOAT16) return (floats)(widened(to_bfloat16(x)) << 16);
    return x;
}

INLINE float sum(floats x) {
    typedef float half __attribute__((vector_size(2 * LANES)));
    typedef float quarter __attribute__((vector_size(LANES)));
    half halves[2];
    memcpy(halves, &x, sizeof x);
    half pairs = halves[0] + halves[1];
    quarter quarters[2];
    memcpy(quarters, &pairs, sizeof pairs);
    quarter rest = quarters[0] + quarters[1];
    float total = 0;
    for (int i = 0; i < LANES / 4; i++) total += rest[i];
    return total;
}

INLINE float maximum(floats x) {
    for (int step = LANES / 2; step; step /= 2) {
        signed_ints other;
        for (int i = 0; i < LANES; i++) other[i] = i ^ step;
        floats y = __builtin_shuffle(x, other);
        x = where((ints)(y > x), y, x);
    }
    return x[0];
}

/* Adds products of pairs of bfloat16, each pair in the place of a number. */
INLINE floats add_pairs(floats sum, floats x, floats y) {
#if HAS_PAIRS
    return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
#else
    sum += (floats)((ints)x << 16) * (floats)((ints)y << 16);
    return sum + (floats)((ints)x & 0xffff0000) * (floats)((ints)y & 0xffff0000);
#endif
}

/* e^x of x <= 0, or NaN: 2^n, n the nearest integer, times a polynomial of what is left. */
INLINE floats exp_of(floats x) {
    const float shift = 0x1.8p23f; /* added to a number, it leaves its integer in the lowest bits */
    floats shifted = x * 1.44269504f + shift, n = shifted - shift;
    floats r = x - n * 0.693145752f - n * 1.42860677e-6f;
    floats p = 0.00833345f + r * 0.00138890f;
    p = 1.0f + r * (1.0f + r * (0.5f + r * (0.166666667f + r * (0.0416666f + r * p))));
    floats power = (floats)(((ints)shifted + 127) << 23);
    return where((ints)(x < -87.0f), (floats){}, p * power);
}

/* The natural logarithm of x > 0: n log 2 + log m, where m is near 1, and a series of that. */
INLINE floats log_of(floats x) {
    const uint32_t least = 0x3f3504f3; /* the bits of sqrt(1/2): m is from there to sqrt(2) */
    signed_ints n = (signed_ints)((ints)x - least) >> 23;
    floats m = (floats)((ints)x - ((ints)n << 23));
    floats t = (m - 1.0f) / (m + 1.0f), u = t * t;
    floats series = 1.0f + u * (1 / 3.0f + u * (1 / 5.0f + u * (1 / 7.0f + u * (1 / 9.0f))));
    return __builtin_convertvector(n, floats) * 0.693147181f + 2.0f * t * series;
}

/* What an FP8 cache's numbers are multiplied by, powers of two: see layers/kv_quantization.py. */
INLINE float factor_of(int exponent) {
    uint32_t bits = exponent == 255 ? 0x7fc00000 : (uint32_t)exponent << 23;
    float factor;
    memcpy(&factor, &bits, sizeof factor);
    return factor;
}

/* call with a dtype that is known when this is compiled */
#define BY_DTYPE(dtype, call)                         \
    switch (dtype) {                                  \
        case FLOAT32: call(FLOAT32); break;           \
        case FLOAT16: call(FLOAT16); break;           \
        case BFLOAT16: call(BFLOAT16); break;         \
        default: break;                               \
    }
