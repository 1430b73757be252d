// Sixteen lanes at a time, and what both kernel files share.
//
// gcc's vector extension, which the compiler maps to AVX-512, AVX2 or NEON; where AVX512-BF16 has one instruction for what
// that takes five, it is named, beside its plain twin.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

constexpr int W = 16;
typedef float vec __attribute__((vector_size(64)));
typedef int32_t ivec __attribute__((vector_size(64)));
typedef uint32_t uvec __attribute__((vector_size(64)));
typedef uint16_t hvec __attribute__((vector_size(32)));
struct bf16 { uint16_t bits; };

static inline vec splat(float x) { return x - vec{}; }
static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) {
    uint32_t u = uint32_t(x.bits) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
static inline vec load(const float* p) {
    vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
static inline vec load(const bf16* p) {
    hvec h;
    std::memcpy(&h, p, sizeof h);
    return (vec)(__builtin_convertvector(h, uvec) << 16);
}
static inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }
static inline hvec round_bf16(vec v) {  // to nearest even, as torch does
#ifdef __AVX512BF16__
    return (hvec)_mm512_cvtneps_pbh((__m512)v);
#else
    uvec u = (uvec)v;
    return __builtin_convertvector((u + 0x7fff + ((u >> 16) & 1)) >> 16, hvec);
#endif
}
static inline void store(bf16* p, vec v) {
    hvec h = round_bf16(v);
    std::memcpy(p, &h, sizeof h);
}
// The last n < 16 elements of a row, or none; the other lanes read as zero.
template <typename E> static inline vec load(const E* p, int64_t n) {
    if (__builtin_expect(n >= W, 1)) return load(p);
    E buffer[W] = {};
    if (n > 0) std::memcpy(buffer, p, n * sizeof(E));
    return load(buffer);
}
template <typename E> static inline void store(E* p, vec v, int64_t n) {
    if (n >= W) return store(p, v);
    E buffer[W];
    store(buffer, v);
    if (n > 0) std::memcpy(p, buffer, n * sizeof(E));
}
// What a value is once it is stored as E.
static inline vec as_stored(vec v, const float*) { return v; }
static inline vec as_stored(vec v, const bf16*) { return (vec)(__builtin_convertvector(round_bf16(v), uvec) << 16); }

typedef float vec8 __attribute__((vector_size(32)));
typedef float vec4 __attribute__((vector_size(16)));
static inline float sum(vec v) {  // by halves: far fewer steps than lane after lane
    vec8 a[2];
    std::memcpy(a, &v, sizeof a);
    a[0] += a[1];
    vec4 b[2];
    std::memcpy(b, a, sizeof b);
    b[0] += b[1];
    return (b[0][0] + b[0][2]) + (b[0][1] + b[0][3]);
}
static inline vec larger(vec a, vec b) { return a > b ? a : b; }
static inline float largest(vec v) {
    float m = v[0];
    for (int i = 1; i < W; i++) m = std::max(m, v[i]);
    return m;
}

// exp for x <= 0 to 2 ulp; below -87 it is 1e-38.
static inline vec exp_neg(vec x) {
    x = larger(x, splat(-87.0f));
    ivec n = __builtin_convertvector(x * 1.44269504f - 0.5f, ivec);  // truncation: the nearest, since x <= 0
    vec whole = __builtin_convertvector(n, vec);
    vec r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (vec)((n + 127) << 23);
}
static inline float exp_neg(float x) { return exp_neg(splat(x))[0]; }

static inline vec sigmoid(vec g) {
    vec e = exp_neg(g < 0 ? g : -g);
    return (g < 0 ? e : splat(1.0f)) / (e + 1.0f);
}

// Calls f(k, n) at each vector of a row of K elements: n is 16 at compile time, but what is left at the last one.
template <typename F> static inline void each_vector(int64_t K, F f) {
    int64_t k = 0;
    for (; k + W <= K; k += W) f(k, std::integral_constant<int64_t, W>());
    if (k < K) f(k, K - k);
}

// acc + the products of one 4-byte lane of a row (one fp32 number, or two of bf16) with sixteen columns' lanes.
static inline vec add_lane(vec acc, const float* row, uvec columns) { return acc + (vec)columns * row[0]; }
static inline vec add_lane(vec acc, const bf16* row, uvec columns) {
#ifdef __AVX512BF16__
    int32_t pair;
    std::memcpy(&pair, row, sizeof pair);
    return (vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)columns);
#else
    return acc + (vec)(columns << 16) * to_float(row[0]) + (vec)(columns & 0xffff0000u) * to_float(row[1]);
#endif
}

constexpr int64_t SMALL = 16384;  // elements below which a second thread costs more than it does

// Calls f.template operator()<ROWS>(m) over all M rows, a block at a time.
template <int ROWS, typename F> static inline void by_rows(int M, F f) {
    int m = 0;
    for (; m + ROWS <= M; m += ROWS) f(std::integral_constant<int, ROWS>(), m);
    for (; m < M; m++) f(std::integral_constant<int, 1>(), m);
}
