/* From logits to token ids: see layers/sampler.py. */

#include "numbers.h"

struct sample {
    const void *logits;
    const float *temperatures, *thresholds; /* thresholds: or NULL */
    const int64_t *seeds, *positions;
    int64_t *out;
    int64_t stride, first_id; /* first_id -1: ids are wanted, else keys */
    int num_rows, vocab_size;
    enum dtype dtype;
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
    const struct sample *step, int row, int first, int end, enum dtype dtype) {
    const void *logits = at(step->logits, row * step->stride, dtype);
    float temperature = step->temperatures[row];
    float factor = temperature < 1 ? temperature : 1, divisor = temperature > 1 ? temperature : 1;
    int64_t first_id = step->first_id < 0 ? 0 : step->first_id;
    uint64_t key = mix64(step->seeds[row] + 0x9e3779b97f4a7c15);
    key = mix64(key ^ (uint64_t)step->positions[row]);
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
        if (step->thresholds && temperature > 0) {
            ints is_kept = (ints)(logit >= step->thresholds[row]);
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
void sample(const struct sample *step, int num_threads) {
    int num_rows = step->num_rows, vocab_size = step->vocab_size, num_parts = 1;
    if (num_rows == 0) return;
    while (num_rows * num_parts < 4 * num_threads && vocab_size / num_parts >= MANY) num_parts *= 2;
    int size = (vocab_size / num_parts + LANES) / LANES * LANES;
    struct best found[num_rows * num_parts];
#pragma omp parallel for num_threads(num_threads) schedule(dynamic)
    for (int task = 0; task < num_rows * num_parts; task++) {
        int first = task % num_parts * size, end = first + size;
        if (end > vocab_size) end = vocab_size;
#define BEST(DTYPE) found[task] = best_of(step, task / num_parts, first, end, DTYPE)
        BY_DTYPE(step->dtype, BEST)
    }
    for (int row = 0; row < num_rows; row++) {
        struct best best = found[row * num_parts];
        for (int part = 1; part < num_parts; part++) {
            struct best other = found[row * num_parts + part];
            if (is_better(other.score, other.id, best)) best = other;
        }
        step->out[row] = best.id;
        if (step->first_id < 0) continue;
        float score = best.score + 0.0f; /* -0 is 0 */
        int32_t bits;
        memcpy(&bits, &score, sizeof bits);
        int64_t order = bits ^ (bits < 0 ? 0x7fffffff : 0);
        int64_t last = 0x7fffffff - (best.id + step->first_id);
        step->out[row] = (int64_t)((uint64_t)order << 32) | last;
    }
}
