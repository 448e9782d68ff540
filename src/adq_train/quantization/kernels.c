/* Quantizers on the CPU: one pass over memory forward, one backward.
 *
 * Plain C with the vector types of GCC and Clang; kernels.py builds it and holds it against the
 * plain PyTorch form. Tensors come in fixed chunks whatever the number of threads, and chunks are
 * summed in their order, so results do not depend on it. Comparisons read "not (x <= border)":
 * a NaN lies above every border, as in torch.bucketize.
 */
#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* What made this library, for a run's manifest. */
#ifdef __clang__
const char adq_compiler[] = "clang " __clang_version__;
#else
const char adq_compiler[] = "gcc " __VERSION__;
#endif

typedef float lanes __attribute__((vector_size(32)));
typedef int32_t masks __attribute__((vector_size(32)));
typedef uint32_t words __attribute__((vector_size(32)));
typedef uint16_t halves __attribute__((vector_size(16)));

enum { LANES = 8, CHUNK = 8192, FEW = 15, MOST = 256, WAYS = 4, BINS = 1024, DIGIT = 2048,
       GROUP = 4, BLOCK = 32 };
_Static_assert((FEW + 1) % GROUP == 0, "the last group of edges has room");

#define INLINE static inline __attribute__((always_inline))
#define EACH_CHUNK(chunk, chunks) \
    _Pragma("omp parallel for schedule(static) num_threads(threads) if (chunks > 1)") \
    for (size_t chunk = 0; chunk < chunks; chunk++)

/* A whole vector is a constant size, and so one instruction. */
INLINE void copy(void *to, const void *from, size_t count, size_t size) {
    if (count == LANES) memcpy(to, from, LANES * size);
    else memcpy(to, from, count * size);
}

/* Values of a tensor as float32: of float32, or of (half) bfloat16, the upper halves of floats. */
INLINE lanes load(const void *tensor, size_t begin, size_t count, const int half) {
    lanes x = {0};
    halves h = {0};
    if (!half) copy(&x, (const float *)tensor + begin, count, sizeof(float));
    else {
        copy(&h, (const uint16_t *)tensor + begin, count, sizeof(uint16_t));
        x = (lanes)(__builtin_convertvector(h, words) << 16);
    }
    return x;
}

/* The way back: to bfloat16 as PyTorch rounds, to the nearest, ties to even; NaN stays NaN. */
INLINE void store(lanes x, void *tensor, size_t begin, size_t count, const int half) {
    words bits = (words)x, number = (words)(x == x);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    halves h = __builtin_convertvector((number & bits) | (~number & 0x7fc0), halves);
    if (half) copy((uint16_t *)tensor + begin, &h, count, sizeof(uint16_t));
    else copy((float *)tensor + begin, &x, count, sizeof(float));
}

INLINE lanes all(float x) { return (lanes){x, x, x, x, x, x, x, x}; }

INLINE lanes where(masks mask, lanes yes, lanes no) {
    return (lanes)((mask & (masks)yes) | (~mask & (masks)no));
}

INLINE size_t shorter(size_t a, size_t b) { return a < b ? a : b; }

/* Finds how many borders lie below a value. Bins of equal width tell how many lie below the bin;
 * those inside it, seldom more than one, are compared. Rounding does no harm: bins_of never falls
 * where x rises, so a border in a lower bin is smaller, and one in a higher bin is larger. */
typedef struct {
    float borders[MOST + 1];  /* closed by infinities */
    int32_t first[BINS];
    int count, inside;
    float origin, density;
} Search;

INLINE masks bins_of(const Search *search, lanes x) {
    lanes at = (x - all(search->origin)) * all(search->density);
    at = where(at > all(0), at, all(0));  /* also where it is not a number */
    at = where(at < all(BINS - 1), at, all(BINS - 1));
    return __builtin_convertvector(at, masks);
}

INLINE masks find(const Search *search, lanes x, const int inside) {
    masks bins = bins_of(search, x), index;
    for (int lane = 0; lane < LANES; lane++) index[lane] = search->first[bins[lane]];
    for (int k = 0; k < inside; k++) {
        lanes border;
        for (int lane = 0; lane < LANES; lane++) border[lane] = search->borders[index[lane]];
        index -= ~(x <= border);  /* a mask is -1 where it holds */
    }
    masks last = search->count - (masks){0};
    return ((x == x) & index) | ((x != x) & last);
}

static void prepare(Search *search, const float *borders, int count) {
    float range = borders[count - 1] - borders[0], density = (BINS - 1) / range;
    search->count = count;
    search->inside = 0;
    search->origin = borders[0];
    search->density = range > 0 && density <= FLT_MAX ? density : 0;
    for (int k = 0; k <= MOST; k++) search->borders[k] = k < count ? borders[k] : INFINITY;
    for (int bin = 0, index = 0; bin < BINS; bin++) {
        int begin = search->first[bin] = index;
        while (index < count && bins_of(search, all(borders[index]))[0] <= bin) index++;
        if (index - begin > search->inside) search->inside = index - begin;
    }
}

/* y = values[#{k : x > borders[k]}] for a few borders: compare with each. */
INLINE void few_steps(const void *x, void *y, size_t begin, size_t end, const int half,
                      const float *borders, const float *values, const int count) {
    for (size_t i = begin; i < end; i += LANES) {
        size_t here = shorter(end - i, LANES);
        lanes a = load(x, i, here, half);
        lanes out = all(values[0]);
        for (int k = 0; k < count; k++) out = where(a <= all(borders[k]), out, all(values[k + 1]));
        store(out, y, i, here, half);
    }
}

/* The same for many borders: search. */
INLINE void many_steps(const Search *search, const void *x, void *y, size_t begin, size_t end,
                       const int half, const float *values, const int inside) {
    for (size_t i = begin; i < end; i += LANES) {
        size_t here = shorter(end - i, LANES);
        masks index = find(search, load(x, i, here, half), inside);
        lanes out;
        for (int lane = 0; lane < LANES; lane++) out[lane] = values[index[lane]];
        store(out, y, i, here, half);
    }
}

/* One chunk of the forward pass; what is a constant lets the compiler unroll. */
INLINE void steps(const Search *search, const void *x, void *y, size_t begin, size_t end,
                  const int half, const float *borders, const float *values, int count) {
    switch (count) {
        case 3: few_steps(x, y, begin, end, half, borders, values, 3); break;
        case 7: few_steps(x, y, begin, end, half, borders, values, 7); break;
        case 15: few_steps(x, y, begin, end, half, borders, values, 15); break;
        default:
            if (count <= FEW) few_steps(x, y, begin, end, half, borders, values, count);
            else if (search->inside == 1) many_steps(search, x, y, begin, end, half, values, 1);
            else many_steps(search, x, y, begin, end, half, values, search->inside);
    }
}

/* Maps x (size) to y (size), both float32 or (half) bfloat16, by borders (count), sorted, and
 * values (count + 1). */
void adq_staircase(const void *x, void *y, size_t size, const float *borders,
                   const float *values, int count, int threads, int half) {
    size_t chunks = (size + CHUNK - 1) / CHUNK;
    Search search;
    if (count > FEW) prepare(&search, borders, count);
    EACH_CHUNK(chunk, chunks) {
        size_t begin = chunk * CHUNK, end = shorter(begin + CHUNK, size);
        if (half) steps(&search, x, y, begin, end, 1, borders, values, count);
        else steps(&search, x, y, begin, end, 0, borders, values, count);
    }
}

/* One chunk of the backward pass for a few intervals. With g the gradient of the output:
 * sums[k] = sum of g over x > edges[k], sums[count + 1 + k] = sum of g x over the same,
 * sums[2 count + 2 + k] = sum of g over x > thresholds[k], sums[3 count + 2] = sum of g.
 * A block of vectors meets the edges in groups whose sums stay in registers. */
INLINE void few_intervals(const void *x, const void *grad, void *grad_x, size_t begin, size_t end,
                          const int half, const float *edges, const float *thresholds,
                          const float *slopes, double *sums, const int count) {
    lanes above[FEW + 1] = {0}, moment[FEW + 1] = {0}, over[FEW + 1] = {0}, total = {0};
    for (size_t first = begin; first < end; first += BLOCK * LANES) {
        size_t last = shorter(first + BLOCK * LANES, end), vectors = 0;
        lanes a[BLOCK], g[BLOCK], slope[BLOCK];
        for (size_t i = first; i < last; i += LANES, vectors++) {
            a[vectors] = load(x, i, shorter(last - i, LANES), half);
            g[vectors] = load(grad, i, shorter(last - i, LANES), half);
            slope[vectors] = all(slopes[0]);
            total += g[vectors];
        }
        for (int k = 0; k <= count; k += GROUP) {
            lanes own[3][GROUP];
            for (int j = 0; j < GROUP; j++)
                own[0][j] = above[k + j], own[1][j] = moment[k + j], own[2][j] = over[k + j];
            for (size_t v = 0; v < vectors; v++)
                for (int j = 0; j < GROUP; j++) {
                    if (k + j > count) continue;
                    masks low = a[v] <= all(edges[k + j]);
                    lanes g_above = (lanes)(~low & (masks)g[v]);
                    slope[v] = where(low, slope[v], all(slopes[k + j + 1]));
                    own[0][j] += g_above;
                    own[1][j] += g_above * a[v];
                    if (k + j < count)
                        own[2][j] += (lanes)(~(a[v] <= all(thresholds[k + j])) & (masks)g[v]);
                }
            for (int j = 0; j < GROUP; j++)
                above[k + j] = own[0][j], moment[k + j] = own[1][j], over[k + j] = own[2][j];
        }
        for (size_t v = 0, i = first; grad_x && v < vectors; v++, i += LANES)
            store(slope[v] * g[v], grad_x, i, shorter(last - i, LANES), half);
    }
    for (int lane = 0; lane < LANES; lane++) {
        for (int k = 0; k <= count; k++) {
            sums[k] += above[k][lane];
            sums[count + 1 + k] += moment[k][lane];
        }
        for (int k = 0; k < count; k++) sums[2 * count + 2 + k] += over[k][lane];
        sums[3 * count + 2] += total[lane];
    }
}

/* The same for many intervals: add to the interval's own sums, accumulate from above at the end.
 * Several sets of sums take turns, since values that follow one another are often in the same
 * interval, and would wait for its sum. */
INLINE void many_intervals(const Search *search, const void *x, const void *grad, void *grad_x,
                           size_t begin, size_t end, const int half, const float *thresholds,
                           const float *slopes, double *sums, int count, const int inside) {
    double own[WAYS][MOST + 2][2] = {0}, by_code[WAYS][MOST + 1] = {0};
    for (size_t i = begin; i < end; i += LANES) {
        size_t here = shorter(end - i, LANES);
        lanes a = load(x, i, here, half), g = load(grad, i, here, half), slope, threshold;
        masks interval = find(search, a, inside);  /* 0: below all edges */
        masks below = interval - (masks)((interval > 0) & 1);
        for (int lane = 0; lane < LANES; lane++) {
            slope[lane] = slopes[interval[lane]];
            threshold[lane] = below[lane] < count ? thresholds[below[lane]] : INFINITY;
        }
        masks code = below - ~(a <= threshold);
        code += code > count;  /* a NaN is above infinity too */
        if (grad_x) store(slope * g, grad_x, i, here, half);
        lanes moment = g * a;
        for (int lane = 0; lane < LANES; lane++) {
            double *sum = own[lane % WAYS][interval[lane]];
            sum[0] += g[lane];
            sum[1] += moment[lane];
            by_code[lane % WAYS][code[lane]] += g[lane];
        }
    }
    for (int way = 0; way < WAYS; way++) {
        double above = 0, moment = 0, over = 0;
        for (int k = count; k >= 0; k--) {
            sums[k] += above += own[way][k + 1][0];
            sums[count + 1 + k] += moment += own[way][k + 1][1];
        }
        for (int k = count - 1; k >= 0; k--) sums[2 * count + 2 + k] += over += by_code[way][k + 1];
        sums[3 * count + 2] += over + by_code[way][0];
    }
}

/* One chunk of the backward pass; what is a constant lets the compiler unroll. */
INLINE void intervals(const Search *search, const void *x, const void *grad, void *grad_x,
                      size_t begin, size_t end, const int half, const float *edges,
                      const float *thresholds, const float *slopes, double *sums, int count) {
#define FEW_INTERVALS(n) \
    few_intervals(x, grad, grad_x, begin, end, half, edges, thresholds, slopes, sums, n)
#define MANY_INTERVALS(n) \
    many_intervals(search, x, grad, grad_x, begin, end, half, thresholds, slopes, sums, count, n)
    switch (count) {
        case 3: FEW_INTERVALS(3); break;
        case 7: FEW_INTERVALS(7); break;
        case 15: FEW_INTERVALS(15); break;
        default:
            if (count <= FEW) FEW_INTERVALS(count);
            else if (search->inside == 1) MANY_INTERVALS(1);
            else MANY_INTERVALS(search->inside);
    }
}

/* The sums (3 count + 3) over all chunks, in their order, and grad_x. Returns 0, or 1 without
 * memory. */
static int interval_sums(const void *x, const void *grad, void *grad_x, size_t size, int half,
                         const float *edges, const float *thresholds, const float *slopes,
                         double *sums, int count, int threads) {
    size_t chunks = (size + CHUNK - 1) / CHUNK, width = 3 * (size_t)count + 3;
    double *partial = calloc(chunks * width, sizeof *partial);
    if (!partial) return 1;
    Search search;
    if (count > FEW) prepare(&search, edges, count + 1);
    EACH_CHUNK(chunk, chunks) {
        size_t begin = chunk * CHUNK, end = shorter(begin + CHUNK, size);
        double *own = partial + chunk * width;
        if (half)
            intervals(&search, x, grad, grad_x, begin, end, 1, edges, thresholds, slopes, own, count);
        else
            intervals(&search, x, grad, grad_x, begin, end, 0, edges, thresholds, slopes, own, count);
    }
    for (size_t chunk = 0; chunk < chunks; chunk++)
        for (size_t k = 0; k < width; k++) sums[k] += partial[chunk * width + k];
    free(partial);
    return 0;
}

/* All gradients of steps.GeneralizedSTE. x, grad, grad_x (size; grad_x is NULL where it is
 * not wanted), all float32 or (half) bfloat16; count < MOST; edges (count + 1); thresholds and
 * widths (count); levels (count + 1); gradients of start, widths and levels in one row
 * (2 count + 2). Returns 0, or 1 without memory. */
int adq_step_gradients(const void *x, const void *grad, void *grad_x, size_t size,
                       const float *edges, const float *thresholds, const float *widths,
                       const float *levels, float *gradients, int count, int threads, int half) {
    float slopes[MOST + 1] = {0};
    double sums[3 * MOST] = {0}, later = 0;
    for (int k = 0; k < count; k++) slopes[k + 1] = (levels[k + 1] - levels[k]) / widths[k];
    if (interval_sums(x, grad, grad_x, size, half, edges, thresholds, slopes, sums, count, threads))
        return 1;
    const double *above = sums, *moments = above + count + 1, *over = moments + count + 1;
    for (int k = count - 1; k >= 0; k--) {
        double inside = above[k] - above[k + 1];
        double moment = moments[k] - moments[k + 1] - edges[k] * inside;
        /* Widening an interval shifts every interval after it, as moving the start does. */
        gradients[1 + k] = (float)(-slopes[k + 1] * (moment / widths[k]) - later);
        later += ((double)levels[k + 1] - levels[k]) * inside / widths[k];
    }
    gradients[0] = (float)-later;
    /* ``over`` ends with the sum of all; a level's values lie over one threshold, not the next. */
    for (int k = 0; k <= count; k++)
        gradients[1 + count + k] =
            (float)((k ? over[k - 1] : over[count]) - (k < count ? over[k] : 0));
    return 0;
}

/* Bits whose order as integers is the order of the floats. */
INLINE uint32_t key_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

INLINE float value_of(uint32_t key) {
    uint32_t bits = key ^ (key >> 31 ? 0x80000000u : 0xffffffffu);
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Radix selection: keys of the digits that hold a rank are moved to the front of `room`, and the
 * search goes on among them. `room` has space for the keys of all deeper levels, and for
 * one more. */
static void select_keys(const uint32_t *keys, size_t size, const int64_t *ranks, int count,
                        int shift, uint32_t *room, uint32_t *found) {
    size_t sizes[DIGIT] = {0}, ends[DIGIT];
    for (size_t i = 0; i < size; i++) sizes[(keys[i] >> shift) % DIGIT]++;
    char wanted[DIGIT] = {0};
    size_t below[DIGIT], sum = 0, kept = 0;
    int next = 0;
    for (int digit = 0; digit < DIGIT; digit++) {
        below[digit] = sum;
        sum += sizes[digit];
        for (; next < count && (size_t)ranks[next] < sum; next++) wanted[digit] = 1;
        ends[digit] = kept;
        if (wanted[digit]) kept += sizes[digit];
    }
    /* Without a branch: the others are written one over another, behind those kept. */
    for (int digit = 0; digit < DIGIT; digit++)
        if (!wanted[digit]) ends[digit] = kept;
    for (size_t i = 0; i < size; i++) {
        uint32_t digit = (keys[i] >> shift) % DIGIT;
        room[ends[digit]] = keys[i];
        ends[digit] += (size_t)wanted[digit];
    }
    for (int first = 0; first < count;) {
        size_t digit = 0;
        while (!wanted[digit] || (size_t)ranks[first] >= below[digit] + sizes[digit]) digit++;
        int after = first;
        int64_t inside[count];
        for (; after < count && (size_t)ranks[after] < below[digit] + sizes[digit]; after++)
            inside[after - first] = ranks[after] - (int64_t)below[digit];
        const uint32_t *here = room + ends[digit] - sizes[digit];
        if (shift == 0)
            for (int k = first; k < after; k++) found[k] = here[0];
        else
            select_keys(here, sizes[digit], inside, after - first, shift > 11 ? shift - 11 : 0,
                        room + kept, found + first);
        first = after;
    }
}

/* found[k] = the value of rank ranks[k] (from 0, ascending) among x (size), in time proportional
 * to size. Returns 0, or 1 without memory. */
int adq_order_statistics(const float *x, size_t size, const int64_t *ranks, int count,
                         float *found) {
    uint32_t *keys = malloc((4 * size + 1 + (size_t)count) * sizeof *keys);
    if (!keys) return 1;
    uint32_t *answers = keys + 4 * size + 1;
    for (size_t i = 0; i < size; i++) keys[i] = key_of(x[i]);
    select_keys(keys, size, ranks, count, 21, keys + size, answers);
    for (int k = 0; k < count; k++) found[k] = value_of(answers[k]);
    free(keys);
    return 0;
}
