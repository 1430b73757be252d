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

// Element (t, k) is dropped where its number, a function of (key, tokens[t], k), is below the threshold p · 2^32.
struct Dropout {
    uint32_t low, high, threshold;
    const int64_t* tokens;  // [T]; names that a token keeps wherever it stands
    Dropout(int64_t key, int64_t threshold, const int64_t* tokens)
        : low(uint32_t(key)), high(uint32_t(key >> 32)), threshold(uint32_t(threshold)), tokens(tokens) {}
    uint32_t row(int64_t t) const {
        return mix(uint32_t(tokens[t]) ^ mix(high ^ mix(low + uint32_t(tokens[t] >> 32) * 0x9e3779b9u)));
    }
    vec keep(vec x, uint32_t row, int64_t k) const {
        constexpr uvec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        return mix((lane + uint32_t(k)) ^ row) >= threshold ? x : vec{};
    }
};

template <bool DROP, int ROWS, int RANK, typename E>
static inline void down(const E* x, const float* a, float* low, int64_t t, int64_t first, int64_t K, int64_t r, Dropout drop) {
    vec acc[ROWS][RANK] = {};
    uint32_t rows[ROWS] = {};
    if (DROP)
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
        uint32_t keys[ROWS] = {};
        if (DROP)
            for (int i = 0; i < count; i++) keys[i] = drop.row(first + i);
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

// ---- attention over packed sequences ---------------------------------------------------------------------------

// Scores are held transposed, [keys, QUERIES]: softmax then runs down the keys with sixteen queries side by side, and
// every product has the one form of `multiply`. A query row is one head of one token; those of a key/value head that
// share it go together, a block of QUERIES at a time.
constexpr int QUERIES = 64;

// out [M, N] (+)= rows [M, L · X] x columns [L, N, X], X elements a lane. N is a multiple of 16.
template <int ROWS, int COLUMNS, typename E>
static inline void multiply_tile(const E* rows, int64_t row_stride, const E* columns, int N, int L, float* out, bool add) {
    constexpr int X = 4 / sizeof(E);
    vec acc[ROWS][COLUMNS] = {};
    for (int l = 0; l < L; l++)
#pragma GCC unroll 4
        for (int c = 0; c < COLUMNS; c++) {
            uvec lanes;
            std::memcpy(&lanes, columns + ((int64_t)l * N + c * W) * X, sizeof lanes);
#pragma GCC unroll 4
            for (int i = 0; i < ROWS; i++) acc[i][c] = add_lane(acc[i][c], rows + i * row_stride + l * X, lanes);
        }
    for (int i = 0; i < ROWS; i++)
        for (int c = 0; c < COLUMNS; c++) {
            float* to = out + (int64_t)i * N + c * W;
            store(to, add ? load(to) + acc[i][c] : acc[i][c]);
        }
}
template <typename E>
static void multiply(const E* rows, int64_t row_stride, const E* columns, int M, int N, int L, float* out, bool add = false) {
    constexpr int X = 4 / sizeof(E);
    int n = 0;
    for (; n + 4 * W <= N; n += 4 * W)
        by_rows<4>(M, [&](auto count, int m) {
            multiply_tile<count(), 4>(rows + m * row_stride, row_stride, columns + n * X, N, L, out + (int64_t)m * N + n, add);
        });
    for (; n < N; n += W)
        by_rows<4>(M, [&](auto count, int m) {
            multiply_tile<count(), 1>(rows + m * row_stride, row_stride, columns + n * X, N, L, out + (int64_t)m * N + n, add);
        });
}

// rows [K, N] as the columns [K / X, N, X] of `multiply`; an odd last row of bf16 is paired with zeros.
static const float* as_columns(const float* rows, int, int, std::vector<float>&) { return rows; }
static const bf16* as_columns(const bf16* rows, int K, int N, std::vector<bf16>& buffer) {
    for (int k = 0; k < K; k += 2)
        for (int n = 0; n < N; n += W) {
            hvec first, second = {};
            std::memcpy(&first, rows + (int64_t)k * N + n, sizeof first);
            if (k + 1 < K) std::memcpy(&second, rows + (int64_t)(k + 1) * N + n, sizeof second);
            uvec lanes = __builtin_convertvector(first, uvec) | __builtin_convertvector(second, uvec) << 16;
            std::memcpy(&buffer[((int64_t)k / 2 * N + n) * 2], &lanes, sizeof lanes);
        }
    return buffer.data();
}

template <typename E> struct Packed {
    const E *q, *k, *v;  // [T, H, D], [T, G, D], [T, G, D]
    const int32_t* cu;   // [S + 1]
    int S, H, G, D;
    float scale;
};

// One key/value head of one sequence, and what a thread keeps while it works on a block of its query rows.
template <typename E> struct Head {
    static constexpr int X = 4 / sizeof(E);
    const Packed<E>& a;
    const int64_t start, g;
    const int n, R, M, NX, DW;  // keys; heads that share them; query rows; keys and dimensions padded to lanes and vectors
    std::vector<float> scores;
    std::vector<E> weights, weight_columns, query_columns;
    vec totals[QUERIES / W];

    Head(const Packed<E>& a, int s, int g)
        : a(a), start(a.cu[s]), g(g), n(a.cu[s + 1] - a.cu[s]), R(a.H / a.G), M(n * R), NX((n + X - 1) / X * X),
          DW((a.D + W - 1) / W * W), scores(n * QUERIES), weights(n * QUERIES), weight_columns(NX * QUERIES),
          query_columns(a.D * QUERIES) {}

    int64_t key_stride() const { return (int64_t)a.G * a.D; }
    int64_t key(int j) const { return ((start + j) * a.G + g) * a.D; }
    int64_t query(int m) const { return ((start + m / R) * a.H + g * R + m % R) * a.D; }
    int count(int m) const { return std::min(QUERIES, M - m); }
    int seen(int m) const { return (m + count(m) - 1) / R + 1; }  // keys that the last row of the block from m sees

    // [D, NX]: this head's keys or values with a dimension a row; zeros past the last key.
    std::vector<E> transposed(const E* x) const {
        std::vector<E> to(a.D * NX);
        for (int j = 0; j < n; j++)
            for (int d = 0; d < a.D; d++) to[d * NX + j] = x[key(j) + d];
        return to;
    }

    // out [seen, QUERIES] = x [seen, D] x the rows of `of` from m on, for x this head's keys or values.
    void products(const E* x, const E* of, int m, std::vector<float>& out) {
        std::fill(query_columns.begin(), query_columns.end(), E{});
        for (int i = 0; i < count(m); i++)
            for (int l = 0; l < a.D / X; l++) std::memcpy(&query_columns[(l * QUERIES + i) * X], of + query(m + i) + l * X, 4);
        multiply(x + key(0), key_stride(), query_columns.data(), seen(m), QUERIES, a.D / X, out.data());
    }

    // Scores [seen, QUERIES] become exp(score − the query's largest), 0 for keys after the query's token; totals their sums.
    void softmax(int m) {
        constexpr ivec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        const int rows = seen(m);
        for (int c = 0; c < QUERIES / W; c++) {
            const ivec token = (lane + m + c * W) / R;
            float* column = &scores[c * W];
            vec top = splat(-INFINITY), total = {};
            for (int j = 0; j < rows; j++) {
                vec s = load(column + j * QUERIES);
                s = token >= j ? s : splat(-INFINITY);
                top = larger(top, s);
                store(column + j * QUERIES, s);
            }
            for (int j = 0; j < rows; j++) {
                vec s = load(column + j * QUERIES), p = s == -INFINITY ? vec{} : exp_neg((s - top) * a.scale);
                total += p;
                store(column + j * QUERIES, p);
            }
            totals[c] = total;
        }
    }

    // E from fp32 [rows, QUERIES]
    void round(const std::vector<float>& from, int rows) {
        for (int64_t i = 0; i < (int64_t)rows * QUERIES; i += W) store(&weights[i], load(&from[i]));
    }

    // y's rows from m on = sums [D, QUERIES] turned around
    void write(const float* sums, int m, E* y) const {
        for (int i = 0; i < count(m); i++)
            for (int d = 0; d < a.D; d++) store(y + query(m + i) + d, splat(sums[d * QUERIES + i]), 1);
    }
};

template <typename E> static void attend(const Packed<E>& a, int s, int g, E* y) {
    Head<E> head(a, s, g);
    const std::vector<E> values = head.transposed(a.v);
    std::vector<float> out(a.D * QUERIES);
    for (int m = 0; m < head.M; m += QUERIES) {
        const int seen = head.seen(m);
        head.products(a.k, a.q, m, head.scores);
        head.softmax(m);
        head.round(head.scores, seen);
        const E* weights = as_columns(head.weights.data(), seen, QUERIES, head.weight_columns);
        multiply(values.data(), head.NX, weights, a.D, QUERIES, (seen + head.X - 1) / head.X, out.data());
        for (int d = 0; d < a.D; d++)
            for (int c = 0; c < QUERIES / W; c++) {
                float* at = &out[d * QUERIES + c * W];
                store(at, load(at) / head.totals[c]);
            }
        head.write(out.data(), m, y);
    }
}

// y [T, H, D]: causal attention within each sequence.
template <typename E> static void attention_packed(const Packed<E>& a, E* y) {
#pragma omp parallel for schedule(dynamic, 1)
    for (int i = 0; i < a.S * a.G; i++) attend(a, i / a.G, i % a.G, y);
}

// Weights p of the block from m on and its products dp = v · dy become the scores' gradient p (dp − Σ p dp) · scale, and
// p itself is divided by its sum.
template <typename E> static void softmax_gradient(Head<E>& head, int m, std::vector<float>& dp) {
    const int rows = head.seen(m);
    for (int c = 0; c < QUERIES / W; c++) {
        const vec inverse = 1.0f / head.totals[c];
        vec mean = {};
        for (int j = 0; j < rows; j++) mean += load(&head.scores[j * QUERIES + c * W]) * load(&dp[j * QUERIES + c * W]);
        mean *= inverse;
        for (int j = 0; j < rows; j++) {
            const int at = j * QUERIES + c * W;
            const vec p = load(&head.scores[at]) * inverse;
            store(&head.scores[at], p);
            store(&dp[at], p * (load(&dp[at]) - mean) * head.a.scale);
        }
    }
}

// dy [T, H, D] -> dq [T, H, D], dk and dv [T, G, D]. The weights are computed again.
template <typename E>
static void attend_backward(const Packed<E>& a, int s, int g, const E* dy, E* dq, E* dk, E* dv) {
    Head<E> head(a, s, g);
    const int n = head.n, DW = head.DW, X = head.X;
    const std::vector<E> keys = head.transposed(a.k);
    std::vector<float> dp(n * QUERIES), by_key(n * DW), by_value(n * DW), by_query(a.D * QUERIES);
    std::vector<E> rows(QUERIES * DW), columns(QUERIES * DW);
    auto block = [&](const E* x, int m) {  // the block's rows of x, as columns
        for (int i = 0; i < QUERIES; i++)
            for (int d = 0; d < a.D; d++) rows[i * DW + d] = i < head.count(m) ? x[head.query(m + i) + d] : E{};
        return as_columns(rows.data(), QUERIES, DW, columns);
    };
    for (int m = 0; m < head.M; m += QUERIES) {
        const int seen = head.seen(m);
        head.products(a.k, a.q, m, head.scores);
        head.softmax(m);
        head.products(a.v, dy, m, dp);
        softmax_gradient(head, m, dp);
        head.round(head.scores, seen);
        multiply(head.weights.data(), QUERIES, block(dy, m), seen, DW, QUERIES / X, by_value.data(), true);
        head.round(dp, seen);
        multiply(head.weights.data(), QUERIES, block(a.q, m), seen, DW, QUERIES / X, by_key.data(), true);
        const E* ds = as_columns(head.weights.data(), seen, QUERIES, head.weight_columns);
        multiply(keys.data(), head.NX, ds, a.D, QUERIES, (seen + X - 1) / X, by_query.data());
        head.write(by_query.data(), m, dq);
    }
    for (int j = 0; j < n; j++)
        for (int d = 0; d < a.D; d += W) {
            store(dk + head.key(j) + d, load(&by_key[j * DW + d]), a.D - d);
            store(dv + head.key(j) + d, load(&by_value[j * DW + d]), a.D - d);
        }
}

template <typename E> static void attention_packed_backward(const Packed<E>& a, const E* dy, E* dq, E* dk, E* dv) {
#pragma omp parallel for schedule(dynamic, 1)
    for (int i = 0; i < a.S * a.G; i++) attend_backward(a, i / a.G, i % a.G, dy, dq, dk, dv);
}

// ---- the names that cpu.py calls: one per element type ---------------------------------------------------------

#define DROPPED(NAME, ...)                                                                                           \
    if (threshold) NAME<true>(__VA_ARGS__, Dropout(key, threshold, tokens));                                         \
    else NAME<false>(__VA_ARGS__, Dropout(key, threshold, tokens));

#define EXPORT(E, NAME)                                                                                              \
    extern "C" void cross_entropy_##NAME(E* logits, const int64_t* targets, float* nll, int64_t n, int64_t V,        \
                                         int gradient) {                                                             \
        cross_entropy(logits, targets, nll, n, V, gradient);                                                         \
    }                                                                                                                \
    extern "C" void lora_down_##NAME(const E* x, const float* a, float* low, int64_t T, int64_t K, int64_t r,        \
                                     int64_t key, int64_t threshold, const int64_t* tokens) {                        \
        DROPPED(lora_down, x, a, low, T, K, r)                                                                       \
    }                                                                                                                \
    extern "C" void lora_up_##NAME(E* y, const float* low, const float* b, const E* bias, int64_t T, int64_t N,      \
                                   int64_t r, float scale, int add, int64_t key, int64_t threshold,                  \
                                   const int64_t* tokens) {                                                          \
        DROPPED(lora_up, low, b, bias, y, T, N, r, scale, add)                                                       \
    }                                                                                                                \
    extern "C" void lora_outer_##NAME(const E* x, const float* low, float* out, int64_t T, int64_t K, int64_t r,     \
                                      int64_t key, int64_t threshold, const int64_t* tokens) {                       \
        DROPPED(lora_outer, low, x, out, T, K, r)                                                                    \
    }                                                                                                                \
    extern "C" void attention_packed_##NAME(const E* q, const E* k, const E* v, E* y, const int32_t* cu, int S,      \
                                            int H, int G, int D, float scale) {                                      \
        attention_packed<E>({q, k, v, cu, S, H, G, D, scale}, y);                                                    \
    }                                                                                                                \
    extern "C" void attention_packed_backward_##NAME(const E* q, const E* k, const E* v, const E* dy, E* dq, E* dk,  \
                                                     E* dv, const int32_t* cu, int S, int H, int G, int D,           \
                                                     float scale) {                                                  \
        attention_packed_backward<E>({q, k, v, cu, S, H, G, D, scale}, dy, dq, dk, dv);                              \
    }

EXPORT(float, f32)
EXPORT(bf16, bf16)
