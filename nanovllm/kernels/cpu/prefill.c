/* Causal attention of a prompt's tokens, as products of small matrices. */

#include "attention.h"
#include "products.h"

/* Keys whose scores with ABREAST rows are computed before any of their values is read. */
#define KEYS 256
/* Tokens ahead of which keys and values are fetched while panels are made. */
#define KEYS_AHEAD 4
/* Rows that a thread takes: panels are read from its cache for all but the first. */
#define TASK_ROWS (8 * ABREAST)

/* One sequence's. */
struct paged_prefill {
    const void *query, *keys, *values;
    const uint8_t *k_scales, *v_scales; /* NULL, if the cache is not FP8 */
    const int32_t *block_table;         /* of a cache; NULL: the sequence's keys lie in a row */
    void *out;
    uint32_t *key_panels, *value_panels; /* scratch */
    int64_t query_stride, key_stride;    /* elements from one token's to the next one's */
    float scale;
    int num_queries, num_keys, num_kv_heads, num_sharing, head_dim, block_size;
    enum dtype dtype, cache_dtype;
};

/* What panels are made of: float32, or where a processor multiplies them pairs of bfloat16. */
INLINE enum dtype unit_dtype(int pairs) { return pairs ? BFLOAT16 : FLOAT32; }

INLINE int round_up(int number, int step) { return (number + step - 1) / step * step; }

/* A sequence's panels of one head, units. */
INLINE int64_t panels_size(int num_keys, int width, int pairs) {
    return (int64_t)round_up(num_keys, ROWS) * width / (1 + pairs);
}

/* `size` numbers, times a factor, as units. */
INLINE void store_units(
    const void *x, float factor, int size, uint32_t *out, enum dtype dtype, int pairs) {
    if (dtype == unit_dtype(pairs)) memcpy(out, x, size * size_of(dtype));
    else for (int i = 0; i < size; i += LANES)
        store(out, i, load(x, i, dtype) * factor, unit_dtype(pairs));
}

/* Keys become a panel of a matrix with a row for each, and its inputs are those of head_dim. Their
values are inputs of one with a row for each of head_dim, in panels of all keys. */
INLINE void make_panels(
    const struct paged_prefill *step, int head, int first, uint32_t *key_panels,
    uint32_t *value_panels, int pairs) {
    enum dtype dtype = step->cache_dtype;
    int head_dim = step->head_dim, num_units = head_dim / (1 + pairs);
    uint32_t units[head_dim], *panel = key_panels + panels_size(first, head_dim, pairs);
    int64_t size = panels_size(step->num_keys, ROWS, pairs); /* of a panel of values */
    for (int i = 0; i < ROWS && first + i < step->num_keys; i++) {
        int64_t slot = first + i;
        if (step->block_table) slot = slot_of(step->block_table, slot, step->block_size);
        int64_t scale = slot * step->num_kv_heads + head;
        float key_factor = dtype == E4M3 ? factor_of(step->k_scales[scale]) : 1;
        float value_factor = dtype == E4M3 ? factor_of(step->v_scales[scale]) : 1;
        int64_t from = slot * step->key_stride + (int64_t)head * head_dim;
        const void *key = at(step->keys, from, dtype), *value = at(step->values, from, dtype);
        /* A later token's, most likely: each lies in a page of its own. */
        int64_t ahead = KEYS_AHEAD * step->key_stride * size_of(dtype);
        for (int j = 0; j < head_dim * size_of(dtype); j += 64) {
            __builtin_prefetch((const char *)key + ahead + j);
            __builtin_prefetch((const char *)value + ahead + j);
        }
        store_units(key, key_factor, head_dim, units, dtype, pairs);
        for (int j = 0; j < num_units; j++) panel[j * ROWS + i] = units[j];
        for (int d = 0; d < head_dim; d += LANES) {
            floats numbers = load(value, d, dtype) * value_factor;
            ints bits = (ints)numbers;
            if (pairs) bits = widened(to_bfloat16(numbers));
            uint32_t *column = value_panels + d / ROWS * size + d % ROWS;
            column += (int64_t)((first + i) / (1 + pairs)) * ROWS;
            if (pairs && i % 2) bits = *(ints *)column | bits << 16;
            *(ints *)column = bits;
        }
    }
}

/* Attention of rows of one K/V head; the heads that share it are rows too, query after query. */
INLINE void attend_rows(
    const struct paged_prefill *step, int head, int first_row, const uint32_t *key_panels,
    const uint32_t *value_panels, int pairs) {
    enum dtype dtype = step->dtype, panel_dtype = unit_dtype(pairs);
    int head_dim = step->head_dim, num_sharing = step->num_sharing;
    int num_rows = step->num_queries * num_sharing - first_row;
    if (num_rows > TASK_ROWS) num_rows = TASK_ROWS;
    int width = round_up(head_dim, ROWS);
    uint32_t query[TASK_ROWS][head_dim / (1 + pairs)];
    float sums[TASK_ROWS][width];
    struct found found[TASK_ROWS];
    int num_visible[TASK_ROWS]; /* keys */
    for (int row = 0; row < num_rows; row++) {
        int token = (first_row + row) / num_sharing;
        found[row] = (struct found){.sums = sums[row], .peak = -INFINITY};
        num_visible[row] = step->num_keys - step->num_queries + token + 1;
        int64_t from = (int64_t)head * num_sharing + (first_row + row) % num_sharing;
        const void *x = at(step->query, token * step->query_stride + from * head_dim, dtype);
        store_units(x, 1, head_dim, query[row], dtype, pairs);
    }
    for (int first = 0; first < num_visible[num_rows - 1]; first += KEYS)
        for (int row = 0, num; row < num_rows; row += num) {
            num = num_abreast(num_rows - row);
            int n = num_visible[row + num - 1] - first;
            if (n <= 0) continue;
            if (n > KEYS) n = KEYS;
            float scores[ABREAST][KEYS];
            for (int key = 0; key < n; key += ROWS) {
                const uint32_t *panel = key_panels + panels_size(first + key, head_dim, pairs);
                MULTIPLY[panel_dtype][num](
                    query[row], head_dim, panel, head_dim, scores[0] + key, KEYS, 0, 0);
            }
            for (int i = 0; i < num; i++) {
                int own = num_visible[row + i] - first;
                if (own <= 0) memset(scores[i], 0, sizeof scores[i]);
                else weigh(
                    scores[i], own < n ? own : n, round_up(n, LANES), step->scale,
                    found + row + i, head_dim, panel_dtype);
            }
            for (int d = 0; d < head_dim; d += ROWS) {
                const uint32_t *panel = value_panels + panels_size(step->num_keys, d, pairs)
                    + panels_size(first, ROWS, pairs);
                MULTIPLY[panel_dtype][num](
                    scores, KEYS * (1 + pairs), panel, round_up(n, 1 + pairs), sums[row] + d, width,
                    first > 0, 0);
            }
        }
    for (int row = 0; row < num_rows; row++) {
        int64_t token = (first_row + row) / num_sharing, own = (first_row + row) % num_sharing;
        int64_t out_row = (token * step->num_kv_heads + head) * num_sharing + own;
        for (int d = 0; d < head_dim; d += LANES) {
            floats result = load(sums[row], d, FLOAT32) * (1 / found[row].total);
            store(step->out, out_row * head_dim + d, result, dtype);
        }
    }
}

void paged_prefill(const struct paged_prefill *step, int num_threads) {
    int pairs = HAS_PAIRS && step->dtype == BFLOAT16, num_kv_heads = step->num_kv_heads;
    int num_blocks = (step->num_keys + ROWS - 1) / ROWS;
    int64_t key_size = panels_size(step->num_keys, step->head_dim, pairs);
    int64_t value_size = panels_size(step->num_keys, round_up(step->head_dim, ROWS), pairs);
#pragma omp parallel for num_threads(num_threads)
    for (int task = 0; task < num_kv_heads * num_blocks; task++) {
        int head = task / num_blocks, first = task % num_blocks * ROWS;
        uint32_t *keys = step->key_panels + head * key_size;
        uint32_t *values = step->value_panels + head * value_size;
        if (pairs) make_panels(step, head, first, keys, values, 1);
        else make_panels(step, head, first, keys, values, 0);
    }
    int num_rows = step->num_queries * step->num_sharing;
    int num_parts = (num_rows + TASK_ROWS - 1) / TASK_ROWS;
    /* The last rows have the most keys: they come first, so that all threads end together. */
#pragma omp parallel for num_threads(num_threads) schedule(dynamic)
    for (int task = num_kv_heads * num_parts - 1; task >= 0; task--) {
        int head = task % num_kv_heads, first_row = task / num_kv_heads * TASK_ROWS;
        const uint32_t *keys = step->key_panels + head * key_size;
        const uint32_t *values = step->value_panels + head * value_size;
        if (pairs) attend_rows(step, head, first_row, keys, values, 1);
        else attend_rows(step, head, first_row, keys, values, 0);
    }
}
