// What lies between the matrix products of a step, in float32, for CPUs: RMSNorm, gate, attention of one query of each
// row over its live cache with rotation and cache write taken along, and sampling noise. Compiled by compiled.py; plain
// C interface.
//
// Shape legend: R rows, H query heads, K key-value heads (H a multiple of K, neighbours share), S slots, D head width.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

// Rotary embedding, halves paired as Llama does it; the sines have the sign of the half that they fall on.
void rotate(const float* x, const float* cos, const float* sin, float* out, int64_t D) {
    const int64_t half = D / 2;
    for (int64_t d = 0; d < half; ++d) {
        out[d] = x[d] * cos[d] + x[d + half] * sin[d];
        out[d + half] = x[d + half] * cos[d + half] + x[d] * sin[d + half];
    }
}

// Softmax of query . keys over the live slots, then the weighted sum of values. WIDTH is D where it is known when
// compiling, which lets the sums stay in registers, or 0.
template <int WIDTH>
void attend(const float* query, const float* keys, const float* values, float* scores, float* out, int64_t live,
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

uint64_t mix(uint64_t x) {
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

}  // namespace

extern "C" {

// out = x / sqrt(mean(x^2) + epsilon) * weight, for each of so many rows [rows, width].
void vce_norm(const float* x, const float* weight, float* out, int64_t rows, int64_t width, float epsilon) {
#pragma omp parallel for if (rows * width > 32768)
    for (int64_t r = 0; r < rows; ++r) {
        const float* row = x + r * width;
        float squares = 0;
        for (int64_t e = 0; e < width; ++e) squares += row[e] * row[e];
        const float scale = 1 / std::sqrt(squares / width + epsilon);
        for (int64_t e = 0; e < width; ++e) out[r * width + e] = row[e] * scale * weight[e];
    }
}

// out = silu(gate) * up, of gate_up [rows, 2 width]: the gates of a row, then what they gate; out [rows, width].
void vce_gate(const float* gate_up, float* out, int64_t rows, int64_t width) {
#pragma omp parallel for if (rows * width > 8192)
    for (int64_t r = 0; r < rows; ++r) {
        const float* gate = gate_up + 2 * r * width;
        for (int64_t e = 0; e < width; ++e) out[r * width + e] = gate[e] / (1 + std::exp(-gate[e])) * gate[width + e];
    }
}

// projected [R, (H + 2 K) D]: queries, keys, values; cos, sin [positions, D]; slot, first [R]: into which slot the
// row's token goes, and the position of slot 0; keys, values [R, K, S, D]; attended [R, H D].
void vce_attend(const float* projected, const float* cos, const float* sin, const int64_t* slot, const int64_t* first,
                float* keys, float* values, float* attended, int64_t R, int64_t H, int64_t K, int64_t S, int64_t D) {
    const int64_t group = H / K;
    const float scale = 1 / std::sqrt(float(D));
#pragma omp parallel
    {
        std::vector<float> scores(S), query(D);
#pragma omp for collapse(2) schedule(static)
        for (int64_t r = 0; r < R; ++r) {
            for (int64_t k = 0; k < K; ++k) {
                const float* row = projected + r * (H + 2 * K) * D;
                const float* row_cos = cos + (slot[r] + first[r]) * D;
                const float* row_sin = sin + (slot[r] + first[r]) * D;
                float* head_keys = keys + (r * K + k) * S * D;
                float* head_values = values + (r * K + k) * S * D;
                rotate(row + (H + k) * D, row_cos, row_sin, head_keys + slot[r] * D, D);
                std::copy_n(row + (H + K + k) * D, D, head_values + slot[r] * D);
                for (int64_t h = k * group; h < (k + 1) * group; ++h) {
                    rotate(row + h * D, row_cos, row_sin, query.data(), D);
                    for (float& x : query) x *= scale;
                    const auto fixed = D == 32 ? attend<32> : D == 64 ? attend<64> : D == 128 ? attend<128> : attend<0>;
                    fixed(query.data(), head_keys, head_values, scores.data(), attended + (r * H + h) * D, slot[r] + 1,
                          D);
                }
            }
        }
    }
}

// noise [N, B, V]: standard Gumbel noise of steps [N] for seeds [B], as noise.py defines it.
void vce_gumbel(const int64_t* seeds, const int64_t* steps, float* noise, int64_t N, int64_t B, int64_t V) {
    const uint64_t golden = 0x9E3779B97F4A7C15u;
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t n = 0; n < N; ++n) {
        for (int64_t b = 0; b < B; ++b) {
            const uint64_t stream = mix(mix(uint64_t(seeds[b]) * golden) + uint64_t(steps[n] + 1) * golden);
            float* row = noise + (n * B + b) * V;
            for (int64_t v = 0; v < V; ++v) {
                const float bits = float(int32_t(mix(stream + uint64_t(v + 1) * golden) >> 40));
                const float uniform = std::min((bits + 0.5f) * 0x1p-24f, 1 - 0x1p-24f);
                row[v] = -std::log(-std::log(uniform));
            }
        }
    }
}
}
