/* Products of int4 weights (layers/int4.py), where a processor multiplies pairs of bfloat16. */

#include "numbers.h"
#include "products.h"

#if HAS_PAIRS

/* residual + (x times a matrix + bias).

The matrix is in blocks of 64 rows; within one, input after input, 32 bytes: byte j holds the codes
of rows j, in its lower bits, and j + 32. All numbers are bfloat16; two inputs are read as one. */
struct int4_linear {
    const uint32_t *x; /* [num_tokens, num_inputs] */
    const uint8_t *values;
    const uint16_t *scales; /* scale and zero for each group of inputs, and row */
    const uint16_t *bias, *residual; /* or NULL */
    uint16_t *out; /* [num_tokens, num_out] */
    uint32_t *scratch; /* x in other order; then float32 [num_tokens, num_groups] */
    int64_t group_stride; /* of scales, elements */
    int num_tokens, num_rows, num_out, num_inputs, group_size; /* num_rows: num_out, and padding */
};

/* The scales of LANES rows, or with `zeros` what is added. */
INLINE floats scales_of(const struct int4_linear *step, int group, int row, int zeros) {
    ints pairs = *(const ints *)(step->scales + group * step->group_stride + 2 * row);
    return (floats)(zeros ? (ints)(pairs & 0xffff0000) : (ints)(pairs << 16));
}

/* A block's codes - 8 for two inputs, in bfloat16: 4 vectors of 16 rows. */
struct pair {
    __m512i rows[4];
};

INLINE struct pair pair_of(const uint8_t *codes, __m512i numbers) {
    struct pair pair;
    for (int half = 0; half < 2; half++) {
        const __m128i *from = (const __m128i *)(codes + 16 * half);
        __m512i first = _mm512_cvtepu8_epi32(_mm_loadu_si128(from));
        __m512i second = _mm512_cvtepu8_epi32(_mm_loadu_si128(from + 2));
        __m512i both = _mm512_or_si512(first, _mm512_slli_epi32(second, 16));
        pair.rows[half] = _mm512_permutexvar_epi16(both, numbers);
        pair.rows[half + 2] = _mm512_permutexvar_epi16(_mm512_srli_epi32(both, 4), numbers);
    }
    return pair;
}

/* What pair_of looks codes up in: codes - 8, whatever the fifth bit, which is another code's. */
INLINE __m512i numbers_of_codes(void) {
    uint16_t numbers[32];
    for (int i = 0; i < 32; i++) {
        float number = i % 16 - 8;
        uint32_t bits;
        memcpy(&bits, &number, sizeof bits);
        numbers[i] = bits >> 16;
    }
    return _mm512_loadu_si512(numbers);
}

/* A group of a block: its codes, and the pairs made of them. */
struct panel {
    const uint8_t *codes;
    struct pair pairs[64];
    int num_pairs;
    floats scales[4], zeros[4];
};

/* Who multiplies by a panel: the only one, or the first of several, or one of the others. */
enum turn { ONLY, FIRST, LATER };

/* Products of NUM tokens' inputs with a panel are added to sums [NUM, 64].
x [pairs of inputs, NUM]; totals: the first token's, of the group. */
INLINE void multiply_panel(
    struct panel *panel, __m512i numbers, const uint32_t *x, const float *totals,
    int64_t totals_stride, float (*sums)[64], enum turn turn, const int NUM) {
    __m512 products[ABREAST][4];
    for (int token = 0; token < NUM; token++)
        for (int v = 0; v < 4; v++) products[token][v] = _mm512_setzero_ps();
    for (int i = 0; i < panel->num_pairs; i++) {
        if (turn == FIRST) __builtin_prefetch(panel->codes + 64 * i + AHEAD, 0, 2);
        struct pair pair =
            turn == LATER ? panel->pairs[i] : pair_of(panel->codes + 64 * i, numbers);
        if (turn == FIRST) panel->pairs[i] = pair;
        for (int token = 0; token < NUM; token++) {
            __m512bh inputs = (__m512bh)_mm512_set1_epi32(x[i * NUM + token]);
            for (int v = 0; v < 4; v++)
                products[token][v] =
                    _mm512_dpbf16_ps(products[token][v], (__m512bh)pair.rows[v], inputs);
        }
    }
    for (int token = 0; token < NUM; token++)
        for (int v = 0; v < 4; v++) {
            floats sum = load(sums[token], 16 * v, FLOAT32);
            sum += (floats)products[token][v] * panel->scales[v];
            sum += totals[token * totals_stride] * panel->zeros[v];
            store(sums[token], 16 * v, sum, FLOAT32);
        }
}

/* For tokens taken abreast: x [num, num_pairs] as [num_pairs, num], and totals of its groups. */
static void prepare_tokens(
    const uint32_t *x, int num, int num_pairs, int group_size, uint32_t *out, float *totals) {
    for (int i = 0; i < num_pairs; i++)
        for (int token = 0; token < num; token++)
            out[i * num + token] = x[(int64_t)token * num_pairs + i];
    for (int group = 0; group < num * (2 * num_pairs / group_size); group++) {
        floats total = {};
        for (int i = 0; i < group_size; i += LANES)
            total += load(x, (int64_t)group * group_size + i, BFLOAT16);
        totals[group] = sum(total);
    }
}

/* A block's sums of a token, with what is added to them, go to its row of the output. */
INLINE void finish_row(const struct int4_linear *step, int block, int token, const float *sums) {
    uint16_t bias[64], residual[64], out[64];
    int first = block * 64, size = step->num_out - first < 64 ? step->num_out - first : 64;
    int64_t place = (int64_t)token * step->num_out + first;
    if (step->bias) memcpy(bias, step->bias + first, 2 * size);
    if (step->residual) memcpy(residual, step->residual + place, 2 * size);
    for (int i = 0; i < 64; i += LANES) {
        floats row = load(sums, i, FLOAT32);
        if (step->bias) row += load(bias, i, BFLOAT16);
        if (step->residual) row += load(residual, i, BFLOAT16);
        store(out, i, row, BFLOAT16);
    }
    memcpy(step->out + place, out, 2 * size);
}

void int4_linear(const struct int4_linear *step, int num_threads) {
    int size = step->group_size, num_inputs = step->num_inputs, num_tokens = step->num_tokens;
    int num_pairs = num_inputs / 2, num_groups = num_inputs / size;
    uint32_t *prepared = step->scratch;
    float *totals = (float *)(prepared + (int64_t)num_tokens * num_pairs);
    int starts[num_tokens], num_starts = 0;
    for (int token = 0; token < num_tokens; token += num_abreast(num_tokens - token))
        starts[num_starts++] = token;
#pragma omp parallel for num_threads(num_threads) if ((int64_t)num_tokens * num_inputs >= MANY)
    for (int i = 0; i < num_starts; i++) {
        int num = num_abreast(num_tokens - starts[i]);
        int64_t place = (int64_t)starts[i] * num_pairs;
        float *own_totals = totals + (int64_t)starts[i] * num_groups;
        prepare_tokens(step->x + place, num, num_pairs, size, prepared + place, own_totals);
    }
#pragma omp parallel for num_threads(num_threads)
    for (int block = 0; block < step->num_rows / 64; block++) {
        float sums[num_tokens][64];
        struct panel panel = {.num_pairs = size / 2};
        __m512i numbers = numbers_of_codes();
        memset(sums, 0, sizeof sums);
        for (int group = 0; group < num_groups; group++) {
            int64_t input = (int64_t)group * size;
            panel.codes = step->values + ((int64_t)block * num_inputs + input) * 32;
            for (int v = 0; v < 4; v++) {
                panel.scales[v] = scales_of(step, group, block * 64 + 16 * v, 0);
                panel.zeros[v] = scales_of(step, group, block * 64 + 16 * v, 1);
            }
            for (int i = 0; i < num_starts; i++) {
                int token = starts[i], num = num_abreast(num_tokens - token);
                const uint32_t *inputs = prepared + (int64_t)token * num_pairs + num * input / 2;
                const float *own_totals = totals + (int64_t)token * num_groups + group;
#define MULTIPLY(TURN, NUM)                                                          \
    case NUM:                                                                        \
        multiply_panel(                                                              \
            &panel, numbers, inputs, own_totals, num_groups, sums + token, TURN, NUM); \
        break;
#define MULTIPLY_ANY(TURN)                                                                      \
    switch (num) {                                                                              \
        MULTIPLY(TURN, 1) MULTIPLY(TURN, 2) MULTIPLY(TURN, 3)                                   \
        MULTIPLY(TURN, 4) MULTIPLY(TURN, 5) MULTIPLY(TURN, 6)                                   \
    }
                if (num_starts == 1) MULTIPLY_ANY(ONLY)
                else if (i == 0) MULTIPLY_ANY(FIRST)
                else MULTIPLY_ANY(LATER)
            }
        }
        for (int token = 0; token < num_tokens; token++)
            finish_row(step, block, token, sums[token]);
    }
}

#endif
