// The CPU's training kernels, called through raw pointers like those of cpu.cpp.
//
// Written on the vectors of lanes.h; sums are fp32. No result depends on the number of threads: each number is summed by
// one of them. Shapes: T tokens, S sequences, H query heads, G key/value heads, D head size, V vocabulary, r the rank.

#include "lanes.h"

// ---- cross-entropy ---------------------------------------------------------------------------------------------

// nll [n] of targets [n] under logits [n, V]; with `gradient` the logits are replaced by softmax − onehot.
template <typename E>
static void cross_entropy(E* logits, const int64_t* targets, float* nll, int64_t n, int64_t V, int gradient) {
#pragma omp parallel for if (n * V > SMALL)
    for (int64_t r = 0; r < n; r++) {
        E *row = logits + r * V, *hit = row + targets[r];
        const int64_t whole = V / W * W;
        vec tops = splat(to_float(row[0]));
        for (int64_t i = 0; i < whole; i += W) tops = larger(tops, load(row + i));
        float top = largest(tops);
        for (int64_t i = whole; i < V; i++) top = std::max(top, to_float(row[i]));
        double total = 0;
        for (int64_t start = 0; start < whole; start += 4096) {  // long sums are closed in double
            vec sums = {};
            for (int64_t i = start; i < std::min(whole, start + 4096); i += W) sums += exp_neg(load(row + i) - top);
            total += sum(sums);
        }
        for (int64_t i = whole; i < V; i++) total += exp_neg(to_float(row[i]) - top);
        nll[r] = float(std::log(total)) - (to_float(*hit) - top);
        if (!gradient) continue;
        const float inverse = float(1.0 / total), p = exp_neg(to_float(*hit) - top) * inverse;
        for (int64_t i = 0; i < V; i += W) store(row + i, exp_neg(load(row + i, V - i) - top) * inverse, V - i);
        store(hit, splat(p - 1.0f), 1);
    }
}

// ---- low rank and dropout --------------------------------------------------------------------------------------

// A 32-bit mix in which every bit of x reaches every bit of the result.
template <typename U> static inline U mix(U x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ (x >> 16);
}

// Element (t, k) is dropped where its number, a function of (key, t, k), is below the threshold p · 2^32.
struct Dropout {
    uint32_t low, high, threshold;
    Dropout(int64_t key, int64_t threshold) : low(uint32_t(key)), high(uint32_t(key >> 32)), threshold(uint32_t(threshold)) {}
    uint32_t row(int64_t t) const { return mix(high ^ mix(low + uint32_t(t) * 0x9e3779b9u)); }
    vec keep(vec x, uint32_t row, int64_t k) const {
        constexpr uvec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        return mix((lane + uint32_t(k)) ^ row) >= threshold ? x : vec{};
    }
};

template <bool DROP, int ROWS, int RANK, typename E>
static inline void down(const E* x, const float* a, float* low, int64_t t, int64_t first, int64_t K, int64_t r, Dropout drop) {
    vec acc[ROWS][RANK] = {};
    uint32_t rows[ROWS];
    for (int i = 0; i < ROWS; i++) rows[i] = drop.row(t + i);
    each_vector(K, [&](int64_t k, auto n) {
        vec xs[ROWS];
        for (int i = 0; i < ROWS; i++) {
            xs[i] = load(x + (t + i) * K + k, n);
            if (DROP) xs[i] = drop.keep(xs[i], rows[i], k);
        }
#pragma GCC unroll 8
        for (int j = 0; j < RANK; j++) {
            vec w = load(a + (first + j) * K + k, n);
            for (int i = 0; i < ROWS; i++) acc[i][j] += xs[i] * w;
        }
    });
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < RANK; j++) low[(t + i) * r + first + j] = sum(acc[i][j]);
}

// low [T, r] fp32 = drop(x) aᵀ, with x [T, K] and a [r, K] fp32. Survivors are not scaled up here.
template <bool DROP, typename E>
static void lora_down(const E* x, const float* a, float* low, int64_t T, int64_t K, int64_t r, Dropout drop) {
#pragma omp parallel for if (T * K > SMALL)
    for (int64_t t = 0; t < T; t += 2) {
        int64_t first = 0;
        for (; first + 8 <= r && t + 2 <= T; first += 8) down<DROP, 2, 8>(x, a, low, t, first, K, r, drop);
        for (int64_t row = t; row < std::min(T, t + 2); row++)
            for (int64_t j = first; j < r; j++) down<DROP, 1, 1>(x, a, low, row, j, K, r, drop);
    }
}

// y [T, N] = start + scale · drop(low b), with low [T, r] and b [r, N] fp32; start is y where `add`, else the bias or 0.
template <bool DROP, typename E>
static void lora_up(const float* low, const float* b, const E* bias, E* y, int64_t T, int64_t N, int64_t r, float scale,
                    int add, Dropout drop) {
    constexpr int ROWS = 8;
#pragma omp parallel for if (T * N > SMALL)
    for (int64_t first = 0; first < T; first += ROWS) {
        const int count = int(std::min<int64_t>(ROWS, T - first));
        std::vector<float> padded(ROWS * r);  // the last rows may be fewer: zeros serve for the others
        std::copy_n(low + first * r, count * r, padded.begin());
        const float* rows = padded.data();
        uint32_t keys[ROWS];
        for (int i = 0; i < ROWS; i++) keys[i] = drop.row(first + i);
        each_vector(N, [&](int64_t at, auto n) {
            vec acc[ROWS] = {};
            for (int64_t j = 0; j < r; j++) {
                vec w = load(b + j * N + at, n);
#pragma GCC unroll 8
                for (int i = 0; i < ROWS; i++) acc[i] += w * rows[i * r + j];
            }
            const vec offset = bias ? load(bias + at, n) : vec{};
            for (int i = 0; i < count; i++) {
                E* to = y + (first + i) * N + at;
                vec v = DROP ? drop.keep(acc[i], keys[i], at) : acc[i];
                store(to, v * scale + (add ? load(to, n) : offset), n);
            }
        });
    }
}

template <bool DROP, int RANK, typename E, typename N>
static inline void outer(const float* low, const E* x, float* out, int64_t T, int64_t K, int64_t r, int64_t first, int64_t k,
                         N n, const uint32_t* keys, Dropout drop) {
    constexpr int64_t ROWS = 64;  // summed apart, so that a long sum is rounded T / 64 times and not T times
    for (int64_t start = 0; start < T; start += ROWS) {
        vec acc[RANK] = {};
        for (int64_t t = start; t < std::min(T, start + ROWS); t++) {
            vec v = load(x + t * K + k, n);
            if (DROP) v = drop.keep(v, keys[t], k);
#pragma GCC unroll 8
            for (int j = 0; j < RANK; j++) acc[j] += v * low[t * r + first + j];
        }
        for (int j = 0; j < RANK; j++) {
            float* to = out + (first + j) * K + k;
            store(to, start ? load(to, n) + acc[j] : acc[j], n);
        }
    }
}

// out [r, K] fp32 = lowᵀ drop(x), with low [T, r] fp32 and x [T, K].
template <bool DROP, typename E>
static void lora_outer(const float* low, const E* x, float* out, int64_t T, int64_t K, int64_t r, Dropout drop) {
    std::vector<uint32_t> keys(DROP ? T : 0);
    for (size_t t = 0; t < keys.size(); t++) keys[t] = drop.row(t);
    constexpr int64_t STEP = 64 / sizeof(E);  // a cache line of x
#pragma omp parallel for if (T * K > SMALL)
    for (int64_t start = 0; start < K; start += STEP)
        each_vector(std::min(STEP, K - start), [&](int64_t k, auto n) {
            int64_t first = 0;
            for (; first + 8 <= r; first += 8) outer<DROP, 8>(low, x, out, T, K, r, first, start + k, n, keys.data(), drop);
            for (; first < r; first++) outer<DROP, 1>(low, x, out, T, K, r, first, start + k, n, keys.data(), drop);
        });
}

// ---- attention over packed sequences: the gradient -------------------------------------------------------------

constexpr int B = 4, TILE = 4 * W;  // B query rows meet TILE keys, or TILE dimensions, at a time: 16 accumulators

// out [B, n] = rows [B, D] x columns [D, stride]; n is a multiple of TILE.
static inline void multiply(const float* rows, const float* columns, int D, int n, int stride, float* out) {
    for (int at = 0; at < n; at += TILE) {
        vec acc[B][4] = {};
        for (int d = 0; d < D; d++)
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) {
                vec v = load(columns + (int64_t)d * stride + at + c * W);
#pragma GCC unroll 4
                for (int i = 0; i < B; i++) acc[i][c] += v * rows[i * D + d];
            }
        for (int i = 0; i < B; i++)
            for (int c = 0; c < 4; c++) store(out + i * stride + at + c * W, acc[i][c]);
    }
}

// out [n, D] += weights [B, stride]ᵀ x rows [B, D]
static inline void add_outer(const float* weights, const float* rows, int n, int D, int stride, float* out) {
    for (int at = 0; at < D; at += TILE) {
        vec r[B][4];
        for (int i = 0; i < B; i++)
            for (int c = 0; c < 4; c++) r[i][c] = load(rows + i * D + at + c * W);
        for (int j = 0; j < n; j++)
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) {
                float* to = out + (int64_t)j * D + at + c * W;
                vec v = r[0][c] * weights[j];  // summed apart first: a long sum is then rounded once for four terms
#pragma GCC unroll 4
                for (int i = 1; i < B; i++) v += r[i][c] * weights[i * stride + j];
                store(to, load(to) + v);
            }
    }
}

// out [B, D] = weights [B, stride] x values [n, D]
static inline void weigh(const float* weights, const float* values, int n, int D, int stride, float* out) {
    for (int at = 0; at < D; at += TILE) {
        vec acc[B][4] = {};
        for (int j = 0; j < n; j++)
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) {
                vec v = load(values + (int64_t)j * D + at + c * W);
#pragma GCC unroll 4
                for (int i = 0; i < B; i++) acc[i][c] += v * weights[i * stride + j];
            }
        for (int i = 0; i < B; i++)
            for (int c = 0; c < 4; c++) store(out + i * D + at + c * W, acc[i][c]);
    }
}

// One row: scores s become weights p, and the products dy · v become the scores' gradient p (dp − Σ p dp) · scale.
// From `seen` on both are 0, up to n, a multiple of TILE.
static inline void softmax_gradient(float* s, float* dp, int seen, int n, float scale) {
    for (int j = seen; j < n; j++) s[j] = -INFINITY;
    vec tops = splat(-INFINITY), sums = {}, dots = {};
    for (int j = 0; j < n; j += W) tops = larger(tops, load(s + j));
    const float top = largest(tops) * scale;
    for (int j = 0; j < n; j += W) {
        vec x = load(s + j), p = x == -INFINITY ? vec{} : exp_neg(x * scale - top);
        sums += p;
        dots += p * load(dp + j);
        store(s + j, p);
    }
    const float inverse = 1.0f / sum(sums), mean = sum(dots) * inverse;
    for (int j = 0; j < n; j += W) {
        vec p = load(s + j) * inverse;
        store(s + j, p);
        store(dp + j, p * (load(dp + j) - mean) * scale);
    }
}

template <typename E> struct Packed {
    const E *q, *k, *v, *dy;  // [T, H, D], [T, G, D], [T, G, D], [T, H, D]
    E *dq, *dk, *dv;
    const int32_t* cu;  // [S + 1]
    int S, H, G, D;
    float scale;
};

static inline void flush(std::vector<float>& part, std::vector<float>& total, int n) {
    for (int i = 0; i < n; i++) {
        total[i] += part[i];
        part[i] = 0;
    }
}

// All gradients of one key/value head of one sequence. Keys and values are held in fp32, D padded to DP. A key's gradient
// has a term for each query row that sees it: 64 rows are summed apart, then added, so that long sums stay exact enough.
template <typename E> static void attend_backward(const Packed<E>& a, int s, int g) {
    const int start = a.cu[s], n = a.cu[s + 1] - start, R = a.H / a.G, M = n * R;
    const int DP = (a.D + TILE - 1) / TILE * TILE, NP = (n + TILE - 1) / TILE * TILE;
    std::vector<float> kt(DP * NP), vt(DP * NP), k(n * DP), dk(n * DP), dv(n * DP), dk_part(n * DP), dv_part(n * DP);
    std::vector<float> q(B * DP), dy(B * DP), dq(B * DP), p(B * NP), ds(B * NP);
    for (int j = 0; j < n; j++)
        for (int d = 0; d < a.D; d++) {
            const int64_t from = ((int64_t)(start + j) * a.G + g) * a.D + d;
            kt[d * NP + j] = k[j * DP + d] = to_float(a.k[from]);
            vt[d * NP + j] = to_float(a.v[from]);
        }
    auto at = [&](int m) { return ((int64_t)(start + m / R) * a.H + g * R + m % R) * a.D; };
    for (int m = 0; m < M; m += B) {
        const int count = std::min(B, M - m), seen = (m + count - 1) / R + 1, tiled = (seen + TILE - 1) / TILE * TILE;
        for (int i = 0; i < B; i++)
            for (int d = 0; d < a.D; d++) {  // past the end: zeros, which add nothing
                q[i * DP + d] = i < count ? to_float(a.q[at(m + i) + d]) : 0;
                dy[i * DP + d] = i < count ? to_float(a.dy[at(m + i) + d]) : 0;
            }
        multiply(q.data(), kt.data(), DP, tiled, NP, p.data());
        multiply(dy.data(), vt.data(), DP, tiled, NP, ds.data());
        for (int i = 0; i < B; i++)
            softmax_gradient(&p[i * NP], &ds[i * NP], std::min(seen, (m + i) / R + 1), tiled, a.scale);
        add_outer(p.data(), dy.data(), seen, DP, NP, dv_part.data());
        add_outer(ds.data(), q.data(), seen, DP, NP, dk_part.data());
        if (m / B % 16 == 15 || m + B >= M) {
            flush(dv_part, dv, seen * DP);
            flush(dk_part, dk, seen * DP);
        }
        weigh(ds.data(), k.data(), seen, DP, NP, dq.data());
        for (int i = 0; i < count; i++)
            for (int d = 0; d < a.D; d += W) store(a.dq + at(m + i) + d, load(&dq[i * DP + d]), a.D - d);
    }
    for (int j = 0; j < n; j++)
        for (int d = 0; d < a.D; d += W) {
            const int64_t to = ((int64_t)(start + j) * a.G + g) * a.D + d;
            store(a.dk + to, load(&dk[j * DP + d]), a.D - d);
            store(a.dv + to, load(&dv[j * DP + d]), a.D - d);
        }
}

template <typename E> static void attention_packed_backward(const Packed<E>& a) {
#pragma omp parallel for schedule(dynamic, 1)
    for (int i = 0; i < a.S * a.G; i++) attend_backward(a, i / a.G, i % a.G);
}

// ---- the names that cpu.py calls: one per element type ---------------------------------------------------------

#define DROPPED(NAME, ...)                                                                                           \
    if (threshold) NAME<true>(__VA_ARGS__, Dropout(key, threshold));                                                 \
    else NAME<false>(__VA_ARGS__, Dropout(key, threshold));

#define EXPORT(E, NAME)                                                                                              \
    extern "C" void cross_entropy_##NAME(E* logits, const int64_t* targets, float* nll, int64_t n, int64_t V,        \
                                         int gradient) {                                                             \
        cross_entropy(logits, targets, nll, n, V, gradient);                                                         \
    }                                                                                                                \
    extern "C" void lora_down_##NAME(const E* x, const float* a, float* low, int64_t T, int64_t K, int64_t r,        \
                                     int64_t key, int64_t threshold) {                                               \
        DROPPED(lora_down, x, a, low, T, K, r)                                                                       \
    }                                                                                                                \
    extern "C" void lora_up_##NAME(E* y, const float* low, const float* b, const E* bias, int64_t T, int64_t N,      \
                                   int64_t r, float scale, int add, int64_t key, int64_t threshold) {                \
        DROPPED(lora_up, low, b, bias, y, T, N, r, scale, add)                                                       \
    }                                                                                                                \
    extern "C" void lora_outer_##NAME(const E* x, const float* low, float* out, int64_t T, int64_t K, int64_t r,     \
                                      int64_t key, int64_t threshold) {                                              \
        DROPPED(lora_outer, low, x, out, T, K, r)                                                                    \
    }                                                                                                                \
    extern "C" void attention_packed_backward_##NAME(const E* q, const E* k, const E* v, const E* dy, E* dq, E* dk,  \
                                                     E* dv, const int32_t* cu, int S, int H, int G, int D,           \
                                                     float scale) {                                                  \
        attention_packed_backward<E>({q, k, v, dy, dq, dk, dv, cu, S, H, G, D, scale});                              \
    }

EXPORT(float, f32)
EXPORT(bf16, bf16)
