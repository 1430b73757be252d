// The CPU's kernels: what Triton is on a GPU, C++ is here. Built once by cpu.py, called through raw pointers.
//
// Written on the vectors of lanes.h; the one intrinsic, AVX512-BF16's dot product, has its plain twin beside it. Sums are
// fp32, long ones are closed in double. What only training needs is in cpu_train.cpp.
// Shapes: T tokens, S sequences, H query heads, G key/value heads, D head size, V vocabulary, NB blocks of BS slots.
//
// Cache layouts, chosen so that a tile of keys is one row of lanes and nothing is transposed or reduced sideways:
//   keys    [NB, G, D/X, BS, X]   X = 4 bytes / sizeof(element): a bf16 key keeps pairs of dimensions in one lane
//   values  [NB, G, BS, D]

#include "lanes.h"

// ---- norm, activation, rope ------------------------------------------------------------------------------------

template <typename E>
static void rms_norm(const E* x, const E* w, E* y, int64_t rows, int64_t cols, float eps) {
#pragma omp parallel for if (rows * cols > SMALL)
    for (int64_t r = 0; r < rows; r++) {
        const E* xr = x + r * cols;
        vec squares = {};
        for (int64_t c = 0; c < cols; c += W) {
            vec v = load(xr + c, cols - c);
            squares += v * v;
        }
        float inv = 1.0f / std::sqrt(sum(squares) / cols + eps);
        for (int64_t c = 0; c < cols; c += W)
            store(y + r * cols + c, as_stored(load(xr + c, cols - c) * inv, x) * load(w + c, cols - c), cols - c);
    }
}

// dx of rms_norm for a frozen weight.
template <typename E>
static void rms_norm_backward(const E* dy, const E* x, const E* w, E* dx, int64_t rows, int64_t cols, float eps) {
#pragma omp parallel for if (rows * cols > SMALL)
    for (int64_t r = 0; r < rows; r++) {
        const E *xr = x + r * cols, *dyr = dy + r * cols;
        vec squares = {}, dots = {};
        for (int64_t c = 0; c < cols; c += W) {
            vec v = load(xr + c, cols - c);
            squares += v * v;
            dots += load(dyr + c, cols - c) * load(w + c, cols - c) * v;
        }
        float inv = 1.0f / std::sqrt(sum(squares) / cols + eps), pull = sum(dots) * inv * inv / cols;
        for (int64_t c = 0; c < cols; c += W) {
            vec d = load(dyr + c, cols - c) * load(w + c, cols - c) - load(xr + c, cols - c) * pull;
            store(dx + r * cols + c, d * inv, cols - c);
        }
    }
}

template <typename E>
static void swiglu(const E* gate, const E* up, E* y, int64_t n) {
#pragma omp parallel for if (n > SMALL)
    for (int64_t i = 0; i < n; i += W) {
        vec g = load(gate + i, n - i);
        store(y + i, as_stored(g * sigmoid(g), gate) * load(up + i, n - i), n - i);
    }
}

template <typename E>
static void swiglu_backward(const E* dy, const E* gate, const E* up, E* dgate, E* dup, int64_t n) {
#pragma omp parallel for if (n > SMALL)
    for (int64_t i = 0; i < n; i += W) {
        vec g = load(gate + i, n - i), d = load(dy + i, n - i), s = sigmoid(g);
        store(dup + i, d * g * s, n - i);
        store(dgate + i, d * load(up + i, n - i) * s * (1.0f + g * (1.0f - s)), n - i);
    }
}

// y = x [T, heads, D] rotated by cos, sin [T, D/2]; sign -1 turns back, which is the gradient. y may be x.
template <typename E>
static void rope(const E* x, E* y, const float* cos, const float* sin, int64_t T, int heads, int D, float sign) {
    const int half = D / 2;
#pragma omp parallel for if (T * heads * D > SMALL)
    for (int64_t t = 0; t < T; t++)
        for (int h = 0; h < heads; h++)
            for (int d = 0; d < half; d += W) {
                const E* from = x + (t * heads + h) * D + d;
                E* to = y + (t * heads + h) * D + d;
                vec a = load(from, half - d), b = load(from + half, half - d);
                vec c = load(cos + t * half + d, half - d), s = load(sin + t * half + d, half - d) * sign;
                store(to, a * c - b * s, half - d);
                store(to + half, b * c + a * s, half - d);
            }
}

// ---- the paged cache -------------------------------------------------------------------------------------------

// Puts k, v [T, G, D] into the slots of the cache.
template <typename E>
static void write_kv(const E* k, const E* v, const int64_t* slots, E* kc, E* vc, int64_t T, int G, int D, int BS) {
    constexpr int X = 4 / sizeof(E);
#pragma omp parallel for if (T * G * D > SMALL)
    for (int64_t t = 0; t < T; t++) {
        int64_t block = slots[t] / BS, offset = slots[t] % BS;
        for (int g = 0; g < G; g++) {
            const E* kt = k + (t * G + g) * D;
            E* keys = kc + (block * G + g) * D * BS;
            for (int l = 0; l < D / X; l++) std::memcpy(keys + (l * BS + offset) * X, kt + l * X, 4);
            std::memcpy(vc + ((block * G + g) * BS + offset) * D, v + (t * G + g) * D, D * sizeof(E));
        }
    }
}

constexpr int GROUPS = 4, TILE = GROUPS * W;  // keys that one step of the online softmax takes: four vectors of scores

// A tile of one key/value head: sixteen keys a group, whose 4-byte lanes lie a stride apart, and each key's value.
template <typename E> struct Tile {
    const char* groups[GROUPS];
    const E* values[TILE];
};

// scores [ROWS, TILE] of ROWS queries against a tile. Blocks lie anywhere in memory, where no hardware prefetch finds
// them, so the first rows to meet a tile fetch the `next` one while they work; null for the others.
template <int ROWS, typename E>
static inline void score(const E* const* q, const Tile<E>& tile, const Tile<E>* next, int64_t stride, int lanes, float* scores) {
    vec acc[ROWS][GROUPS] = {};
    for (int l = 0; l < lanes; l++)
#pragma GCC unroll 4
        for (int g = 0; g < GROUPS; g++) {
            uvec keys;
            std::memcpy(&keys, tile.groups[g] + l * stride, sizeof keys);
            if (next) __builtin_prefetch(next->groups[g] + l * stride);
#pragma GCC unroll 3
            for (int r = 0; r < ROWS; r++) acc[r][g] = add_lane(acc[r][g], q[r] + l * 4 / sizeof(E), keys);
        }
    for (int r = 0; r < ROWS; r++)
        for (int g = 0; g < GROUPS; g++) store(scores + r * TILE + g * W, acc[r][g]);
}

// One row's step of the online softmax: its scores become weights, 0 from `seen` on; returns what earlier sums shrink by.
static inline float softmax_step(float* scores, int seen, float scale, float& max, float& total) {
    for (int j = std::max(seen, 0); j < TILE; j++) scores[j] = -INFINITY;
    if (seen <= 0) {
        std::fill_n(scores, TILE, 0.0f);
        return 1.0f;
    }
    vec top = splat(max), sums = {};
    for (int j = 0; j < TILE; j += W) top = larger(top, load(scores + j) * scale);
    const float now = largest(top), shrink = exp_neg(max - now);
    for (int j = 0; j < TILE; j += W) {
        vec s = load(scores + j), weight = s == -INFINITY ? vec{} : exp_neg(s * scale - now);
        sums += weight;
        store(scores + j, weight);
    }
    max = now;
    total = total * shrink + sum(sums);
    return shrink;
}

// out [ROWS, N · 16] = out · shrink + weights [ROWS, TILE] x the tile's n values, a row of D elements each.
template <int ROWS, int N, typename V>
static inline void add_values(const float* weights, const float* shrink, const V* const* values, const V* const* next, int n,
                              int D, float* out) {
    vec acc[ROWS][N];
    for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < N; i++) acc[r][i] = load(out + (r * N + i) * W) * shrink[r];
    for (int j = 0; j < n; j++) {
        for (int64_t at = 0; next && at < D; at += 64 / sizeof(V)) __builtin_prefetch(next[j] + at);
#pragma GCC unroll 16
        for (int i = 0; i < N; i++) {
            vec v = load(values[j] + i * W, D - i * W);
#pragma GCC unroll 3
            for (int r = 0; r < ROWS; r++) acc[r][i] += v * weights[r * TILE + j];
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < N; i++) store(out + (r * N + i) * W, acc[r][i]);
}

struct Task { int s, g, first, count; };  // `count` tokens from `first` of sequence s, for key/value head g

template <typename E> struct Paged {
    const E *q, *kc, *vc;
    E* y;
    const int32_t *cu, *context_lens, *tables;
    int64_t max_blocks;
    int S, H, G, D, BS;
    float scale;
};

// What one thread keeps while it works, for at most `rows` query rows of N vectors.
template <typename E> struct Scratch {
    std::vector<const E*> q;
    std::vector<float> scores, out, max, total, shrink, values;
    Scratch(int rows, int N)
        : q(rows), scores(rows * TILE), out(rows * N * W), max(rows), total(rows), shrink(rows), values(TILE * N * W) {}
};

template <int N, typename E>
static void attend(const Paged<E>& a, Task task, Scratch<E>& s) {
    constexpr int X = 4 / sizeof(E), ROWS = N <= 4 ? 3 : N <= 8 ? 2 : 1;  // as many accumulators as there are registers
    const int R = a.H / a.G, M = task.count * R, lanes = a.D / X;
    const int64_t stride = 4 * a.BS;
    const int first_position = a.context_lens[task.s] - (a.cu[task.s + 1] - task.first);
    const int length = first_position + task.count;  // keys that the task's last token sees
    auto row = [&](int m) { return ((int64_t)(task.first + m / R) * a.H + task.g * R + m % R) * a.D; };
    for (int m = 0; m < M; m++) s.q[m] = a.q + row(m);
    std::fill_n(s.max.begin(), M, -INFINITY);
    std::fill_n(s.total.begin(), M, 0.0f);
    std::fill_n(s.out.begin(), M * N * W, 0.0f);
    auto find = [&](int start) {
        Tile<E> tile;
        for (int g = 0; g < GROUPS; g++) {
            const int at = start + (start + g * W < length ? g * W : 0), slot = at % a.BS;  // past the end: any keys
            const int64_t base = (a.tables[task.s * a.max_blocks + at / a.BS] * (int64_t)a.G + task.g) * a.D * a.BS;
            tile.groups[g] = (const char*)(a.kc + base + slot * X);
            for (int j = 0; j < W; j++) tile.values[g * W + j] = a.vc + base + (slot + j) * a.D;
        }
        return tile;
    };
    Tile<E> tile = find(0), next;
    for (int start = 0; start < length; start += TILE, tile = next) {
        const int n = std::min(TILE, length - start);
        next = start + TILE < length ? find(start + TILE) : tile;
        by_rows<ROWS>(M, [&](auto rows, int m) {
            score<rows.value>(&s.q[m], tile, m == 0 ? &next : nullptr, stride, lanes, &s.scores[m * TILE]);
        });
        for (int m = 0; m < M; m++) {
            const int seen = std::min(n, first_position + m / R + 1 - start);
            s.shrink[m] = softmax_step(&s.scores[m * TILE], seen, a.scale, s.max[m], s.total[m]);
        }
        if (M <= 2 * ROWS) {
            by_rows<ROWS>(M, [&](auto rows, int m) {
                const E* const* ahead = m == 0 ? next.values : nullptr;
                add_values<rows.value, N>(&s.scores[m * TILE], &s.shrink[m], tile.values, ahead, n, a.D, &s.out[m * N * W]);
            });
        } else {  // many rows: the values are widened once for all of them
            const float *wide[TILE], *const* none = nullptr;
            for (int j = 0; j < n; j++) {
                wide[j] = &s.values[j * N * W];
                for (int d = 0; d < N * W; d += W) store(&s.values[j * N * W + d], load(tile.values[j] + d, a.D - d));
            }
            by_rows<ROWS>(M, [&](auto rows, int m) {
                add_values<rows.value, N>(&s.scores[m * TILE], &s.shrink[m], wide, none, n, N * W, &s.out[m * N * W]);
            });
        }
    }
    for (int m = 0; m < M; m++)
        for (int d = 0; d < a.D; d += W)
            store(a.y + row(m) + d, load(&s.out[m * N * W + d]) / s.total[m], a.D - d);
}

// Causal attention of q [T, H, D] over the paged cache. Sequence s owns tokens cu[s] .. cu[s+1]; they are the last
// ones of its context_lens[s] cached positions, found through tables [S, max_blocks]. D <= 256, BS a multiple of 16.
template <typename E>
static void attention_paged(const Paged<E>& a) {
    const int tokens_a_task = std::max(1, 48 * a.G / a.H), N = (a.D + W - 1) / W;
    std::vector<Task> tasks;
    for (int s = 0; s < a.S; s++)
        for (int t = a.cu[s]; t < a.cu[s + 1]; t += tokens_a_task)
            for (int g = 0; g < a.G; g++) tasks.push_back({s, g, t, std::min(tokens_a_task, a.cu[s + 1] - t)});
    const int rows = tokens_a_task * (a.H / a.G);
#pragma omp parallel
    {
        Scratch<E> scratch(rows, N <= 4 ? N : N <= 8 ? 8 : 16);
#pragma omp for schedule(dynamic, 2)
        for (size_t i = 0; i < tasks.size(); i++) {
            if (N == 1) attend<1>(a, tasks[i], scratch);
            else if (N == 2) attend<2>(a, tasks[i], scratch);
            else if (N == 3) attend<3>(a, tasks[i], scratch);
            else if (N == 4) attend<4>(a, tasks[i], scratch);
            else if (N <= 8) attend<8>(a, tasks[i], scratch);
            else attend<16>(a, tasks[i], scratch);
        }
    }
}

// ---- sampling --------------------------------------------------------------------------------------------------

struct Above { double mass; int64_t count; };

// Mass and number of the probabilities p [V] that are at least t.
static Above above(const float* p, int64_t V, float t) {
    Above found{0, 0};
    for (int64_t start = 0; start < V; start += 4096) {
        vec mass = {};
        ivec count = {};
        for (int64_t i = start; i < std::min(V, start + 4096); i += W) {
            vec v = load(p + i, V - i);
            ivec in = v >= t;
            mass += (vec)((ivec)v & in);
            count -= in;
        }
        found.mass += sum(mass);
        for (int i = 0; i < W; i++) found.count += count[i];
    }
    return found;
}

// Keeps the largest p until `enough(mass, count)` of those kept, ties going to the lower id; zeroes the rest.
// Bisects the threshold, and sorts only what lies between two neighbouring ones.
template <typename F>
static void truncate(float* p, int64_t V, F enough) {
    uint32_t low = 1, high = 0x3f800001;  // bit patterns order as their floats do; enough holds at low, not at high
    auto value = [](uint32_t bits) { float f; std::memcpy(&f, &bits, 4); return f; };
    Above at_high{0, 0}, at_low = above(p, V, value(low));
    if (!enough(at_low.mass, at_low.count)) return;
    while (high - low > 1 && at_low.count - at_high.count > 64) {
        uint32_t middle = low + (high - low) / 2;
        Above found = above(p, V, value(middle));
        if (enough(found.mass, found.count)) low = middle, at_low = found;
        else high = middle, at_high = found;
    }
    std::vector<std::pair<float, int64_t>> between;  // (-p, id): sorted, the most likely and lowest id come first
    for (int64_t i = 0; i < V; i++) {
        if (p[i] >= value(high)) continue;
        if (p[i] >= value(low)) between.push_back({-p[i], i});
        p[i] = 0;
    }
    std::sort(between.begin(), between.end());
    for (auto& [negative, id] : between) {
        if (enough(at_high.mass, at_high.count)) break;
        p[id] = -negative;
        at_high.mass -= negative;
        at_high.count++;
    }
}

static double total(const float* p, int64_t V) { return above(p, V, 0).mass; }

// The first id at which the running sum of p [V] passes `at`.
static int64_t find(const float* p, int64_t V, double at) {
    double passed = 0;
    int64_t last = 0;
    for (int64_t start = 0; start < V; start += 256) {
        int64_t end = std::min(V, start + 256);
        double part = total(p + start, end - start);
        if (part > 0) last = start;
        if (passed + part > at) {
            for (int64_t i = start; i < end; i++)
                if ((passed += p[i]) > at) return i;
        } else {
            passed += part;
        }
    }
    for (int64_t i = std::min(V, last + 256) - 1; i > 0; i--)  // rounding: the last token that is possible at all
        if (p[i] > 0) return i;
    return 0;
}

// p [V] = exp((x - top) / temperature), 0 where x is -infinity; returns the sum.
static double weigh(const float* x, float* p, int64_t V, float top, float temperature) {
    const float inv = 1.0f / temperature;
    for (int64_t i = 0; i < V; i += W) {
        vec v = load(x + i, V - i);
        store(p + i, v == -INFINITY ? vec{} : exp_neg((v - top) * inv), V - i);
    }
    return total(p, V);
}

// One draw a row of logits [B, V]. temperature 0 takes the most likely token. uniform is the row's number in [0, 1).
// logprobs gets the model's own log-probability of the drawn token (before temperature and truncation).
template <typename E>
static void sample(const E* logits, int64_t B, int64_t V, const float* temperature, const int32_t* top_k, const float* top_p,
                   const float* min_p, const double* uniform, int64_t* tokens, float* logprobs) {
#pragma omp parallel
    {
        std::vector<float> x(V), p(V);
#pragma omp for schedule(dynamic, 1)
        for (int64_t b = 0; b < B; b++) {
            const E* row = logits + b * V;
            vec tops = splat(-INFINITY);
            for (int64_t i = 0; i < V; i += W) {
                vec v = load(row + i, V - i);
                store(&x[i], v, V - i);
                if (V - i >= W) tops = larger(tops, v);
                else for (int64_t j = i; j < V; j++) tops[0] = std::max(tops[0], x[j]);
            }
            const float top = largest(tops);
            const double plain = weigh(x.data(), p.data(), V, top, 1.0f);
            int64_t token;
            if (temperature[b] <= 0) {
                token = std::find(x.begin(), x.end(), top) - x.begin();
            } else {
                double mass = temperature[b] == 1.0f ? plain : weigh(x.data(), p.data(), V, top, temperature[b]);
                if (top_k[b] > 0) {
                    truncate(p.data(), V, [&](double, int64_t count) { return count >= top_k[b]; });
                    mass = total(p.data(), V);
                }
                if (top_p[b] < 1) truncate(p.data(), V, [&](double kept, int64_t) { return kept >= top_p[b] * mass; });
                if (min_p[b] > 0)
                    for (int64_t i = 0; i < V; i++) p[i] = p[i] >= min_p[b] ? p[i] : 0;
                token = find(p.data(), V, uniform[b] * total(p.data(), V));
            }
            tokens[b] = std::min(token, V - 1);
            logprobs[b] = float(x[tokens[b]] - top - std::log(plain));
        }
    }
}

// ---- the names that cpu.py calls: one per element type ---------------------------------------------------------

#define EXPORT(E, NAME)                                                                                              \
    extern "C" void rms_norm_##NAME(const E* x, const E* w, E* y, int64_t rows, int64_t cols, float eps) {           \
        rms_norm(x, w, y, rows, cols, eps);                                                                          \
    }                                                                                                                \
    extern "C" void rms_norm_backward_##NAME(const E* dy, const E* x, const E* w, E* dx, int64_t rows, int64_t cols, \
                                             float eps) {                                                            \
        rms_norm_backward(dy, x, w, dx, rows, cols, eps);                                                            \
    }                                                                                                                \
    extern "C" void swiglu_##NAME(const E* gate, const E* up, E* y, int64_t n) { swiglu(gate, up, y, n); }           \
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
        attention_paged<E>({q, kc, vc, y, cu, context_lens, tables, max_blocks, S, H, G, D, BS, scale});             \
    }                                                                                                                \
    extern "C" void sample_##NAME(const E* logits, int64_t B, int64_t V, const float* temperature,                   \
                                  const int32_t* top_k, const float* top_p, const float* min_p,                      \
                                  const double* uniform, int64_t* tokens, float* logprobs) {                         \
        sample(logits, B, V, temperature, top_k, top_p, min_p, uniform, tokens, logprobs);                           \
    }

EXPORT(float, f32)
EXPORT(bf16, bf16)
