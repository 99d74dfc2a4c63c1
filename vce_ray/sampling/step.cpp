// One step of all rows through a Llama's layers on a CPU, in float32, and on their own: products with packed matrices,
// and sampling noise. Compiled by compiled.py; plain C interface.
//
// The whole step is one OpenMP region: the threads stay together through all layers and meet at seven barriers per
// layer. torch's operators, about a hundred per step, each wake the threads and wait for them.
//
// Shape legend: R rows, E width of the model, H query heads, K key-value heads (H a multiple of K, neighbours share),
// D head width, F width of the feed-forward, S slots.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

// At most TALLEST rows are multiplied at once: with two vectors of sums each, they take most vector registers (16,
// or 32 with AVX-512) and leave a few for the operands.
#ifdef __AVX512F__
constexpr int64_t LANES = 16, TALLEST = 12;
#else
constexpr int64_t LANES = 8, TALLEST = 6;
#endif
// A matrix is packed in panels of PANEL of its rows, which are columns of the product. A panel is stored column by
// column, so the inner loop reads it as one stream.
constexpr int64_t PANEL = 2 * LANES;
// A panel is multiplied in blocks of DEPTH columns: a block stays in the L1 cache while all rows pass over it.
constexpr int64_t DEPTH = 256;
// The type is aligned as a float, not as a vector, because rows of torch's matrices start anywhere.
typedef float Lanes __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float))));

// out [ROWS, PANEL] += or = x [ROWS, depth] . part of a panel. The sums stay in registers. They start at 0 even if a
// residual is added: starting from the residual would cost every partial sum some of its digits.
template <int ROWS>
void tile(const float* x, int64_t x_stride, const float* panel, int64_t depth, float* out, int64_t stride, bool add) {
    Lanes sums[ROWS][2] = {};
    for (int64_t k = 0; k < depth; ++k) {
        const Lanes left = *(const Lanes*)(panel + k * PANEL), right = *(const Lanes*)(panel + k * PANEL + LANES);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; ++r) {
            sums[r][0] += x[r * x_stride + k] * left;
            sums[r][1] += x[r * x_stride + k] * right;
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int half = 0; half < 2; ++half) {
            Lanes* place = (Lanes*)(out + r * stride + half * LANES);
            *place = add ? *place + sums[r][half] : sums[r][half];
        }
}

constexpr decltype(&tile<1>) TILES[] = {
    tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>,
#ifdef __AVX512F__
    tile<7>, tile<8>, tile<9>, tile<10>, tile<11>, tile<12>,
#endif
};

// out [R, PANEL] += or = x [R, depth] . panel.
void multiply_panel(const float* x, const float* panel, int64_t depth, float* out, int64_t stride, int64_t R,
                    bool add) {
    // Tiles of equal height: a short last tile would use few of the registers.
    const int64_t tiles = (R + TALLEST - 1) / TALLEST;
    for (int64_t k = 0; k < depth; k += DEPTH)
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t first = t * R / tiles, rows = (t + 1) * R / tiles - first;
            TILES[rows - 1](x + first * depth + k, depth, panel + k * PANEL, std::min(DEPTH, depth - k),
                            out + first * stride, stride, add || k > 0);
        }
}

// The functions with an `omp for` are called by all threads of a parallel region. The loop ends with a barrier, so the
// next function may read all of what this one wrote.

// out [R, width] += or = x [R, depth] . packed matrix.
void multiply(const float* x, const float* packed, int64_t depth, float* out, int64_t width, int64_t R, bool add) {
#pragma omp for schedule(static)
    for (int64_t p = 0; p < width / PANEL; ++p)
        multiply_panel(x, packed + p * PANEL * depth, depth, out + p * PANEL, width, R, add);
}

// out [R, F] = silu(x . gate) * (x . up). The panels of the two matrices alternate, so that a thread has both products
// of its columns in the cache when it applies the gate.
void multiply_gated(const float* x, const float* packed, int64_t depth, float* out, int64_t F, int64_t R) {
    std::vector<float> both(R * 2 * PANEL);
#pragma omp for schedule(static)
    for (int64_t p = 0; p < F / PANEL; ++p) {
        const float* gate = packed + 2 * p * PANEL * depth;
        multiply_panel(x, gate, depth, both.data(), 2 * PANEL, R, false);
        multiply_panel(x, gate + PANEL * depth, depth, both.data() + PANEL, 2 * PANEL, R, false);
        for (int64_t r = 0; r < R; ++r)
            for (int64_t c = 0; c < PANEL; ++c) {
                const float* pair = both.data() + r * 2 * PANEL + c;
                out[r * F + p * PANEL + c] = pair[0] / (1 + std::exp(-pair[0])) * pair[PANEL];
            }
    }
}

// out = x / sqrt(mean(x^2) + epsilon) * weight, for each row of [rows, width].
void normalize(const float* x, const float* weight, float* out, int64_t rows, int64_t width, float epsilon) {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
        const float* row = x + r * width;
        float squares = 0;
        for (int64_t e = 0; e < width; ++e) squares += row[e] * row[e];
        const float scale = 1 / std::sqrt(squares / width + epsilon);
        for (int64_t e = 0; e < width; ++e) out[r * width + e] = row[e] * scale * weight[e];
    }
}

// Rotary embedding, pairing the halves as Llama does. The sines of the left half are negated.
void rotate(const float* x, const float* cos, const float* sin, float* out, int64_t D) {
    const int64_t half = D / 2;
    for (int64_t d = 0; d < half; ++d) {
        out[d] = x[d] * cos[d] + x[d + half] * sin[d];
        out[d + half] = x[d + half] * cos[d + half] + x[d] * sin[d + half];
    }
}

// Softmax of query . keys over the live slots, then the weighted sum of values. WIDTH is D if known at compile time,
// which lets the sums stay in registers, else 0.
template <int WIDTH>
void attend_head(const float* query, const float* keys, const float* values, float* scores, float* out, int64_t live,
                 int64_t width) {
    const int64_t D = WIDTH ? WIDTH : width;
    float largest = std::numeric_limits<float>::lowest();
    for (int64_t s = 0; s < live; ++s) {
        float sum = 0;
        for (int64_t d = 0; d < D; ++d) sum += query[d] * keys[s * D + d];
        scores[s] = sum;
        largest = std::max(largest, sum);
    }
    float total = 0;
    for (int64_t s = 0; s < live; ++s) {
        scores[s] = std::exp(scores[s] - largest);
        total += scores[s];
    }
    float fixed[WIDTH ? WIDTH : 1] = {};
    float* sums = WIDTH ? fixed : out;
    if (!WIDTH) std::fill_n(out, D, 0.0f);
    for (int64_t s = 0; s < live; ++s)
        for (int64_t d = 0; d < D; ++d) sums[d] += scores[s] * values[s * D + d];
    for (int64_t d = 0; d < D; ++d) out[d] = sums[d] / total;
}

// Where the tokens of a step go: the rotary embedding by position, [positions, D], and for each row the slot of its
// token and the position of its slot 0.
struct Place {
    const float *cos, *sin;
    const int64_t *slot, *first;
};

struct Heads {
    int64_t H, K, S, D;
};

// Adds up where the time of a step goes, as seen by its first thread. Off (seconds is null) except in benchmarks.
struct Clock {
    double* seconds;
    double last = omp_get_wtime();
    enum Part { NORMS, PRODUCTS, ATTENTION };

    void lap(Part part) {
        if (!seconds || omp_get_thread_num() != 0) return;
        const double now = omp_get_wtime();
        seconds[part] += now - last;
        last = now;
    }
};

// Attention of one query per row over its live slots. Rotates queries and keys and writes keys and values to the cache.
// projected [R, (H + 2 K) D]: queries, keys, values; keys, values [R, K, S, D]; attended [R, H D].
void attend(const float* projected, const Place& at, float* keys, float* values, float* attended, int64_t R,
            const Heads& n) {
    const int64_t group = n.H / n.K, D = n.D;
    const float scale = 1 / std::sqrt(float(D));
    const auto attend_one = D == 32    ? attend_head<32>
                            : D == 64  ? attend_head<64>
                            : D == 128 ? attend_head<128>
                                       : attend_head<0>;
    std::vector<float> scores(n.S), query(D);
    // One task per row and key-value head: it writes its own slot before it reads it, so no barrier is needed between.
#pragma omp for collapse(2) schedule(static)
    for (int64_t r = 0; r < R; ++r)
        for (int64_t k = 0; k < n.K; ++k) {
            const float* row = projected + r * (n.H + 2 * n.K) * D;
            const int64_t slot = at.slot[r], position = slot + at.first[r];
            const float *cos = at.cos + position * D, *sin = at.sin + position * D;
            float* head_keys = keys + (r * n.K + k) * n.S * D;
            float* head_values = values + (r * n.K + k) * n.S * D;
            rotate(row + (n.H + k) * D, cos, sin, head_keys + slot * D, D);
            std::copy_n(row + (n.H + n.K + k) * D, D, head_values + slot * D);
            for (int64_t h = k * group; h < (k + 1) * group; ++h) {
                rotate(row + h * D, cos, sin, query.data(), D);
                for (float& x : query) x *= scale;
                attend_one(query.data(), head_keys, head_values, scores.data(), attended + (r * n.H + h) * D, slot + 1,
                           D);
            }
        }
}

// The hash of noise.py, which must give the same bits.
uint64_t mix(uint64_t x) {
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

}  // namespace

extern "C" {

int64_t vce_panel() { return PANEL; }

// One layer: packed matrices, norms, and cache [R, K, S, D].
struct Layer {
    const float *before, *qkv, *out, *between, *gate_up, *down;
    float *keys, *values;
};

// hidden [R, E]: embeddings of the rows' next tokens on entry, hidden states after the last norm on return.
// scratch: room for R (E + 2 (H + K) D + F) numbers.
// seconds: null, or [3]: the time spent in norms, products and attention is added to it.
void vce_step(const Layer* layers, int64_t count, const float* last, float* hidden, float* scratch, const float* cos,
              const float* sin, const int64_t* slot, const int64_t* first, double* seconds, int64_t R, int64_t E,
              int64_t F, int64_t H, int64_t K, int64_t S, int64_t D, float epsilon) {
    const Place at{cos, sin, slot, first};
    const Heads heads{H, K, S, D};
    const int64_t all = (H + 2 * K) * D;
    float *normed = scratch, *projected = normed + R * E, *attended = projected + R * all;
    float* gated = attended + R * H * D;
#pragma omp parallel
    {
        Clock clock{seconds};
        for (const Layer* layer = layers; layer < layers + count; ++layer) {
            normalize(hidden, layer->before, normed, R, E, epsilon);
            clock.lap(Clock::NORMS);
            multiply(normed, layer->qkv, E, projected, all, R, false);
            clock.lap(Clock::PRODUCTS);
            attend(projected, at, layer->keys, layer->values, attended, R, heads);
            clock.lap(Clock::ATTENTION);
            multiply(attended, layer->out, H * D, hidden, E, R, true);
            clock.lap(Clock::PRODUCTS);
            normalize(hidden, layer->between, normed, R, E, epsilon);
            clock.lap(Clock::NORMS);
            multiply_gated(normed, layer->gate_up, E, gated, F, R);
            multiply(gated, layer->down, F, hidden, E, R, true);
            clock.lap(Clock::PRODUCTS);
        }
        normalize(hidden, last, hidden, R, E, epsilon);
        clock.lap(Clock::NORMS);
    }
}

// out [R, width] = x [R, depth] . packed matrix + bias [width], which may be null.
void vce_multiply(const float* x, const float* packed, const float* bias, float* out, int64_t R, int64_t depth,
                  int64_t width) {
    if (bias)
        for (int64_t r = 0; r < R; ++r) std::copy_n(bias, width, out + r * width);
#pragma omp parallel
    multiply(x, packed, depth, out, width, R, bias != nullptr);
}

// noise [N, V]: standard Gumbel noise of seeds [N] at steps [N], as defined in noise.py.
void vce_gumbel(const int64_t* seeds, const int64_t* steps, float* noise, int64_t N, int64_t V) {
    const uint64_t golden = 0x9E3779B97F4A7C15u;
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; ++n) {
        const uint64_t stream = mix(mix(uint64_t(seeds[n]) * golden) + uint64_t(steps[n] + 1) * golden);
        float* row = noise + n * V;
        for (int64_t v = 0; v < V; ++v) {
            const float bits = float(int32_t(mix(stream + uint64_t(v + 1) * golden) >> 40));
            const float uniform = std::min((bits + 0.5f) * 0x1p-24f, 1 - 0x1p-24f);
            row[v] = -std::log(-std::log(uniform));
        }
    }
}
}
