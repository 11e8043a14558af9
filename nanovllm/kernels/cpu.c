/* Kernels for a CPU, where PyTorch's operations read memory twice or cost more than they compute.

nanovllm/kernels/cpu.py compiles this file on the machine that runs it, and launches what is here.
The vectors are GCC's, which clang has too: a processor with shorter ones takes several of its own.

Elements of any dtype are read to float32, computed with there, and rounded where the PyTorch twins
round. Functions that are handed a dtype to compile for are inlined, once for each.
*/

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif
#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#define INLINE static inline __attribute__((always_inline))
/* Elements from which on a second thread is worth waking. */
#define MANY 32768

/* As cpu.py numbers them. */
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

/* LANES elements from one on. */
INLINE floats load(const void *array, int64_t index, enum dtype dtype) {
    const void *x = at(array, index, dtype);
    if (dtype == FLOAT32) return *(const floats *)x;
    if (dtype == FLOAT16) return __builtin_convertvector(*(const halves *)x, floats);
    if (dtype == BFLOAT16) return (floats)(__builtin_convertvector(*(const shorts *)x, ints) << 16);
    /* Sign, exponent and mantissa of e4m3 at their places in float32, whose bias is 120 more. */
    ints bits = __builtin_convertvector(*(const bytes *)x, ints);
    return (floats)((bits & 0x80) << 24 | (bits & 0x7f) << 20) * 0x1p120f;
}

INLINE shorts to_bfloat16(floats x) {
    ints bits = (ints)x;
    ints nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    ints is_nan = (ints)(x != x);
    return __builtin_convertvector((nearest & ~is_nan) | (0x7fc0 & is_nan), shorts);
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
    if (dtype == BFLOAT16) return (floats)(__builtin_convertvector(to_bfloat16(x), ints) << 16);
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

/* ---- what stands around the products */

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

/* Of each pair (x[i], x[i + size / 2]), by angles whose cosines and sines are `turn`. */
INLINE void rotate_row(void *x, const float *turn, int size, enum dtype dtype) {
    for (int i = 0, half = size / 2; i < half; i += LANES) {
        floats a = load(x, i, dtype), b = load(x, i + half, dtype);
        floats cosine = load(turn, i, FLOAT32), sine = load(turn, i + half, FLOAT32);
        store(x, i, a * cosine - b * sine, dtype);
        store(x, i + half, b * cosine + a * sine, dtype);
    }
}

/* What an FP8 cache's numbers are multiplied by, powers of two: see layers/kv_quantization.py. */
INLINE float factor_of(int exponent) {
    uint32_t bits = exponent == 255 ? 0x7fc00000 : (uint32_t)exponent << 23;
    float factor;
    memcpy(&factor, &bits, sizeof factor);
    return factor;
}

/* The nearest numbers of e4m3, of |x| <= 448. */
INLINE bytes to_e4m3(floats x) {
    ints bits = (ints)x & 0x7fffffff;
    /* From 2^-6 on three bits of the mantissa stay; below, multiples of 2^-9 are counted. */
    ints normal = ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3);
    ints counted = (ints)((floats)bits + 0x1p14f) - 0x46800000;
    ints is_small = (ints)((floats)bits < 0x1p-6f);
    ints code = (counted & is_small) | (normal & ~is_small);
    return __builtin_convertvector(code | ((ints)x >> 24 & 0x80), bytes);
}

/* A head of K or V goes to a row of a cache, unless that is negative. Where the cache is FP8, x
becomes what it can hold of x. */
INLINE void store_head(
    void *x, void *cache, uint8_t *scales, int64_t row, int size, enum dtype dtype) {
    if (!scales) {
        if (row >= 0) memcpy(at(cache, row * size, dtype), x, size * size_of(dtype));
        return;
    }
    uint32_t peak = 0, peaks[LANES];
    for (int i = 0; i < size; i += LANES) {
        ints bits = (ints)load(x, i, dtype) & 0x7fffffff;
        memcpy(peaks, &bits, sizeof peaks);
        for (int j = 0; j < LANES; j++) peak = peaks[j] > peak ? peaks[j] : peak;
    }
    int exponent = (int)((peak + 0x1fffff) >> 23) - 8;
    exponent = peak >= 0x7f800000 ? 255 : exponent < 1 ? 1 : exponent;
    if (row >= 0) scales[row] = exponent;
    float factor = factor_of(exponent), inverse = factor_of(254 - exponent);
    for (int i = 0; i < size; i += LANES) {
        bytes code = to_e4m3(load(x, i, dtype) * inverse);
        if (row >= 0) *(bytes *)at(cache, row * size + i, E4M3) = code;
        store(x, i, load(&code, 0, E4M3) * factor, dtype);
    }
}

/* What qk_norm_rope_store is handed, but for the tokens. */
struct layer {
    const void *q_weight, *k_weight; /* or NULL */
    void *k_cache, *v_cache;
    uint8_t *k_scales, *v_scales; /* NULL, if the cache is not FP8 */
    float eps;
    int num_heads, num_kv_heads, head_dim;
};

/* A token's heads of q, k and v, where they lie; slot: where k and v are stored, -1: nowhere. */
INLINE void qk_norm_rope_store_row(
    void *qkv, const float *turn, int64_t slot, const struct layer *layer, enum dtype dtype) {
    int num_heads = layer->num_heads, num_kv_heads = layer->num_kv_heads;
    int head_dim = layer->head_dim;
    for (int head = 0; head < num_heads + num_kv_heads; head++) {
        void *x = at(qkv, (int64_t)head * head_dim, dtype);
        const void *weight = head < num_heads ? layer->q_weight : layer->k_weight;
        if (weight) norm_row(x, weight, layer->eps, head_dim, x, dtype);
        rotate_row(x, turn, head_dim, dtype);
    }
    for (int head = 0; head < num_kv_heads && layer->k_cache; head++) {
        void *key = at(qkv, (int64_t)(num_heads + head) * head_dim, dtype);
        void *value = at(key, (int64_t)num_kv_heads * head_dim, dtype);
        int64_t row = slot < 0 ? -1 : slot * num_kv_heads + head;
        store_head(key, layer->k_cache, layer->k_scales, row, head_dim, dtype);
        store_head(value, layer->v_cache, layer->v_scales, row, head_dim, dtype);
    }
}

/* call with a dtype that is known when this is compiled */
#define BY_DTYPE(dtype, call)                         \
    switch (dtype) {                                  \
        case FLOAT32: call(FLOAT32); break;           \
        case FLOAT16: call(FLOAT16); break;           \
        case BFLOAT16: call(BFLOAT16); break;         \
        default: break;                               \
    }

void rms_norm(
    const void *x, const void *weight, float eps, void *out, int64_t num_rows, int size,
    enum dtype dtype, int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_rows * size >= MANY)
    for (int64_t row = 0; row < num_rows; row++) {
#define NORM(DTYPE) \
    norm_row(at(x, row * size, DTYPE), weight, eps, size, at(out, row * size, DTYPE), DTYPE)
        BY_DTYPE(dtype, NORM)
    }
}

void qk_norm_rope_store(
    void *qkv, const float *cos_sin, const int64_t *positions, const int32_t *slots,
    int64_t num_tokens, const struct layer *layer, enum dtype dtype, int num_threads) {
    int64_t size = (int64_t)(layer->num_heads + 2 * layer->num_kv_heads) * layer->head_dim;
#pragma omp parallel for num_threads(num_threads) if (num_tokens * size >= MANY)
    for (int64_t token = 0; token < num_tokens; token++) {
        void *row = at(qkv, token * size, dtype);
        const float *turn = cos_sin + positions[token] * layer->head_dim;
#define ROW(DTYPE) qk_norm_rope_store_row(row, turn, slots[token], layer, DTYPE)
        BY_DTYPE(dtype, ROW)
    }
}

/* ---- sampling: see layers/sampler.py */

/* What sample is handed. */
struct sampling {
    const void *logits;
    const float *temperatures, *thresholds; /* thresholds: or NULL */
    const int64_t *seeds, *positions;
    int64_t *out, stride, first_id; /* first_id -1: ids are wanted, else keys */
    int num_rows, vocab_size;
};

/* The finaliser of SplitMix64. */
static uint64_t mix64(uint64_t x) {
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return x ^ x >> 31;
}

/* Gumbel noise of tokens, -log(-log(1 - x)), x a hash of each in (0, 1). */
INLINE floats gumbel(ints tokens, uint64_t key) {
    ints bits = tokens ^ (uint32_t)key;
    bits = ((bits ^ bits >> 16) * 0x7feb352d) ^ (uint32_t)(key >> 32);
    bits = (bits ^ bits >> 15) * 0x846ca68b;
    bits ^= bits >> 16;
    floats x = (__builtin_convertvector(bits, floats) + 0.5f) * 0x1p-32f;
    floats series = x * (1.0f + x * (1 / 2.0f + x * (1 / 3.0f + x * (1 / 4.0f + x * (1 / 5.0f)))));
    floats rest = 1.0f - x;
    rest = where((ints)(rest < 0x1p-33f), (floats){} + 0x1p-33f, rest);
    return -log_of(where((ints)(x < 0x1p-4f), series, -log_of(rest)));
}

struct best {
    float score;
    int id;
};

INLINE int is_better(float score, int id, struct best best) {
    return score > best.score || (score == best.score && id < best.id);
}

/* The best of tokens first .. end - 1 of a row, of at least LANES; of equal ones the first. */
INLINE struct best best_of(
    const struct sampling *what, int row, int first, int end, enum dtype dtype) {
    const void *logits = at(what->logits, row * what->stride, dtype);
    float temperature = what->temperatures[row];
    float factor = temperature < 1 ? temperature : 1, divisor = temperature > 1 ? temperature : 1;
    int64_t first_id = what->first_id < 0 ? 0 : what->first_id;
    uint64_t key = mix64(what->seeds[row] + 0x9e3779b97f4a7c15);
    key = mix64(key ^ (uint64_t)what->positions[row]);
    floats scores = (floats){} - INFINITY;
    ints ids = {}, lanes;
    for (int i = 0; i < LANES; i++) lanes[i] = i;
    for (int start = first; start < end; start += LANES) {
        int place = start + LANES <= end ? start : end - LANES;
        ints tokens = lanes + place;
        floats logit = load(logits, place, dtype);
        floats score = where((ints)(logit == logit), logit, (floats){} + INFINITY);
        if (temperature > 0)
            score = score / divisor + factor * gumbel(tokens + (uint32_t)first_id, key);
        if (what->thresholds) {
            ints is_kept = (ints)(logit >= what->thresholds[row]);
            score = where(is_kept, score, (floats){} - INFINITY);
        }
        ints is_more = (ints)(score > scores) | (start == first ? ~(ints){} : (ints){});
        scores = where(is_more, score, scores);
        ids = (tokens & is_more) | (ids & ~is_more);
    }
    struct best best = {scores[0], ids[0]};
    for (int i = 1; i < LANES; i++)
        if (is_better(scores[i], ids[i], best)) best = (struct best){scores[i], ids[i]};
    return best;
}

/* Of few rows, several threads take parts of one. */
void sample(const struct sampling *what, enum dtype dtype, int num_threads) {
    int num_rows = what->num_rows, vocab_size = what->vocab_size, num_parts = 1;
    while (num_rows * num_parts < 4 * num_threads && vocab_size / num_parts >= MANY) num_parts *= 2;
    int size = (vocab_size / num_parts + LANES) / LANES * LANES;
    struct best found[num_rows * num_parts];
#pragma omp parallel for num_threads(num_threads) schedule(dynamic)
    for (int task = 0; task < num_rows * num_parts; task++) {
        int first = task % num_parts * size, end = first + size < vocab_size ? first + size : vocab_size;
#define BEST(DTYPE) found[task] = best_of(what, task / num_parts, first, end, DTYPE)
        BY_DTYPE(dtype, BEST)
    }
    for (int row = 0; row < num_rows; row++) {
        struct best best = found[row * num_parts];
        for (int part = 1; part < num_parts; part++) {
            struct best other = found[row * num_parts + part];
            if (is_better(other.score, other.id, best)) best = other;
        }
        what->out[row] = best.id;
        if (what->first_id < 0) continue;
        float score = best.score + 0.0f; /* -0 is 0 */
        int32_t bits;
        memcpy(&bits, &score, sizeof bits);
        int64_t order = bits ^ (bits < 0 ? 0x7fffffff : 0);
        what->out[row] = (int64_t)((uint64_t)order << 32) | (0x7fffffff - (best.id + what->first_id));
    }
}

/* ---- attention of one query a sequence */

/* Keys that are read before any of their values. */
#define TILE 32
/* Keys that are multiplied side by side: a sum alone would wait for itself. */
#define ABREAST 4

/* A K/V head's keys and values of a tile: rows, and what they are multiplied by (FP8), or NULL. */
struct tile {
    int num_keys;
    const void *keys[TILE], *values[TILE];
    const float *key_factors, *value_factors;
    int64_t ahead; /* bytes to the tile after this one, if its blocks follow; else 0 */
};

/* What query heads that share a K/V head have found so far, weights relative to the peak. */
struct found {
    float *query, *sums, *peak, *total;
};

/* Their products with a tile's keys. */
INLINE void multiply_keys(
    const struct tile *tile, const float *query, float products[][TILE], int head_dim,
    enum dtype dtype, const int NUM) {
    for (int i = 0; i < tile->num_keys; i += ABREAST) {
        floats sums[ABREAST][NUM];
        for (int j = 0; j < ABREAST; j++)
            for (int q = 0; q < NUM; q++) sums[j][q] = (floats){};
        for (int d = 0; d < head_dim; d += LANES)
            for (int j = 0; j < ABREAST; j++) {
                const void *key = at(tile->keys[i + j], d, dtype);
                const void *value = at(tile->values[i + j], d, dtype);
                floats x = load(key, 0, dtype);
                for (int q = 0; q < NUM; q++)
                    sums[j][q] += x * load(query, q * head_dim + d, FLOAT32);
                if (d * size_of(dtype) % 64) continue;
                /* A processor foresees no more than the row that it reads. Next comes the next
                head, and then the next tile. */
                __builtin_prefetch(at(key, head_dim, dtype));
                __builtin_prefetch(at(value, head_dim, dtype));
                __builtin_prefetch((const char *)key + tile->ahead);
                __builtin_prefetch((const char *)value + tile->ahead);
            }
        for (int j = 0; j < ABREAST; j++)
            for (int q = 0; q < NUM; q++) products[q][i + j] = sum(sums[j][q]);
    }
}

/* A tile's values times their weights, columns first .. first + WIDTH * LANES - 1, are added. */
INLINE void add_values(
    const struct tile *tile, float weights[][TILE], float *all_sums, int head_dim, int first,
    enum dtype dtype, const int NUM, const int WIDTH) {
    floats sums[WIDTH][NUM];
    for (int j = 0; j < WIDTH; j++)
        for (int q = 0; q < NUM; q++)
            sums[j][q] = load(all_sums, q * head_dim + first + j * LANES, FLOAT32);
    for (int i = 0; i < tile->num_keys; i++)
        for (int j = 0; j < WIDTH; j++) {
            floats x = load(tile->values[i], first + j * LANES, dtype);
            for (int q = 0; q < NUM; q++) sums[j][q] += x * weights[q][i];
        }
    for (int j = 0; j < WIDTH; j++)
        for (int q = 0; q < NUM; q++)
            store(all_sums, q * head_dim + first + j * LANES, sums[j][q], FLOAT32);
}

/* The first n of `size` scores become weights relative to the peak so far, the others 0. Returns what
sums of weights relative to the peak before are multiplied by. */
INLINE float weigh(float *scores, int n, int size, float *peak, float *total) {
    float before = *peak;
    for (int i = 0; i < n; i++) *peak = scores[i] > *peak ? scores[i] : *peak;
    for (int i = n; i < size; i++) scores[i] = -INFINITY;
    floats sums = {};
    for (int i = 0; i < size; i += LANES) {
        floats weight = exp_of(load(scores, i, FLOAT32) - *peak);
        store(scores, i, weight, FLOAT32);
        sums += weight;
    }
    float rescale = exp_of((floats){} + (before - *peak))[0];
    *total = *total * rescale + sum(sums);
    return rescale;
}

/* Attend to one more tile. */
INLINE void attend_tile(
    const struct tile *tile, struct found found, int head_dim, enum dtype dtype, const int NUM) {
    float weights[NUM][TILE];
    multiply_keys(tile, found.query, weights, head_dim, dtype, NUM);
    int n = tile->num_keys;
    for (int q = 0; q < NUM; q++) {
        for (int i = 0; i < n && tile->key_factors; i++) weights[q][i] *= tile->key_factors[i];
        float rescale = weigh(weights[q], n, TILE, found.peak + q, found.total + q);
        for (int d = q * head_dim; d < (q + 1) * head_dim && rescale != 1; d += LANES)
            store(found.sums, d, load(found.sums, d, FLOAT32) * rescale, FLOAT32);
        for (int i = 0; i < n && tile->value_factors; i++) weights[q][i] *= tile->value_factors[i];
    }
    int first = 0;
    for (; first + 4 * LANES <= head_dim; first += 4 * LANES)
        add_values(tile, weights, found.sums, head_dim, first, dtype, NUM, 4);
    for (; first < head_dim; first += LANES)
        add_values(tile, weights, found.sums, head_dim, first, dtype, NUM, 1);
}

/* What a call of paged_decode is about. */
struct decode {
    const void *query, *k_cache, *v_cache;
    const uint8_t *k_scales, *v_scales;
    const int32_t *block_tables, *lens;
    void *out;
    float scale;
    int64_t query_stride, table_stride; /* elements from one sequence's to the next one's */
    int num_seqs, num_kv_heads, num_sharing, head_dim, block_size;
    enum dtype dtype, cache_dtype;
};

/* One sequence's attention, of some K/V heads. */
INLINE void attend(
    const struct decode *step, int seq, int first_head, int num_heads, enum dtype dtype) {
    int head_dim = step->head_dim, num_sharing = step->num_sharing, len = step->lens[seq];
    int num_queries = num_heads * num_sharing;
    int64_t first_query = (int64_t)first_head * num_sharing * head_dim;
    int64_t stride = (int64_t)step->num_kv_heads * head_dim;
    const int32_t *table = step->block_tables + seq * step->table_stride;
    float query[num_queries * head_dim], sums[num_queries * head_dim];
    float peak[num_queries], total[num_queries];
    for (int q = 0; q < num_queries; q++) peak[q] = -INFINITY, total[q] = 0;
    memset(sums, 0, sizeof sums);
    for (int d = 0; d < num_queries * head_dim; d += LANES) {
        int64_t from = seq * step->query_stride + first_query + d;
        store(query, d, load(step->query, from, step->dtype) * step->scale, FLOAT32);
    }
    for (int start = 0; start < len; start += TILE) {
        struct tile tile = {.num_keys = len - start < TILE ? len - start : TILE};
        int64_t slots[TILE];
        float key_factors[TILE], value_factors[TILE];
        for (int i = 0; i < tile.num_keys; i++) {
            int position = start + i;
            int64_t block = table[position / step->block_size];
            slots[i] = block * step->block_size + position % step->block_size;
        }
        for (int i = tile.num_keys; i % ABREAST; i++) slots[i] = slots[0];
        if (start + TILE < len) tile.ahead = TILE * stride * size_of(dtype);
        for (int head = 0; head < num_heads; head++) {
            for (int i = 0; i < TILE && (i < tile.num_keys || i % ABREAST); i++) {
                int64_t row = slots[i] * stride + (int64_t)(first_head + head) * head_dim;
                tile.keys[i] = at(step->k_cache, row, dtype);
                tile.values[i] = at(step->v_cache, row, dtype);
                if (dtype != E4M3) continue;
                int64_t scale = slots[i] * step->num_kv_heads + first_head + head;
                key_factors[i] = factor_of(step->k_scales[scale]);
                value_factors[i] = factor_of(step->v_scales[scale]);
                tile.key_factors = key_factors;
                tile.value_factors = value_factors;
            }
            int q = head * num_sharing, end = q + num_sharing;
#define TAKE(NUM)                                                                           \
    for (; q + NUM <= end; q += NUM) {                                                      \
        struct found found = {query + q * head_dim, sums + q * head_dim, peak + q, total + q}; \
        attend_tile(&tile, found, head_dim, dtype, NUM);                                    \
    }
            TAKE(4)
            TAKE(2)
            TAKE(1)
        }
    }
    for (int d = 0; d < num_queries * head_dim; d += LANES) {
        float share = total[d / head_dim] == 0 ? 0 : 1 / total[d / head_dim];
        int64_t to = seq * stride * num_sharing + first_query + d;
        store(step->out, to, load(sums, d, FLOAT32) * share, step->dtype);
    }
}

/* Each thread takes a sequence, or of few sequences some of the heads of one. */
void paged_decode(const struct decode *step, int num_threads) {
    int num_parts = 1, num_kv_heads = step->num_kv_heads;
    while (step->num_seqs * num_parts < 4 * num_threads && num_kv_heads % (2 * num_parts) == 0)
        num_parts *= 2;
    int num_heads = num_kv_heads / num_parts;
#pragma omp parallel for num_threads(num_threads) schedule(dynamic)
    for (int task = 0; task < step->num_seqs * num_parts; task++) {
        int seq = task / num_parts, first_head = task % num_parts * num_heads;
        switch (step->cache_dtype) {
            case FLOAT32: attend(step, seq, first_head, num_heads, FLOAT32); break;
            case FLOAT16: attend(step, seq, first_head, num_heads, FLOAT16); break;
            case BFLOAT16: attend(step, seq, first_head, num_heads, BFLOAT16); break;
            case E4M3: attend(step, seq, first_head, num_heads, E4M3); break;
        }
    }
}

/* ---- attention of a prompt */

/* Scores and sums are products of panels: ROWS rows times WIDTH columns at once. What they sum up
over comes in units: float32 numbers, or where a processor multiplies them pairs of bfloat16. */
#define ROWS 6
#define WIDTH (4 * LANES)
/* Rows that a thread takes: each panel is read once for all of them. */
#define TASK_ROWS (8 * ROWS)

/* What paged_prefill is handed, of one sequence. */
struct prefill {
    const void *query, *keys, *values;
    const uint8_t *k_scales, *v_scales; /* NULL, if the cache is not FP8 */
    const int32_t *block_table;         /* of a cache; NULL: the sequence's keys lie in a row */
    void *out;
    uint32_t *key_panels, *value_panels; /* scratch */
    float scale;
    int64_t query_stride, key_stride; /* elements from one token's to the next one's */
    int num_queries, num_keys, num_kv_heads, num_sharing, head_dim, block_size;
    enum dtype dtype, cache_dtype;
};

#ifdef __AVX512BF16__
#define HAS_PAIRS 1
INLINE floats add_product(floats sum, floats column, uint32_t unit, int pairs) {
    if (!pairs) return sum + column * (floats)((ints){} + unit);
    __m512bh two = (__m512bh)_mm512_set1_epi32(unit);
    return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)column, two);
}
#else
#define HAS_PAIRS 0
INLINE floats add_product(floats sum, floats column, uint32_t unit, int pairs) {
    (void)pairs;
    return sum + column * (floats)((ints){} + unit);
}
#endif

/* Of rows x [num_units, ROWS] and columns panel [num_units, WIDTH]. */
INLINE void multiply_rows(
    const uint32_t *x, const uint32_t *panel, int num_units, float (*out)[WIDTH], int pairs) {
    floats sums[ROWS][4];
    for (int row = 0; row < ROWS; row++)
        for (int v = 0; v < 4; v++) sums[row][v] = (floats){};
    for (int i = 0; i < num_units; i++) {
        floats columns[4];
        for (int v = 0; v < 4; v++) columns[v] = load(panel, i * WIDTH + v * LANES, FLOAT32);
        for (int row = 0; row < ROWS; row++)
            for (int v = 0; v < 4; v++)
                sums[row][v] = add_product(sums[row][v], columns[v], x[i * ROWS + row], pairs);
    }
    for (int row = 0; row < ROWS; row++)
        for (int v = 0; v < 4; v++) store(out[row], v * LANES, sums[row][v], FLOAT32);
}

/* `size` numbers as units, each `stride` after the one before. */
INLINE void spread_units(
    const void *x, float factor, int size, uint32_t *out, int stride, enum dtype dtype, int pairs) {
    uint32_t units[size];
    for (int i = 0; i < size; i += LANES)
        store(units, i, load(x, i, dtype) * factor, pairs ? BFLOAT16 : FLOAT32);
    for (int i = 0; i < size / (1 + pairs); i++) out[i * stride] = units[i];
}

INLINE int64_t key_panel_size(int head_dim, int pairs) { return WIDTH * head_dim / (1 + pairs); }

INLINE int64_t value_panel_size(int head_dim, int pairs) {
    return (head_dim + WIDTH - 1) / WIDTH * WIDTH * WIDTH / (1 + pairs);
}

/* Of WIDTH keys: [units of head_dim, WIDTH keys]. Of their values, for each WIDTH columns: [units of
WIDTH keys, WIDTH columns]. What no key has is 0. */
INLINE void make_panels(
    const struct prefill *step, int head, int block, uint32_t *key_panel, uint32_t *value_panel,
    int pairs) {
    enum dtype dtype = step->cache_dtype;
    int head_dim = step->head_dim;
    memset(key_panel, 0, 4 * key_panel_size(head_dim, pairs));
    memset(value_panel, 0, 4 * value_panel_size(head_dim, pairs));
    for (int i = 0; i < WIDTH && block * WIDTH + i < step->num_keys; i++) {
        int64_t slot = block * WIDTH + i;
        if (step->block_table) {
            int64_t own_block = step->block_table[slot / step->block_size];
            slot = own_block * step->block_size + slot % step->block_size;
        }
        int64_t scale = slot * step->num_kv_heads + head;
        float key_factor = dtype == E4M3 ? factor_of(step->k_scales[scale]) : 1;
        float value_factor = dtype == E4M3 ? factor_of(step->v_scales[scale]) : 1;
        int64_t from = slot * step->key_stride + (int64_t)head * head_dim;
        const void *key = at(step->keys, from, dtype), *value = at(step->values, from, dtype);
        spread_units(key, key_factor, head_dim, key_panel + i, WIDTH, dtype, pairs);
        for (int d = 0; d < head_dim; d += LANES) {
            floats numbers = load(value, d, dtype) * value_factor;
            ints bits = (ints)numbers;
            if (pairs) bits = __builtin_convertvector(to_bfloat16(numbers), ints) << i % 2 * 16;
            int unit = (d / WIDTH * WIDTH + i) / (1 + pairs);
            *(ints *)(value_panel + unit * WIDTH + d % WIDTH) |= bits;
        }
    }
}

/* Attention of rows of one K/V head; the heads that share it are rows too, query after query. */
INLINE void attend_rows(
    const struct prefill *step, int head, int first_row, const uint32_t *key_panels,
    const uint32_t *value_panels, int pairs) {
    enum dtype dtype = step->dtype;
    int head_dim = step->head_dim, num_sharing = step->num_sharing;
    int num_rows = step->num_queries * num_sharing - first_row;
    if (num_rows > TASK_ROWS) num_rows = TASK_ROWS;
    int num_units = head_dim / (1 + pairs), width = (head_dim + WIDTH - 1) / WIDTH * WIDTH;
    uint32_t query[TASK_ROWS / ROWS][num_units * ROWS], shares[WIDTH * ROWS];
    float sums[TASK_ROWS][width], peak[TASK_ROWS], total[TASK_ROWS];
    int num_visible[TASK_ROWS]; /* keys */
    memset(query, 0, sizeof query);
    memset(sums, 0, sizeof sums);
    for (int row = 0; row < TASK_ROWS; row++) {
        int token = (first_row + row) / num_sharing;
        peak[row] = -INFINITY, total[row] = 0, num_visible[row] = 0;
        if (row >= num_rows) continue;
        num_visible[row] = step->num_keys - step->num_queries + token + 1;
        int64_t from = (int64_t)head * num_sharing + (first_row + row) % num_sharing;
        const void *x = at(step->query, token * step->query_stride + from * head_dim, dtype);
        spread_units(x, 1, head_dim, query[row / ROWS] + row % ROWS, ROWS, dtype, pairs);
    }
    for (int first = 0; first < num_visible[num_rows - 1]; first += WIDTH) {
        const uint32_t *key_panel = key_panels + first / WIDTH * key_panel_size(head_dim, pairs);
        const uint32_t *value_panel =
            value_panels + first / WIDTH * value_panel_size(head_dim, pairs);
        for (int start = 0; start < num_rows; start += ROWS) {
            int last = start + ROWS < num_rows ? start + ROWS - 1 : num_rows - 1;
            if (num_visible[last] <= first) continue;
            float scores[ROWS][WIDTH], rescale[ROWS];
            multiply_rows(query[start / ROWS], key_panel, num_units, scores, pairs);
            for (int i = 0; i < ROWS; i++) {
                int row = start + i, n = num_visible[row] - first;
                for (int j = 0; j < WIDTH; j += LANES)
                    store(scores[i], j, load(scores[i], j, FLOAT32) * step->scale, FLOAT32);
                rescale[i] = 1;
                if (n > 0)
                    rescale[i] =
                        weigh(scores[i], n < WIDTH ? n : WIDTH, WIDTH, peak + row, total + row);
                else memset(scores[i], 0, sizeof scores[i]);
                spread_units(scores[i], 1, WIDTH, shares + i, ROWS, FLOAT32, pairs);
            }
            for (int d = 0; d < width; d += WIDTH) {
                float products[ROWS][WIDTH];
                const uint32_t *columns = value_panel + d * WIDTH / (1 + pairs);
                multiply_rows(shares, columns, WIDTH / (1 + pairs), products, pairs);
                for (int i = 0; i < ROWS; i++)
                    for (int j = 0; j < WIDTH; j += LANES) {
                        float *to = sums[start + i] + d;
                        floats more = load(products[i], j, FLOAT32);
                        store(to, j, load(to, j, FLOAT32) * rescale[i] + more, FLOAT32);
                    }
            }
        }
    }
    for (int row = 0; row < num_rows; row++) {
        int64_t token = (first_row + row) / num_sharing, own = (first_row + row) % num_sharing;
        int64_t out_row = (token * step->num_kv_heads + head) * num_sharing + own;
        for (int d = 0; d < head_dim; d += LANES) {
            floats found = load(sums[row], d, FLOAT32) * (1 / total[row]);
            store(step->out, out_row * head_dim + d, found, dtype);
        }
    }
}

void paged_prefill(const struct prefill *step, int num_threads) {
    int pairs = HAS_PAIRS && step->dtype == BFLOAT16, num_kv_heads = step->num_kv_heads;
    int num_blocks = (step->num_keys + WIDTH - 1) / WIDTH;
    int64_t key_size = key_panel_size(step->head_dim, pairs);
    int64_t value_size = value_panel_size(step->head_dim, pairs);
#pragma omp parallel for num_threads(num_threads)
    for (int task = 0; task < num_kv_heads * num_blocks; task++) {
        int head = task / num_blocks, block = task % num_blocks;
        uint32_t *keys = step->key_panels + task * key_size;
        uint32_t *values = step->value_panels + task * value_size;
        if (pairs) make_panels(step, head, block, keys, values, 1);
        else make_panels(step, head, block, keys, values, 0);
    }
    int num_rows = step->num_queries * step->num_sharing;
    int num_parts = (num_rows + TASK_ROWS - 1) / TASK_ROWS;
    /* The last rows have the most keys: they come first, so that all threads end together. */
#pragma omp parallel for num_threads(num_threads) schedule(dynamic)
    for (int task = num_kv_heads * num_parts - 1; task >= 0; task--) {
        int head = task % num_kv_heads, first_row = task / num_kv_heads * TASK_ROWS;
        const uint32_t *keys = step->key_panels + (int64_t)head * num_blocks * key_size;
        const uint32_t *values = step->value_panels + (int64_t)head * num_blocks * value_size;
        if (pairs) attend_rows(step, head, first_row, keys, values, 1);
        else attend_rows(step, head, first_row, keys, values, 0);
    }
}

/* ---- int4 weights: see layers/int4.py. Only where a processor multiplies pairs of bfloat16. */

#ifdef __AVX512BF16__
/* A matrix in blocks of 64 rows; within one, input after input, 32 bytes: byte j holds the codes of
rows j, in its lower bits, and j + 32. scales: bfloat16, scale and zero for each group of inputs
and row. */
struct int4 {
    const uint8_t *values;
    const uint16_t *scales, *bias; /* bias: or NULL */
    int64_t group_stride;          /* of scales, elements */
    int num_rows, num_out, num_inputs, group_size; /* num_rows: num_out and padding */
};

/* The scales of LANES rows, or with `zeros` what is added. */
INLINE floats scales_of(const struct int4 *weight, int group, int row, int zeros) {
    ints pairs = *(const ints *)(weight->scales + group * weight->group_stride + 2 * row);
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
    __m512 products[NUM][4];
    for (int token = 0; token < NUM; token++)
        for (int v = 0; v < 4; v++) products[token][v] = _mm512_setzero_ps();
    for (int i = 0; i < panel->num_pairs; i++) {
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

/* Tokens to take side by side, of so many that are left: up to 6, whose sums fill the registers, and
of about as many each time, since few would wait for their own sums. */
INLINE int num_abreast(int left) {
    int num_times = (left + 5) / 6;
    return (left + num_times - 1) / num_times;
}

/* For tokens taken abreast: x [NUM, num_pairs] as [num_pairs, NUM], and the totals of its groups. */
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
INLINE void finish_row(
    const struct int4 *weight, int block, const float *sums, const uint16_t *residual,
    uint16_t *out) {
    uint16_t bias[64], added[64], rows[64];
    int first = block * 64, size = weight->num_out - first < 64 ? weight->num_out - first : 64;
    if (weight->bias) memcpy(bias, weight->bias + first, 2 * size);
    if (residual) memcpy(added, residual + first, 2 * size);
    for (int i = 0; i < 64; i += LANES) {
        floats row = load(sums, i, FLOAT32);
        if (weight->bias) row += load(bias, i, BFLOAT16);
        if (residual) row += load(added, i, BFLOAT16);
        store(rows, i, row, BFLOAT16);
    }
    memcpy(out + first, rows, 2 * size);
}

/* residual (or NULL) + x [num_tokens, num_inputs] times the matrix, to out [num_tokens, num_out].
scratch: x in other order, and the totals of its groups, float32 [num_tokens, num_groups]. */
void int4_linear(
    const struct int4 *weight, const uint32_t *x, const uint16_t *residual, uint16_t *out,
    uint32_t *scratch, int num_tokens, int num_threads) {
    int size = weight->group_size, num_inputs = weight->num_inputs, num_out = weight->num_out;
    int num_pairs = num_inputs / 2, num_groups = num_inputs / size;
    uint32_t *prepared = scratch;
    float *totals = (float *)(scratch + (int64_t)num_tokens * num_pairs);
    int starts[num_tokens], num_starts = 0;
    for (int token = 0; token < num_tokens; token += num_abreast(num_tokens - token))
        starts[num_starts++] = token;
#pragma omp parallel for num_threads(num_threads) if ((int64_t)num_tokens * num_inputs >= MANY)
    for (int i = 0; i < num_starts; i++) {
        int num = num_abreast(num_tokens - starts[i]);
        int64_t place = (int64_t)starts[i] * num_pairs;
        float *own_totals = totals + (int64_t)starts[i] * num_groups;
        prepare_tokens(x + place, num, num_pairs, size, prepared + place, own_totals);
    }
#pragma omp parallel for num_threads(num_threads)
    for (int block = 0; block < weight->num_rows / 64; block++) {
        float sums[num_tokens][64];
        struct panel panel = {.num_pairs = size / 2};
        __m512i numbers = numbers_of_codes();
        memset(sums, 0, sizeof sums);
        for (int group = 0; group < num_groups; group++) {
            int64_t input = (int64_t)group * size;
            const uint8_t *codes = weight->values + ((int64_t)block * num_inputs + input) * 32;
            panel.codes = codes;
            for (int v = 0; v < 4; v++) {
                panel.scales[v] = scales_of(weight, group, block * 64 + 16 * v, 0);
                panel.zeros[v] = scales_of(weight, group, block * 64 + 16 * v, 1);
            }
            for (int i = 0; i < num_starts; i++) {
                int token = starts[i], num = num_abreast(num_tokens - token);
                const uint32_t *inputs = prepared + (int64_t)token * num_pairs + num * input / 2;
                const float *own_totals = totals + (int64_t)token * num_groups + group;
#define MULTIPLY(TURN, NUM)                                                                     \
    case NUM:                                                                                   \
        multiply_panel(                                                                         \
            &panel, numbers, inputs, own_totals, num_groups, sums + token, TURN, NUM);          \
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
        for (int token = 0; token < num_tokens; token++) {
            int64_t row = (int64_t)token * num_out;
            const uint16_t *added = residual ? residual + row : NULL;
            finish_row(weight, block, sums[token], added, out + row);
        }
    }
}
#endif
