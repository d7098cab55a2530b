// Vectors of numbers that a compiler maps to any processor's registers, and functions on them.
//
// No fast-math anywhere: NaN and inf pass through, and sums have a fixed order.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

template <class T, int W>
struct Vector {
    typedef T type __attribute__((vector_size(W * sizeof(T)), aligned(sizeof(T))));
};
template <class T, int W>
using Vec = typename Vector<T, W>::type;

template <class T>
struct Number;
template <>
struct Number<float> {
    typedef int32_t integer;
    static constexpr int lanes = 16, mantissa = 23, bias = 127, degree = 7;
    static constexpr float magic = 12582912.0f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f, largest = 87.0f,
                           nothing = 1e-12f;  // beside 1, far below what rounding leaves
};
template <>
struct Number<double> {
    typedef int64_t integer;
    static constexpr int lanes = 8, mantissa = 52, bias = 1023, degree = 13;
    static constexpr double magic = 6755399441055744.0, ln2_high = 6.93147180369123816490e-01,
                            ln2_low = 1.90821492927058770002e-10, largest = 708.0,
                            nothing = 1e-24;
};

template <class T, int W>
inline Vec<T, W> load(const T* p) {
    return *reinterpret_cast<const Vec<T, W>*>(p);
}
template <class T, int W>
inline void store(T* p, Vec<T, W> v) {
    *reinterpret_cast<Vec<T, W>*>(p) = v;
}
template <class T, int W>
inline void add(T* p, Vec<T, W> v) {
    *reinterpret_cast<Vec<T, W>*>(p) += v;
}

template <class T, int W>
inline T sum(Vec<T, W> v) {
    if constexpr (W == 1) {
        return v[0];
    } else {
        Vec<T, W / 2> low, high;
        std::memcpy(&low, &v, sizeof(low));
        std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(low), sizeof(high));
        return sum<T, W / 2>(low + high);
    }
}

// exp by reduction to [-ln2/2, ln2/2] and a Taylor series whose rest is below rounding, any lane width. Beyond +-largest
// it saturates; NaN stays NaN.
template <class T, int W>
inline Vec<T, W> exponential(Vec<T, W> x) {
    typedef Number<T> I;
    typedef typename I::integer Int;
    typedef Int Ints __attribute__((vector_size(W * sizeof(Int)), aligned(sizeof(Int))));
    const Vec<T, W> high = Vec<T, W>{} + I::largest, low = Vec<T, W>{} - I::largest;
    x = x > high ? high : x;
    x = x < low ? low : x;
    const Vec<T, W> shifted = x * T(1.4426950408889634) + I::magic;
    const Vec<T, W> whole = shifted - I::magic;
    const Vec<T, W> r = (x - whole * I::ln2_high) - whole * I::ln2_low;
    Vec<T, W> series = Vec<T, W>{} + T(1);
#pragma GCC unroll 16
    for (int k = I::degree; k >= 1; --k) series = series * r * (T(1) / T(k)) + T(1);
    Ints bits;
    std::memcpy(&bits, &shifted, sizeof(bits));
    bits = (bits + I::bias) << I::mantissa;
    Vec<T, W> power;
    std::memcpy(&power, &bits, sizeof(power));
    return series * power;
}

template <class T, int W>
inline Vec<T, W> sigmoid(Vec<T, W> x) {
    return T(1) / (T(1) + exponential<T, W>(-x));
}

#if defined(__AVX512F__)
template <>
inline float sum<float, 16>(Vec<float, 16> v) {
    return _mm512_reduce_add_ps(reinterpret_cast<__m512&>(v));
}

// The same with instructions that C++ has no word for: scaling by 2^n saturates by itself.
template <>
inline Vec<float, 16> sigmoid<float, 16>(Vec<float, 16> argument) {
    // exp(-x) = 2^n 2^r with r in [-1/2, 1/2]; the polynomial is the one of degree 6 with the least relative error, 2e-9
    const __m512 x = reinterpret_cast<__m512&>(argument), scale = _mm512_set1_ps(-1.44269504f);
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, scale), 0), r = _mm512_fmsub_ps(x, scale, n);
    const float coefficients[] = {1.534581216e-4f, 1.339993121e-3f, 9.618488957e-3f, 5.550328777e-2f,
                                  2.402264689e-1f, 6.931472057e-1f, 1.0f};
    __m512 series = _mm512_set1_ps(coefficients[0]);
#pragma GCC unroll 8
    for (int k = 1; k < 7; ++k) series = _mm512_fmadd_ps(series, r, _mm512_set1_ps(coefficients[k]));
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 result = _mm512_div_ps(one, _mm512_add_ps(one, _mm512_scalef_ps(series, n)));
    return reinterpret_cast<const Vec<float, 16>&>(result);
}
#endif

// out[i] = sum of row i of (n, W), for n a multiple of 16: a square of rows is halved until one row of sums is left.
template <class T, int W>
inline void sums(int64_t n, const T* rows, T* out) {
    constexpr int L = Number<T>::lanes;
#if !defined(__clang__)  // has no shuffle by a vector
    if constexpr (W == L) {
        typedef typename Number<T>::integer Int;
        typedef Int Ints __attribute__((vector_size(L * sizeof(Int))));
        for (int64_t i = 0; i < n; i += L) {
            Vec<T, L> row[L];
            for (int r = 0; r < L; ++r) row[r] = load<T, L>(rows + (i + r) * L);
#pragma GCC unroll 4
            for (int s = L / 2; s > 0; s /= 2) {
                Ints low, high;
                for (int j = 0; j < L; ++j) {
                    low[j] = j & s ? L + j - s : j;
                    high[j] = j & s ? L + j : j + s;
                }
#pragma GCC unroll 8
                for (int r = 0; r < s; ++r)
                    row[r] = __builtin_shuffle(row[r], row[r + s], low) + __builtin_shuffle(row[r], row[r + s], high);
            }
            store<T, L>(out + i, row[0]);
        }
        return;
    }
#endif
    for (int64_t i = 0; i < n; ++i) out[i] = sum<T, W>(load<T, W>(rows + i * W));
}

// silu(x) and as many of its derivatives as are asked for.
template <class T, int W, int ORDER>
inline void silu(Vec<T, W> x, Vec<T, W>& s0, Vec<T, W>& s1, Vec<T, W>& s2) {
    const Vec<T, W> s = sigmoid<T, W>(x);
    s0 = x * s;
    if (ORDER == 0) return;
    const Vec<T, W> rest = T(1) - s;
    if (ORDER == 1) {
        s1 = s + s0 * rest;
    } else {
        const Vec<T, W> slope = s * rest, bent = x * slope;
        s1 = s + bent;
        s2 = bent * (rest - s) + (slope + slope);
    }
}

inline int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

// Who takes memory from `scratch_memory`: one call lends to several, one inside the other.
enum Use { PASSES, PAIRS, PARTS, PANEL };

// Memory of a thread that the next call takes again; it is not handed back to the system in between. It begins at a cache
// line: a vector that lies in two costs two accesses.
template <class T, Use USE>
T* scratch_memory(int64_t size) {
    static thread_local std::vector<T> memory;
    constexpr int64_t line = 64;
    size += line / sizeof(T);
    if (int64_t(memory.size()) < size) memory.resize(size);
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory.data()) + line - 1) / line * line);
}

template <class X>
X* zeroed(X* p, int64_t size) {
    std::memset(static_cast<void*>(p), 0, size * sizeof(X));
    return p;
}

// CALL with a constant number W of lanes that one operation works on; `width` is a power of two that divides what is
// worked on, and wider is faster.
#define LANES(T, CALL)                                                            \
    if (width >= Number<T>::lanes) {                                              \
        constexpr int W = Number<T>::lanes;                                       \
        CALL;                                                                     \
    } else if (width >= 4) {                                                      \
        constexpr int W = 4;                                                      \
        CALL;                                                                     \
    } else {                                                                      \
        constexpr int W = 1;                                                      \
        CALL;                                                                     \
    }

}  // namespace
