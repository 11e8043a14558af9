/* A linear layer, with the norm before it and the activation or the sum after it. */

#include "norm.h"
#include "products.h"

/* Inputs after which the next tokens take their turn, while a panel's part is in the cache. */
#define INPUTS 512
/* Tokens whose sums with a panel stay in the cache, and fewest that are worth a thread. */
#define MOST_TOKENS 128
#define FEWEST_TOKENS 48

/* residual + (norm(x) times the matrix + bias), or SiLU(gate) * up of the product.

The matrix is in panels of ROWS rows; within one, input after input; of bfloat16, pair of inputs
after pair, a row's two side by side. A gated layer's panel has ROWS / 2 of gate, then of up. */
struct linear {
    const void *x; /* [num_tokens, num_inputs] */
    const void *panels, *bias, *norm_weight, *residual; /* but for the first, or NULL */
    void *normed; /* scratch, as x */
    void *out;    /* [num_tokens, num_out] */
    float eps;
    int num_tokens, num_out, num_inputs, is_gated;
    enum dtype dtype;
};

int linear_rows(void) { return ROWS; }

/* True if products of bfloat16 are the processor's own, not made of float32's. */
int linear_has_pairs(void) { return HAS_PAIRS; }

INLINE floats silu(floats x) {
    floats small = exp_of(where((ints)(x > 0.0f), -x, x));
    return x * where((ints)(x > 0.0f), 1.0f + (floats){}, small) / (1.0f + small);
}

/* LANES elements from one on, of which the first `num` are there. */
INLINE floats load_some(const void *array, int64_t index, int num, enum dtype dtype) {
    if (num >= LANES) return load(array, index, dtype);
    char some[4 * LANES] = {0};
    if (num > 0) memcpy(some, at(array, index, dtype), num * size_of(dtype));
    return load(some, 0, dtype);
}

INLINE void store_some(void *array, int64_t index, floats x, int num, enum dtype dtype) {
    char some[4 * LANES];
    if (num >= LANES) store(array, index, x, dtype);
    else if (num > 0) {
        store(some, 0, x, dtype);
        memcpy(at(array, index, dtype), some, num * size_of(dtype));
    }
}

/* Where a panel's part of some tokens' outputs will go, to write it without waiting. */
INLINE void fetch_rows(
    const struct linear *step, int panel, int token, int num, enum dtype dtype) {
    int size = step->is_gated ? ROWS / 2 : ROWS;
    for (int i = 0; i < num; i++) {
        int64_t place = (int64_t)(token + i) * step->num_out + panel * size;
        for (int j = 0; j < size * size_of(dtype); j += 64)
            __builtin_prefetch((char *)at(step->out, place, dtype) + j, 1);
    }
}

/* A panel's sums of a token, with what is done to them, go to its row of the output. */
INLINE void finish_row(
    const struct linear *step, int panel, int token, const float *sums, enum dtype dtype) {
    int size = step->is_gated ? ROWS / 2 : ROWS, num_out = step->num_out;
    for (int i = 0, first = panel * size; i < size; i += LANES, first += LANES) {
        int num = num_out - first;
        int64_t place = (int64_t)token * num_out + first;
        floats y = load(sums, i, FLOAT32);
        if (step->bias) y += load_some(step->bias, first, num, dtype);
        if (step->is_gated) {
            floats up = load(sums, size + i, FLOAT32);
            if (step->bias) up += load_some(step->bias, num_out + first, num, dtype);
            y = silu(y) * up;
        }
        if (step->residual) y += load_some(step->residual, place, num, dtype);
        store_some(step->out, place, y, num, dtype);
    }
}

/* A panel's part of the outputs of `num` tokens from one on; x: the layer's inputs, normed. */
INLINE void run_panel(
    const struct linear *step, const void *x, int panel, int first, int num, enum dtype dtype) {
    int num_inputs = step->num_inputs, ahead = num > ABREAST ? AHEAD : 0;
    float sums[num][ROWS];
    for (int input = 0; input < num_inputs; input += INPUTS) {
        int size = num_inputs - input < INPUTS ? num_inputs - input : INPUTS;
        int64_t place = ((int64_t)panel * num_inputs + input) * ROWS;
        const void *part = at(step->panels, place, dtype);
        for (int token = 0, abreast; token < num; token += abreast) {
            abreast = num_abreast(num - token);
            const void *inputs = at(x, (int64_t)(first + token) * num_inputs + input, dtype);
            if (input + size == num_inputs) fetch_rows(step, panel, first + token, abreast, dtype);
            MULTIPLY[dtype][abreast](
                inputs, num_inputs, part, size, sums[token], ROWS, input > 0, ahead);
        }
    }
    for (int token = 0; token < num; token++)
        finish_row(step, panel, first + token, sums[token], dtype);
}

INLINE void run(const struct linear *step, int num_threads, enum dtype dtype) {
    int num_tokens = step->num_tokens, num = step->is_gated ? ROWS / 2 : ROWS;
    int num_panels = (step->num_out + num - 1) / num;
    /* Parts of the tokens, so many that all threads have some. */
    int parts = num_tokens / MOST_TOKENS + 1;
    while (parts * num_panels < 4 * num_threads && num_tokens >= 2 * FEWEST_TOKENS * parts)
        parts *= 2;
    int size = (num_tokens + parts - 1) / parts;
    const void *x = step->norm_weight ? step->normed : step->x;
#pragma omp parallel num_threads(num_threads)
    {
        if (step->norm_weight) {
#pragma omp for
            for (int token = 0; token < num_tokens; token++) {
                int64_t place = (int64_t)token * step->num_inputs;
                const void *row = at(step->x, place, dtype);
                void *normed = at(step->normed, place, dtype);
                norm_row(row, step->norm_weight, step->eps, step->num_inputs, normed, dtype);
            }
        }
#pragma omp for collapse(2)
        for (int part = 0; part < parts; part++)
            for (int panel = 0; panel < num_panels; panel++) {
                int first = part * size, left = num_tokens - first;
                if (left > 0)
                    run_panel(step, x, panel, first, left < size ? left : size, dtype);
            }
    }
}

void linear(const struct linear *step, int num_threads) {
#define RUN(DTYPE) run(step, num_threads, DTYPE)
    BY_DTYPE(step->dtype, RUN)
}
