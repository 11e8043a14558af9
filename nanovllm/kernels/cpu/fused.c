/* What stands around the products: the norm; QK-norm, rotary embedding and store. */

#include "norm.h"

/* Of each pair (x[i], x[i + size / 2]), by angles whose cosines and sines are `turn`. */
INLINE void rotate_row(void *x, const float *turn, int size, enum dtype dtype) {
    for (int i = 0, half = size / 2; i < half; i += LANES) {
        floats a = load(x, i, dtype), b = load(x, i + half, dtype);
        floats cosine = load(turn, i, FLOAT32), sine = load(turn, i + half, FLOAT32);
        store(x, i, a * cosine - b * sine, dtype);
        store(x, i + half, b * cosine + a * sine, dtype);
    }
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

struct qk_norm_rope_store {
    void *qkv;
    const void *q_weight, *k_weight; /* or NULL */
    const float *cos_sin;
    const int64_t *positions;
    void *k_cache, *v_cache;      /* or NULL */
    const int32_t *slots;         /* -1: nowhere */
    uint8_t *k_scales, *v_scales; /* NULL, if the cache is not FP8 */
    int64_t num_tokens;
    float eps;
    int num_heads, num_kv_heads, head_dim;
    enum dtype dtype;
};

/* A token's heads of q, k and v, where they lie. */
INLINE void qk_norm_rope_store_row(
    const struct qk_norm_rope_store *step, int64_t token, enum dtype dtype) {
    int num_heads = step->num_heads, num_kv_heads = step->num_kv_heads, head_dim = step->head_dim;
    void *qkv = at(step->qkv, token * (num_heads + 2 * num_kv_heads) * head_dim, dtype);
    const float *turn = step->cos_sin + step->positions[token] * head_dim;
    for (int head = 0; head < num_heads + num_kv_heads; head++) {
        void *x = at(qkv, (int64_t)head * head_dim, dtype);
        const void *weight = head < num_heads ? step->q_weight : step->k_weight;
        if (weight) norm_row(x, weight, step->eps, head_dim, x, dtype);
        rotate_row(x, turn, head_dim, dtype);
    }
    for (int head = 0; head < num_kv_heads && step->k_cache; head++) {
        void *key = at(qkv, (int64_t)(num_heads + head) * head_dim, dtype);
        void *value = at(key, (int64_t)num_kv_heads * head_dim, dtype);
        int64_t slot = step->slots[token], row = slot < 0 ? -1 : slot * num_kv_heads + head;
        store_head(key, step->k_cache, step->k_scales, row, head_dim, dtype);
        store_head(value, step->v_cache, step->v_scales, row, head_dim, dtype);
    }
}

void qk_norm_rope_store(const struct qk_norm_rope_store *step, int num_threads) {
    int num_heads = step->num_heads + 2 * step->num_kv_heads;
#pragma omp parallel for num_threads(num_threads) \
    if (step->num_tokens * num_heads * step->head_dim >= MANY)
    for (int64_t token = 0; token < step->num_tokens; token++) {
#define STORE(DTYPE) qk_norm_rope_store_row(step, token, DTYPE)
        BY_DTYPE(step->dtype, STORE)
    }
}

struct rms_norm {
    const void *x, *weight;
    void *out;
    int64_t num_rows;
    float eps;
    int size;
    enum dtype dtype;
};

void rms_norm(const struct rms_norm *step, int num_threads) {
    int size = step->size;
#pragma omp parallel for num_threads(num_threads) if (step->num_rows * size >= MANY)
    for (int64_t row = 0; row < step->num_rows; row++) {
        const void *x = at(step->x, row * size, step->dtype);
        void *out = at(step->out, row * size, step->dtype);
#define NORM(DTYPE) norm_row(x, step->weight, step->eps, size, out, DTYPE)
        BY_DTYPE(step->dtype, NORM)
    }
}
