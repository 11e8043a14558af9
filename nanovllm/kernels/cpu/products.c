#include "products.h"

/* One element, in all lanes; a pair of bfloat16 counts as one. */
INLINE floats broadcast(const void *x, int64_t index, enum dtype dtype) {
    if (dtype == FLOAT16) return ((const _Float16 *)x)[index] - (floats){};
    return (floats)(((const uint32_t *)x)[index] + (ints){});
}

INLINE void multiply_panel(
    const void *x, int64_t x_stride, const void *panel, int num_inputs, float *sums,
    int64_t sums_stride, int adds, int ahead, enum dtype dtype, const int NUM) {
    floats products[ABREAST][VECTORS];
    for (int token = 0; token < NUM; token++)
        for (int v = 0; v < VECTORS; v++)
            products[token][v] =
                adds ? load(sums, token * sums_stride + v * LANES, FLOAT32) : (floats){};
    /* Two inputs of bfloat16 are one element. */
    int size = dtype == BFLOAT16 ? num_inputs / 2 : num_inputs;
    enum dtype element = dtype == BFLOAT16 ? FLOAT32 : dtype;
    x_stride = dtype == BFLOAT16 ? x_stride / 2 : x_stride;
    for (int i = 0; i < size; i++) {
        floats weights[VECTORS];
        for (int v = 0; v < VECTORS; v++) {
            const char *address = at(panel, (int64_t)i * ROWS + v * LANES, element);
            __builtin_prefetch(address + ahead, 0, 2);
            weights[v] = load(address, 0, element);
        }
        for (int token = 0; token < NUM; token++) {
            floats input = broadcast(x, token * x_stride + i, element);
            for (int v = 0; v < VECTORS; v++)
                if (dtype == BFLOAT16)
                    products[token][v] = add_pairs(products[token][v], weights[v], input);
                else products[token][v] += weights[v] * input;
        }
    }
    for (int token = 0; token < NUM; token++)
        for (int v = 0; v < VECTORS; v++)
            store(sums, token * sums_stride + v * LANES, products[token][v], FLOAT32);
}

/* One for each number of tokens: inlined into one function, they would keep sums in memory. */
#define DEFINE(DTYPE, NUM)                                                                       \
    static __attribute__((noinline)) void multiply_##DTYPE##_##NUM(                              \
        const void *x, int64_t x_stride, const void *panel, int num_inputs, float *sums,         \
        int64_t sums_stride, int adds, int ahead) {                                              \
        multiply_panel(                                                                          \
            x, x_stride, panel, num_inputs, sums, sums_stride, adds, ahead, DTYPE, NUM);         \
    }
#define DEFINE_ALL(DTYPE)                                                                        \
    DEFINE(DTYPE, 1) DEFINE(DTYPE, 2) DEFINE(DTYPE, 3)                                           \
    DEFINE(DTYPE, 4) DEFINE(DTYPE, 5) DEFINE(DTYPE, 6)
DEFINE_ALL(FLOAT32)
DEFINE_ALL(FLOAT16)
DEFINE_ALL(BFLOAT16)

#define NAMES(DTYPE)                                                                             \
    {NULL, multiply_##DTYPE##_1, multiply_##DTYPE##_2, multiply_##DTYPE##_3,                     \
     multiply_##DTYPE##_4, multiply_##DTYPE##_5, multiply_##DTYPE##_6}
multiply *const MULTIPLY[3][ABREAST + 1] = {NAMES(FLOAT32), NAMES(FLOAT16), NAMES(BFLOAT16)};
