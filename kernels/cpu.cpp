// The CPU's decode kernels: what Triton is on a GPU, C++ is here. Built once by cpu.py, called through raw pointers.
//
// Plain loops that gcc vectorises; the one intrinsic (AVX512-BF16's dot product) has its plain twin beside it.
// Shapes: T tokens, S sequences, H query heads, G key/value heads, D head size, V vocabulary, NB blocks of BS slots.
//
// Cache layouts, chosen so that a tile of keys is one row of lanes and nothing is transposed or reduced sideways:
//   keys    [NB, G, D/X, BS, X]   X = 4 bytes / sizeof(element): a bf16 key keeps pairs of dimensions in one lane
//   values  [NB, G, BS, D]

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif
#include <omp.h>

struct bf16 { uint16_t bits; };

static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) {
    uint32_t u = uint32_t(x.bits) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
template <typename E> static inline E from_float(float x);
template <> inline float from_float<float>(float x) { return x; }
template <> inline bf16 from_float<bf16>(float x) {  // round to nearest even, as torch does
    uint32_t u;
    std::memcpy(&u, &x, 4);
    return {uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}

// exp for x <= 0 to 2 ulp: branch-free, so that loops over it vectorise.
static inline float exp_neg(float x) {
    x = x < -87.0f ? -87.0f : x;
    float n = std::nearbyint(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t e = (int32_t(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &e, 4);
    return p * scale;
}

// ---- norm, rope, activation ------------------------------------------------------------------------------------

template <typename E>
static void rms_norm(const E* x, const E* w, E* y, int64_t rows, int64_t cols, float eps) {
#pragma omp parallel for if (rows * cols > 16384)
    for (int64_t r = 0; r < rows; r++) {
        const E* xr = x + r * cols;
        E* yr = y + r * cols;
        float ss = 0;
        for (int64_t c = 0; c < cols; c++) ss += to_float(xr[c]) * to_float(xr[c]);
        float inv = 1.0f / std::sqrt(ss / cols + eps);
        for (int64_t c = 0; c < cols; c++)
            yr[c] = from_float<E>(to_float(from_float<E>(to_float(xr[c]) * inv)) * to_float(w[c]));
    }
}

template <typename E>
static void swiglu(const E* gate, const E* up, E* y, int64_t n) {
#pragma omp parallel for simd if (n > 16384)
    for (int64_t i = 0; i < n; i++) {
        float g = to_float(gate[i]);
        float e = exp_neg(-std::fabs(g));
        float sigmoid = (g >= 0 ? 1.0f : e) / (1.0f + e);
        y[i] = from_float<E>(to_float(from_float<E>(g * sigmoid)) * to_float(up[i]));
    }
}

// dx of rms_norm for a frozen weight.
template <typename E>
static void rms_norm_backward(const E* dy, const E* x, const E* w, E* dx, int64_t rows, int64_t cols, float eps) {
#pragma omp parallel for if (rows * cols > 16384)
    for (int64_t r = 0; r < rows; r++) {
        const E *xr = x + r * cols, *dyr = dy + r * cols;
        float ss = 0, dot = 0;
        for (int64_t c = 0; c < cols; c++) {
            ss += to_float(xr[c]) * to_float(xr[c]);
            dot += to_float(dyr[c]) * to_float(w[c]) * to_float(xr[c]);
        }
        float inv = 1.0f / std::sqrt(ss / cols + eps), pull = dot * inv * inv / cols;
        for (int64_t c = 0; c < cols; c++)
            dx[r * cols + c] = from_float<E>(inv * (to_float(dyr[c]) * to_float(w[c]) - to_float(xr[c]) * pull));
    }
}

template <typename E>
static void swiglu_backward(const E* dy, const E* gate, const E* up, E* dgate, E* dup, int64_t n) {
#pragma omp parallel for simd if (n > 16384)
    for (int64_t i = 0; i < n; i++) {
        float g = to_float(gate[i]), d = to_float(dy[i]);
        float e = exp_neg(-std::fabs(g));
        float sigmoid = (g >= 0 ? 1.0f : e) / (1.0f + e);
        dup[i] = from_float<E>(d * g * sigmoid);
        dgate[i] = from_float<E>(d * to_float(up[i]) * sigmoid * (1.0f + g * (1.0f - sigmoid)));
    }
}

// y = x [T, heads, D] rotated by cos, sin [T, D/2]; sign -1 turns back, which is the gradient. y may be x.
template <typename E>
static void rope(const E* x, E* y, const float* cos, const float* sin, int64_t T, int heads, int D, float sign) {
    const int half = D / 2;
#pragma omp parallel for if (T * heads * D > 16384)
    for (int64_t t = 0; t < T; t++) {
        const float *c = cos + t * half, *s = sin + t * half;
        for (int h = 0; h < heads; h++) {
            const E* from = x + (t * heads + h) * D;
            E* to = y + (t * heads + h) * D;
#pragma GCC ivdep
            for (int d = 0; d < half; d++) {
                float a = to_float(from[d]), b = to_float(from[d + half]);
                to[d] = from_float<E>(a * c[d] - sign * b * s[d]);
                to[d + half] = from_float<E>(b * c[d] + sign * a * s[d]);
            }
        }
    }
}

// Puts k, v [T, G, D] into the slots of the cache.
template <typename E>
static void write_kv(const E* k, const E* v, const int64_t* slots, E* kc, E* vc, int64_t T, int G, int D, int BS) {
    constexpr int X = 4 / sizeof(E);
#pragma omp parallel for if (T * G * D > 16384)
    for (int64_t t = 0; t < T; t++) {
        int64_t block = slots[t] / BS, offset = slots[t] % BS;
        for (int g = 0; g < G; g++) {
            const E* kt = k + (t * G + g) * D;
            E* keys = kc + (block * G + g) * D * BS;
            for (int d = 0; d < D; d++) keys[(d / X * BS + offset) * X + d % X] = kt[d];
            std::memcpy(vc + ((block * G + g) * BS + offset) * D, v + (t * G + g) * D, D * sizeof(E));
        }
    }
}

// ---- paged attention -------------------------------------------------------------------------------------------

constexpr int TILE = 64;  // keys a tile: four vectors of scores stay in registers

// scores[TILE] += q . keys for one block's BS keys; q and keys come as 4-byte lanes of X elements.
static inline void dot_keys(const float* q, const float* keys, float* scores, int lanes, int BS) {
    for (int l = 0; l < lanes; l++)
        for (int j = 0; j < BS; j++) scores[j] += q[l] * keys[l * BS + j];
}
static inline void dot_keys(const bf16* q, const bf16* keys, float* scores, int lanes, int BS) {
    const uint32_t* q2 = reinterpret_cast<const uint32_t*>(q);
    const uint32_t* k2 = reinterpret_cast<const uint32_t*>(keys);
#ifdef __AVX512BF16__
    if (BS % 16 == 0) {
        for (int j = 0; j < BS; j += 16) {
            __m512 even = _mm512_loadu_ps(scores + j), odd = _mm512_setzero_ps();  // two chains hide the latency
            for (int l = 0; l + 1 < lanes; l += 2) {
                even = _mm512_dpbf16_ps(even, (__m512bh)_mm512_set1_epi32(q2[l]),
                                        (__m512bh)_mm512_loadu_si512(k2 + l * BS + j));
                odd = _mm512_dpbf16_ps(odd, (__m512bh)_mm512_set1_epi32(q2[l + 1]),
                                       (__m512bh)_mm512_loadu_si512(k2 + (l + 1) * BS + j));
            }
            if (lanes % 2)
                even = _mm512_dpbf16_ps(even, (__m512bh)_mm512_set1_epi32(q2[lanes - 1]),
                                        (__m512bh)_mm512_loadu_si512(k2 + (lanes - 1) * BS + j));
            _mm512_storeu_ps(scores + j, _mm512_add_ps(even, odd));
        }
        return;
    }
#endif
    for (int l = 0; l < lanes; l++) {
        float lo = to_float(bf16{uint16_t(q2[l])}), hi = to_float(bf16{uint16_t(q2[l] >> 16)});
        for (int j = 0; j < BS; j++) {
            uint32_t u = k2[l * BS + j];
            scores[j] += lo * to_float(bf16{uint16_t(u)}) + hi * to_float(bf16{uint16_t(u >> 16)});
        }
    }
}

struct Rows {            // the query rows that share one key/value head of one sequence: M = tokens x H/G
    int M;
    float *scores;       // [M, TILE]
    float *out;          // [M, D], not yet divided by the sum
    float *max, *sum;    // [M]
};

// One online-softmax step over a tile of n keys; row m may see the first visible[m] of them.
template <int DT>
static void absorb_tile(Rows& r, const float* values, const int* visible, int n, float scale, int D_) {
    const int D = DT ? DT : D_;
    for (int m = 0; m < r.M; m++) {
        int seen = std::min(n, visible[m]);
        if (seen <= 0) continue;
        float* s = r.scores + m * TILE;
        float top = r.max[m];
        for (int j = 0; j < seen; j++) top = std::max(top, s[j] * scale);
        float shrink = exp_neg(r.max[m] - top), total = 0;
        for (int j = 0; j < seen; j++) s[j] = exp_neg(s[j] * scale - top);
        for (int j = 0; j < seen; j++) total += s[j];
        r.max[m] = top;
        r.sum[m] = r.sum[m] * shrink + total;
        float* out = r.out + m * D;
        if constexpr (DT != 0) {
            float acc[DT];
            for (int d = 0; d < DT; d++) acc[d] = out[d] * shrink;
            for (int j = 0; j < seen; j++)
                for (int d = 0; d < DT; d++) acc[d] += s[j] * values[j * DT + d];
            for (int d = 0; d < DT; d++) out[d] = acc[d];
        } else {
            for (int d = 0; d < D; d++) out[d] *= shrink;
            for (int j = 0; j < seen; j++)
                for (int d = 0; d < D; d++) out[d] += s[j] * values[j * D + d];
        }
    }
}

// Causal attention of q [T, H, D] over the paged cache. Sequence s owns tokens cu[s] .. cu[s+1]; they are the last
// ones of its context_lens[s] cached positions, found through tables [S, max_blocks].
template <typename E>
static void attention_paged(const E* q, const E* kc, const E* vc, E* y, const int32_t* cu, const int32_t* context_lens,
                            const int32_t* tables, int64_t max_blocks, int S, int H, int G, int D, int BS, float scale) {
    constexpr int X = 4 / sizeof(E);
    const int R = H / G;
    const int tokens_a_task = std::max(1, 32 / R);
    struct Task { int s, g, first, count; };
    std::vector<Task> tasks;
    for (int s = 0; s < S; s++)
        for (int t = cu[s]; t < cu[s + 1]; t += tokens_a_task)
            for (int g = 0; g < G; g++) tasks.push_back({s, g, t, std::min(tokens_a_task, cu[s + 1] - t)});
    // long tasks first, so that the last ones to finish are short
    std::stable_sort(tasks.begin(), tasks.end(), [&](const Task& a, const Task& b) {
        return a.count * context_lens[a.s] > b.count * context_lens[b.s];
    });
#pragma omp parallel
    {
        const int most = tokens_a_task * R;
        std::vector<E> rows(most * D);
        std::vector<float> scores(most * TILE), out(most * D), max(most), sum(most), values(TILE * D);
        std::vector<int> visible(most);
#pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < tasks.size(); i++) {
            Task task = tasks[i];
            Rows r{task.count * R, scores.data(), out.data(), max.data(), sum.data()};
            int first_position = context_lens[task.s] - (cu[task.s + 1] - task.first);
            int length = first_position + task.count;  // keys that the task's last token sees
            for (int m = 0; m < r.M; m++) {
                std::memcpy(&rows[m * D], q + ((int64_t)(task.first + m / R) * H + task.g * R + m % R) * D, D * sizeof(E));
                max[m] = -INFINITY;
                sum[m] = 0;
            }
            std::fill(out.begin(), out.begin() + r.M * D, 0.0f);
            for (int start = 0; start < length; start += TILE) {
                int n = std::min(TILE, length - start);
                std::fill(scores.begin(), scores.begin() + r.M * TILE, 0.0f);
                for (int j = 0; j < n; j += BS) {
                    int64_t block = tables[task.s * max_blocks + (start + j) / BS];
                    const E* keys = kc + (block * G + task.g) * D * BS;
                    for (int m = 0; m < r.M; m++) dot_keys(&rows[m * D], keys, r.scores + m * TILE + j, D / X, BS);
                    const E* v = vc + (block * G + task.g) * BS * D;
                    int used = std::min(BS, n - j);
                    for (int e = 0; e < used * D; e++) values[j * D + e] = to_float(v[e]);
                }
                for (int m = 0; m < r.M; m++) visible[m] = first_position + m / R + 1 - start;
                if (D == 64) absorb_tile<64>(r, values.data(), visible.data(), n, scale, D);
                else if (D == 128) absorb_tile<128>(r, values.data(), visible.data(), n, scale, D);
                else absorb_tile<0>(r, values.data(), visible.data(), n, scale, D);
            }
            for (int m = 0; m < r.M; m++) {
                E* to = y + ((int64_t)(task.first + m / R) * H + task.g * R + m % R) * D;
                for (int d = 0; d < D; d++) to[d] = from_float<E>(out[m * D + d] / sum[m]);
            }
        }
    }
}

// ---- sampling --------------------------------------------------------------------------------------------------

struct Candidate { float p; int32_t id; };

// The tokens that top-k, top-p and min-p leave, most likely first; p [V] is exp((logit - max) / temperature).
static void candidates(const float* p, int64_t V, double total, int top_k, float top_p, float min_p,
                       std::vector<Candidate>& kept) {
    // Everything above a falling threshold is gathered until it surely holds the answer; only that part is sorted.
    float threshold = 1e-2f;
    for (;; threshold *= 1e-1f) {
        double mass = 0;
        int64_t count = 0;
        float part = 0;
        for (int64_t i = 0; i < V; i++) {
            bool in = p[i] >= threshold;
            part += in ? p[i] : 0.0f;
            count += in;
        }
        mass = part;
        bool enough = top_k > 0 ? count >= top_k : mass >= top_p * total * 1.0001;
        if (enough || threshold < 1e-30f || (min_p > 0 && threshold <= min_p)) break;
    }
    if (threshold < 1e-30f) threshold = 0;
    kept.clear();
    for (int64_t i = 0; i < V; i++)
        if (p[i] >= threshold) kept.push_back({p[i], int32_t(i)});
    std::sort(kept.begin(), kept.end(), [](const Candidate& a, const Candidate& b) {
        return a.p > b.p || (a.p == b.p && a.id < b.id);
    });
    if (top_k > 0) {
        if (kept.size() > size_t(top_k)) kept.resize(top_k);
        total = 0;
        for (auto& c : kept) total += c.p;
    }
    double before = 0;
    size_t n = 0;
    while (n < kept.size() && (n == 0 || (before < top_p * total && kept[n].p >= min_p))) before += kept[n++].p;
    kept.resize(n);
}

// One draw a row of logits [B, V]. temperature 0 takes the most likely token. uniform is the row's number in [0, 1).
// logprobs gets the model's own log-probability of the drawn token (before temperature and truncation).
template <typename E>
static void sample(const E* logits, int64_t B, int64_t V, const float* temperature, const int32_t* top_k, const float* top_p,
                   const float* min_p, const double* uniform, int64_t* tokens, float* logprobs) {
#pragma omp parallel
    {
        std::vector<float> x(V), p(V);
        std::vector<Candidate> kept;
#pragma omp for schedule(dynamic, 1)
        for (int64_t b = 0; b < B; b++) {
            const E* row = logits + b * V;
            float top = -INFINITY;
            for (int64_t i = 0; i < V; i++) {
                x[i] = to_float(row[i]);
                top = std::max(top, x[i]);
            }
            double plain = 0, total = 0;
            for (int64_t start = 0; start < V; start += 4096) {  // fp32 lanes, summed in double every 4,096
                float part = 0;
                for (int64_t i = start; i < std::min(V, start + 4096); i++) part += exp_neg(x[i] - top);
                plain += part;
            }
            int64_t token = 0;
            if (temperature[b] <= 0) {
                while (x[token] != top && token + 1 < V) token++;
            } else {
                float inv = 1.0f / temperature[b];
                for (int64_t start = 0; start < V; start += 4096) {
                    float part = 0;
                    for (int64_t i = start; i < std::min(V, start + 4096); i++) {
                        p[i] = x[i] == -INFINITY ? 0.0f : exp_neg((x[i] - top) * inv);
                        part += p[i];
                    }
                    total += part;
                }
                if (top_k[b] <= 0 && top_p[b] >= 1 && min_p[b] <= 0) {
                    double at = uniform[b] * total, sum = 0;
                    int64_t last = 0;
                    for (token = 0; token < V; token++) {
                        if (p[token] > 0) last = token;
                        sum += p[token];
                        if (sum > at) break;
                    }
                    if (token == V) token = last;
                } else {
                    candidates(p.data(), V, total, top_k[b], top_p[b], min_p[b], kept);
                    double mass = 0, sum = 0;
                    for (auto& c : kept) mass += c.p;
                    token = kept.back().id;
                    for (auto& c : kept) {
                        sum += c.p;
                        if (sum > uniform[b] * mass) { token = c.id; break; }
                    }
                }
            }
            tokens[b] = token;
            logprobs[b] = float(x[token] - top - std::log(plain));
        }
    }
}

// ---- the names that cpu.py calls: one per element type ---------------------------------------------------------

#define EXPORT(E, NAME)                                                                                              \
    extern "C" void rms_norm_##NAME(const E* x, const E* w, E* y, int64_t rows, int64_t cols, float eps) {           \
        rms_norm(x, w, y, rows, cols, eps);                                                                          \
    }                                                                                                                \
    extern "C" void swiglu_##NAME(const E* gate, const E* up, E* y, int64_t n) { swiglu(gate, up, y, n); }           \
    extern "C" void rms_norm_backward_##NAME(const E* dy, const E* x, const E* w, E* dx, int64_t rows, int64_t cols, \
                                             float eps) {                                                            \
        rms_norm_backward(dy, x, w, dx, rows, cols, eps);                                                            \
    }                                                                                                                \
    extern "C" void swiglu_backward_##NAME(const E* dy, const E* gate, const E* up, E* dgate, E* dup, int64_t n) {   \
        swiglu_backward(dy, gate, up, dgate, dup, n);                                                                \
    }                                                                                                                \
    extern "C" void rope_##NAME(const E* x, E* y, const float* cos, const float* sin, int64_t T, int heads, int D,   \
                                float sign) {                                                                        \
        rope(x, y, cos, sin, T, heads, D, sign);                                                                     \
    }                                                                                                                \
    extern "C" void write_kv_##NAME(const E* k, const E* v, const int64_t* slots, E* kc, E* vc, int64_t T, int G,    \
                                    int D, int BS) {                                                                 \
        write_kv(k, v, slots, kc, vc, T, G, D, BS);                                                                  \
    }                                                                                                                \
    extern "C" void attention_paged_##NAME(const E* q, const E* kc, const E* vc, E* y, const int32_t* cu,            \
                                           const int32_t* context_lens, const int32_t* tables, int64_t max_blocks,   \
                                           int S, int H, int G, int D, int BS, float scale) {                        \
        attention_paged(q, kc, vc, y, cu, context_lens, tables, max_blocks, S, H, G, D, BS, scale);                  \
    }                                                                                                                \
    extern "C" void sample_##NAME(const E* logits, int64_t B, int64_t V, const float* temperature,                   \
                                  const int32_t* top_k, const float* top_p, const float* min_p,                      \
                                  const double* uniform, int64_t* tokens, float* logprobs) {                         \
        sample(logits, B, V, temperature, top_k, top_p, min_p, uniform, tokens, logprobs);                           \
    }

EXPORT(float, f32)
EXPORT(bf16, bf16)
