/* Causal attention of a prompt's tokens, as products of small matrices. */

#include "attention.h"

/* Scores and sums are products of panels: ROWS rows times WIDTH columns at once. What they sum up
over comes in units: float32 numbers, or where a processor multiplies them pairs of bfloat16. */
#define ROWS 6
#define WIDTH (4 * LANES)
/* Rows that a thread takes: each panel is read once for all of them. */
#define TASK_ROWS (8 * ROWS)

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

/* pairs: units are that, as they are only if HAS_PAIRS. */
INLINE floats add_product(floats sum, floats column, uint32_t unit, int pairs) {
    floats row = (floats)((ints){} + unit);
    if (pairs) return add_pairs(sum, column, row);
    return sum + column * row;
}

/* Of rows x [ROWS, num_units] and columns panel [num_units, WIDTH]. */
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
                sums[row][v] = add_product(sums[row][v], columns[v], x[row * num_units + i], pairs);
    }
    for (int row = 0; row < ROWS; row++)
        for (int v = 0; v < 4; v++) store(out[row], v * LANES, sums[row][v], FLOAT32);
}

/* `size` numbers, times a factor, as units. */
INLINE void store_units(
    const void *x, float factor, int size, uint32_t *out, enum dtype dtype, int pairs) {
    for (int i = 0; i < size; i += LANES)
        store(out, i, load(x, i, dtype) * factor, pairs ? BFLOAT16 : FLOAT32);
}

INLINE int64_t key_panel_size(int head_dim, int pairs) { return WIDTH * head_dim / (1 + pairs); }

INLINE int64_t value_panel_size(int head_dim, int pairs) {
    return (head_dim + WIDTH - 1) / WIDTH * WIDTH * WIDTH / (1 + pairs);
}

/* Of WIDTH keys: [units of head_dim, WIDTH keys]. Of their values, for each WIDTH columns: [units
of WIDTH keys, WIDTH columns]. What no key has is 0. */
INLINE void make_panels(
    const struct paged_prefill *step, int head, int block, uint32_t *key_panel,
    uint32_t *value_panel, int pairs) {
    enum dtype dtype = step->cache_dtype;
    int head_dim = step->head_dim;
    uint32_t units[head_dim];
    memset(key_panel, 0, 4 * key_panel_size(head_dim, pairs));
    memset(value_panel, 0, 4 * value_panel_size(head_dim, pairs));
    for (int i = 0; i < WIDTH && block * WIDTH + i < step->num_keys; i++) {
        int64_t slot = block * WIDTH + i;
        if (step->block_table) slot = slot_of(step->block_table, slot, step->block_size);
        int64_t scale = slot * step->num_kv_heads + head;
        float key_factor = dtype == E4M3 ? factor_of(step->k_scales[scale]) : 1;
        float value_factor = dtype == E4M3 ? factor_of(step->v_scales[scale]) : 1;
        int64_t from = slot * step->key_stride + (int64_t)head * head_dim;
        const void *key = at(step->keys, from, dtype), *value = at(step->values, from, dtype);
        store_units(key, key_factor, head_dim, units, dtype, pairs);
        for (int j = 0; j < head_dim / (1 + pairs); j++) key_panel[j * WIDTH + i] = units[j];
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
    const struct paged_prefill *step, int head, int first_row, const uint32_t *key_panels,
    const uint32_t *value_panels, int pairs) {
    enum dtype dtype = step->dtype;
    int head_dim = step->head_dim, num_sharing = step->num_sharing;
    int num_rows = step->num_queries * num_sharing - first_row;
    if (num_rows > TASK_ROWS) num_rows = TASK_ROWS;
    int num_units = head_dim / (1 + pairs), width = (head_dim + WIDTH - 1) / WIDTH * WIDTH;
    uint32_t query[TASK_ROWS][num_units], shares[ROWS * WIDTH];
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
        store_units(x, 1, head_dim, query[row], dtype, pairs);
    }
    for (int first = 0; first < num_visible[num_rows - 1]; first += WIDTH) {
        const uint32_t *key_panel = key_panels + first / WIDTH * key_panel_size(head_dim, pairs);
        const uint32_t *value_panel =
            value_panels + first / WIDTH * value_panel_size(head_dim, pairs);
        for (int start = 0; start < num_rows; start += ROWS) {
            int last = start + ROWS < num_rows ? start + ROWS - 1 : num_rows - 1;
            if (num_visible[last] <= first) continue;
            float scores[ROWS][WIDTH], rescale[ROWS];
            multiply_rows(query[start], key_panel, num_units, scores, pairs);
            for (int i = 0; i < ROWS; i++) {
                int row = start + i, n = num_visible[row] - first;
                for (int j = 0; j < WIDTH; j += LANES)
                    store(scores[i], j, load(scores[i], j, FLOAT32) * step->scale, FLOAT32);
                rescale[i] = 1;
                if (n > 0)
                    rescale[i] =
                        weigh(scores[i], n < WIDTH ? n : WIDTH, WIDTH, peak + row, total + row);
                else memset(scores[i], 0, sizeof scores[i]);
                store_units(scores[i], 1, WIDTH, shares + i * WIDTH / (1 + pairs), FLOAT32, pairs);
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

void paged_prefill(const struct paged_prefill *step, int num_threads) {
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
