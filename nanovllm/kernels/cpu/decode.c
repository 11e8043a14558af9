/* Attention of one query a sequence, which reads K and V where they lie. */

#include "attention.h"

/* Keys that are read before any of their values. */
#define TILE 16
/* Keys that are multiplied side by side: a sum alone would wait for itself. */
#define ABREAST 4
/* Query heads at most that share a pass. */
#define MOST 4

/* A K/V head's keys and values of a tile: rows, and what they are multiplied by (FP8), or NULL. */
struct tile {
    int num_keys;
    const void *keys[TILE], *values[TILE];
    const float *key_factors, *value_factors;
    int64_t ahead; /* bytes to the tile after this one, if its blocks follow; else 0 */
};

/* A processor foresees no more than the row that it reads. Next come the next head's row, and then
the next tile's. */
INLINE void fetch_ahead(
    const struct tile *tile, const void *address, int d, int head_dim, enum dtype dtype) {
    if (d * size_of(dtype) % 64) return;
    __builtin_prefetch(at(address, head_dim, dtype), 0, 2);
    __builtin_prefetch((const char *)address + tile->ahead, 0, 2);
}

/* Products of queries that share a K/V head with a tile's keys. */
INLINE void multiply_keys(
    const struct tile *tile, const float *query, float products[][TILE], int head_dim,
    enum dtype dtype, const int NUM) {
    for (int i = 0; i < tile->num_keys; i += ABREAST) {
        floats sums[ABREAST][MOST];
        for (int j = 0; j < ABREAST; j++)
            for (int q = 0; q < NUM; q++) sums[j][q] = (floats){};
        for (int d = 0; d < head_dim; d += LANES)
            for (int j = 0; j < ABREAST; j++) {
                const void *key = at(tile->keys[i + j], d, dtype);
                floats x = load(key, 0, dtype);
                for (int q = 0; q < NUM; q++)
                    sums[j][q] += x * load(query, q * head_dim + d, FLOAT32);
                fetch_ahead(tile, key, d, head_dim, dtype);
            }
        for (int j = 0; j < ABREAST; j++)
            for (int q = 0; q < NUM; q++) products[q][i + j] = sum(sums[j][q]);
    }
}

/* A tile's values times their weights, columns first .. first + WIDTH * LANES - 1, are added. */
INLINE void add_values(
    const struct tile *tile, float weights[][TILE], float *all_sums, int head_dim, int first,
    enum dtype dtype, const int NUM, const int WIDTH) {
    floats sums[4][MOST];
    for (int j = 0; j < WIDTH; j++)
        for (int q = 0; q < NUM; q++)
            sums[j][q] = load(all_sums, q * head_dim + first + j * LANES, FLOAT32);
    for (int i = 0; i < tile->num_keys; i++)
        for (int j = 0; j < WIDTH; j++) {
            const void *value = at(tile->values[i], first + j * LANES, dtype);
            floats x = load(value, 0, dtype);
            fetch_ahead(tile, value, first + j * LANES, head_dim, dtype);
            for (int q = 0; q < NUM; q++) sums[j][q] += x * weights[q][i];
        }
    for (int j = 0; j < WIDTH; j++)
        for (int q = 0; q < NUM; q++)
            store(all_sums, q * head_dim + first + j * LANES, sums[j][q], FLOAT32);
}

/* Attend to one more tile. The queries' sums lie side by side. */
INLINE void attend_tile(
    const struct tile *tile, const float *query, struct found *found, int head_dim, float scale,
    enum dtype dtype, const int NUM) {
    float weights[MOST][TILE];
    multiply_keys(tile, query, weights, head_dim, dtype, NUM);
    int n = tile->num_keys;
    for (int q = 0; q < NUM; q++) {
        for (int i = 0; i < n && tile->key_factors; i++) weights[q][i] *= tile->key_factors[i];
        weigh(weights[q], n, TILE, scale, found + q, head_dim, FLOAT32);
        for (int i = 0; i < n && tile->value_factors; i++) weights[q][i] *= tile->value_factors[i];
    }
    int first = 0;
    for (; first + 4 * LANES <= head_dim; first += 4 * LANES)
        add_values(tile, weights, found->sums, head_dim, first, dtype, NUM, 4);
    for (; first < head_dim; first += LANES)
        add_values(tile, weights, found->sums, head_dim, first, dtype, NUM, 1);
}

struct paged_decode {
    const void *query, *k_cache, *v_cache;
    const uint8_t *k_scales, *v_scales; /* NULL, if the cache is not FP8 */
    const int32_t *block_tables, *lens;
    void *out;
    int64_t query_stride, table_stride; /* elements from one sequence's to the next one's */
    float scale;
    int num_seqs, num_kv_heads, num_sharing, head_dim, block_size;
    enum dtype dtype, cache_dtype;
};

/* One sequence's attention, of some K/V heads. */
INLINE void attend(
    const struct paged_decode *step, int seq, int first_head, int num_heads, enum dtype dtype) {
    int head_dim = step->head_dim, num_sharing = step->num_sharing, len = step->lens[seq];
    int num_queries = num_heads * num_sharing;
    int64_t first_query = (int64_t)first_head * num_sharing * head_dim;
    int64_t stride = (int64_t)step->num_kv_heads * head_dim;
    const int32_t *table = step->block_tables + seq * step->table_stride;
    float query[num_queries * head_dim], sums[num_queries * head_dim];
    struct found found[num_queries];
    for (int q = 0; q < num_queries; q++)
        found[q] = (struct found){.sums = sums + q * head_dim, .peak = -INFINITY};
    memset(sums, 0, sizeof sums);
    for (int d = 0; d < num_queries * head_dim; d += LANES) {
        int64_t from = seq * step->query_stride + first_query + d;
        store(query, d, load(step->query, from, step->dtype), FLOAT32);
    }
    for (int start = 0; start < len; start += TILE) {
        struct tile tile = {.num_keys = len - start < TILE ? len - start : TILE};
        int64_t slots[TILE];
        float key_factors[TILE], value_factors[TILE];
        for (int i = 0; i < tile.num_keys; i++)
            slots[i] = slot_of(table, start + i, step->block_size);
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
#define TAKE(NUM)                                    \
    for (; q + NUM <= end; q += NUM)                 \
        attend_tile(                                 \
            &tile, query + q * head_dim, found + q, head_dim, step->scale, dtype, NUM);
            TAKE(4)
            TAKE(2)
            TAKE(1)
        }
    }
    for (int d = 0; d < num_queries * head_dim; d += LANES) {
        float total = found[d / head_dim].total, share = total == 0 ? 0 : 1 / total;
        int64_t to = seq * stride * num_sharing + first_query + d;
        store(step->out, to, load(sums, d, FLOAT32) * share, step->dtype);
    }
}

/* Each thread takes a sequence, or of few sequences some of the heads of one. */
void paged_decode(const struct paged_decode *step, int num_threads) {
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
