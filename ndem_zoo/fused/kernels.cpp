// Kernels of the fused execution plan of the Equivariant Transformer (see plan.py for the mathematics of a whole pass).
//
// Every function exists for float and double and is called from native.py through its plain C name. All arrays are
// dense and row-major; N atoms, P pairs, C channels, H heads, D = C / H, K radial functions. A pair {i, j} is visited
// once and serves both directions; filters depend on the distance alone and are therefore shared. Row P of the
// filters is that of the self-pair (distance 0). Four passes share their names:
//   forward   values                      backward  adjoints of a scalar (its derivative by every value)
//   tangent   derivative of all values along a displacement of the atoms
//   reverse   adjoints of (scalar + derivative of a second scalar along that displacement); the adjoints of the
//             tangents are those that `backward` found for the second scalar.
// Suffixes: _t tangent of a value, g_ adjoint in `backward`, m_ adjoint in `reverse`.
// No fast-math: NaN and inf pass through, sums have a fixed order, and results do not depend on the number of threads.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

// ------------------------------------------------------------------------------------------------ vectors of numbers

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
    static constexpr float magic = 12582912.0f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f, largest = 87.0f;
};
template <>
struct Number<double> {
    typedef int64_t integer;
    static constexpr int lanes = 8, mantissa = 52, bias = 1023, degree = 13;
    static constexpr double magic = 6755399441055744.0, ln2_high = 6.93147180369123816490e-01,
                            ln2_low = 1.90821492927058770002e-10, largest = 708.0;
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

// exp by reduction to [-ln2/2, ln2/2] and a Taylor series: 2 units in the last place, any lane width. Beyond +-largest
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
// The same with instructions that C++ has no word for: scaling by 2^n saturates by itself, and an approximate
// reciprocal with one Newton step takes half the time of a division.
template <>
inline Vec<float, 16> sigmoid<float, 16>(Vec<float, 16> argument) {
    typedef Number<float> I;
    const __m512 x = _mm512_sub_ps(_mm512_setzero_ps(), reinterpret_cast<__m512&>(argument));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(I::ln2_high), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(I::ln2_low), r);
    const float inverse_factorials[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    __m512 series = _mm512_set1_ps(1.0f / 5040);
#pragma GCC unroll 8
    for (int k = 0; k < 7; ++k) series = _mm512_fmadd_ps(series, r, _mm512_set1_ps(inverse_factorials[k]));
    const __m512 one = _mm512_set1_ps(1.0f), whole = _mm512_add_ps(one, _mm512_scalef_ps(series, n));
    const __m512 guess = _mm512_rcp14_ps(whole);
    // guess + guess (1 - whole guess); where `whole` is infinite the bracket is not a number, and the guess is 0
    const __m512 rest = _mm512_fnmadd_ps(whole, guess, one);
    const __mmask16 finite = _mm512_cmp_ps_mask(guess, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    __m512 result = _mm512_mask_fmadd_ps(guess, finite, rest, guess);
    return reinterpret_cast<Vec<float, 16>&>(result);
}
#endif

// ------------------------------------------------------------------------------------------------------------ threads

// Contiguous ranges of pairs and atoms that share no atom with one another: whole molecules. One range is one task.
struct Ranges {
    int64_t n;
    const int64_t* pair;  // (n + 1,)
    const int64_t* atom;  // (n + 1,)
};

// ------------------------------------------------------------------------------------------------------ matrix products

// Of the sizes that occur here a general library reaches half to three quarters of what the processor can do, and MKL on
// AMD's a third; it also allocates its result. One block of MR rows and NV vectors stays in registers.
#if defined(__AVX512F__)
constexpr int MR = 6, NV = 4;
#else
constexpr int MR = 6, NV = 1;
#endif
constexpr int64_t KC = 256;  // rows of `b` in one packed panel: it has to stay in the second-level cache

template <class T>
struct Product {  // c (m, n) = [c +] a b [+ bias]; a (m, k) of any strides, b (k, n) and c with contiguous rows
    int64_t m, n, k;
    const T *a, *b, *bias;
    int64_t a_row, a_column, b_row, c_row;
    T* c;
    bool accumulate;
};

template <class T, int R, int V>
inline void product_block(int64_t depth, const T* a, int64_t a_row, int64_t a_column, const T* panel, T* c,
                          int64_t c_row, const T* start, int64_t start_row) {
    constexpr int L = Number<T>::lanes;
    typedef Vec<T, L> X;
    X sums[R][V];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) sums[r][v] = start ? load<T, L>(start + r * start_row + v * L) : X{};
    for (int64_t d = 0; d < depth; ++d) {
        X row[V];
        for (int v = 0; v < V; ++v) row[v] = load<T, L>(panel + (d * V + v) * L);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const T factor = a[r * a_row + d * a_column];
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) sums[r][v] += row[v] * factor;
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) store<T, L>(c + r * c_row + v * L, sums[r][v]);
}

template <class T, int V>
void product_panel(const Product<T>& p, int64_t k0, int64_t depth, int64_t n0, int64_t width, int64_t m0, int64_t m1,
                   const T* panel) {
    constexpr int L = Number<T>::lanes;
    const bool whole = width == V * L;
    T edge[MR * V * L], edge_start[MR * V * L];
    for (int64_t m = m0; m < m1; m += MR) {
        const int rows = int(m1 - m < MR ? m1 - m : MR);
        const T* a = p.a + m * p.a_row + k0 * p.a_column;
        T* c = p.c + m * p.c_row + n0;
        const T* start = k0 > 0 || p.accumulate ? c : p.bias ? p.bias + n0 : nullptr;
        int64_t start_row = start == c ? p.c_row : 0, c_row = p.c_row;
        if (!whole) {
            if (start) {
                for (int r = 0; r < rows; ++r)
                    std::memcpy(edge_start + r * V * L, start + r * start_row, width * sizeof(T));
                start = edge_start;
                start_row = V * L;
            }
            c = edge;
            c_row = V * L;
        }
        switch (rows) {
            case 6: product_block<T, 6, V>(depth, a, p.a_row, p.a_column, panel, c, c_row, start, start_row); break;
            case 5: product_block<T, 5, V>(depth, a, p.a_row, p.a_column, panel, c, c_row, start, start_row); break;
            case 4: product_block<T, 4, V>(depth, a, p.a_row, p.a_column, panel, c, c_row, start, start_row); break;
            case 3: product_block<T, 3, V>(depth, a, p.a_row, p.a_column, panel, c, c_row, start, start_row); break;
            case 2: product_block<T, 2, V>(depth, a, p.a_row, p.a_column, panel, c, c_row, start, start_row); break;
            default: product_block<T, 1, V>(depth, a, p.a_row, p.a_column, panel, c, c_row, start, start_row);
        }
        if (!whole)
            for (int r = 0; r < rows; ++r)
                std::memcpy(p.c + (m + r) * p.c_row + n0, edge + r * V * L, width * sizeof(T));
    }
}

template <class T>
void product_rows(const Product<T>& p, int64_t m0, int64_t m1) {
    constexpr int L = Number<T>::lanes;
    std::vector<T> panel(KC * NV * L);
    for (int64_t k0 = 0; k0 < p.k; k0 += KC) {
        const int64_t depth = p.k - k0 < KC ? p.k - k0 : KC;
        for (int64_t n0 = 0; n0 < p.n; n0 += NV * L) {
            const int64_t width = p.n - n0 < NV * L ? p.n - n0 : NV * L, vectors = (width + L - 1) / L;
            for (int64_t d = 0; d < depth; ++d) {
                T* row = panel.data() + d * vectors * L;
                std::memcpy(row, p.b + (k0 + d) * p.b_row + n0, width * sizeof(T));
                for (int64_t n = width; n < vectors * L; ++n) row[n] = 0;
            }
            switch (vectors) {
#if defined(__AVX512F__)
                case 4: product_panel<T, 4>(p, k0, depth, n0, width, m0, m1, panel.data()); break;
                case 3: product_panel<T, 3>(p, k0, depth, n0, width, m0, m1, panel.data()); break;
                case 2: product_panel<T, 2>(p, k0, depth, n0, width, m0, m1, panel.data()); break;
#endif
                default: product_panel<T, 1>(p, k0, depth, n0, width, m0, m1, panel.data());
            }
        }
    }
}

template <class T>
void product(const Product<T>& p, int64_t threads) {
    if (p.k == 0) {
        for (int64_t m = 0; m < p.m && !p.accumulate; ++m)
            for (int64_t n = 0; n < p.n; ++n) p.c[m * p.c_row + n] = p.bias ? p.bias[n] : T(0);
        return;
    }
    // Rows are dealt out in whole blocks: every number is summed in the same order whatever the number of threads.
    const int64_t blocks = (p.m + MR - 1) / MR;
    if (threads > blocks) threads = blocks;
    if (threads <= 1 || p.m * p.n * p.k < 1000000) return product_rows(p, 0, p.m);
#pragma omp parallel for schedule(static, 1)
    for (int64_t t = 0; t < threads; ++t) {
        const int64_t first = blocks * t / threads * MR, last = blocks * (t + 1) / threads * MR;
        product_rows(p, first, last < p.m ? last : p.m);
    }
}

template <class T>
void column_sum(int64_t m, int64_t n, const T* values, T* out) {
    std::memset(out, 0, n * sizeof(T));
    for (int64_t i = 0; i < m; ++i)
        for (int64_t c = 0; c < n; ++c) out[c] += values[i * n + c];
}

// ------------------------------------------------------------------------------------------------- pairs of one layer

// Geometry of a pair: distance, unit vector from center i to neighbor j, cutoff functions of scalars and vectors.
template <class T>
struct Geometry {
    T r, unit[3], phi, phi_r, vphi, vphi_r;
};
// Derivative along a displacement, or adjoints, of distance and unit vector.
template <class T>
struct Change {
    T r, unit[3];
};

struct Sizes {
    int64_t n, p, channels, heads;
    bool has_vec;
};

// silu(x) and as many of its derivatives as are asked for.
template <class T, int W, int ORDER>
inline void silu(Vec<T, W> x, Vec<T, W>& s0, Vec<T, W>& s1, Vec<T, W>& s2) {
    const Vec<T, W> s = sigmoid<T, W>(x);
    s0 = x * s;
    if (ORDER >= 1) s1 = s + s0 * (T(1) - s);
    if (ORDER >= 2) s2 = s * (T(1) - s) * (T(2) + x * (T(1) - T(2) * s));
}

// One row of numbers per atom in the layouts of the layer: [q | k | v], v by head, then part, then channel.
template <class T>
struct Row {
    T *q, *k, *v;
    Row(T* y, int64_t atom, int64_t c) : q(y + atom * 5 * c), k(q + c), v(q + 2 * c) {}
};

template <class T>
struct Scratch {
    std::vector<T> data;
    int64_t used = 0;
    explicit Scratch(int64_t size) : data(size, T(0)) {}
    T* take(int64_t size) {
        T* p = data.data() + used;
        used += size;
        return p;
    }
};

inline int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

template <class T, int W, int CC, int HH>
void pair_forward(const Sizes s, const Ranges ranges, const int32_t* first, const int32_t* second,
                  const Geometry<T>* geometry, const T* bias, const T* pre, const T* y, const T* vec, T* score,
                  T* score_self, T* x_out, T* v_out) {
    typedef Vec<T, W> V;
    const int64_t C = CC ? CC : s.channels, H = HH ? HH : s.heads, D = C / H, H2 = padded(2 * H);
    constexpr int L = Number<T>::lanes;
#pragma omp parallel for schedule(dynamic, 1) if (ranges.n > 1)
    for (int64_t t = 0; t < ranges.n; ++t) {
        Scratch<T> scratch(4 * C + 2 * H2);
        T *d = scratch.take(4 * C), *a = scratch.take(H2), *A = scratch.take(H2);
        const int64_t a0 = ranges.atom[t], a1 = ranges.atom[t + 1];
        std::memset(x_out + a0 * C, 0, (a1 - a0) * C * sizeof(T));
        std::memset(v_out + a0 * 3 * C, 0, (a1 - a0) * 3 * C * sizeof(T));
        const auto filters = [&](int64_t row) {
            for (int64_t c = 0; c < 4 * C; c += W) {
                const V x = load<T, W>(pre + row * 4 * C + c) + load<T, W>(bias + c);
                store<T, W>(d + c, x * sigmoid<T, W>(x));
            }
        };
        const auto attention = [&](int64_t n, T phi) {
            for (int64_t h = 0; h < n; h += L) {
                const Vec<T, L> x = load<T, L>(a + h);
                store<T, L>(A + h, x * sigmoid<T, L>(x) * phi);
            }
        };
        for (int64_t p = ranges.pair[t]; p < ranges.pair[t + 1]; ++p) {
            const Geometry<T>& g = geometry[p];
            const int64_t i = first[p], j = second[p];
            const Row<const T> ri(y, i, C), rj(y, j, C);
            filters(p);
            for (int64_t h = 0; h < H; ++h) {
                V ij = {}, ji = {};
                for (int64_t c = h * D; c < h * D + D; c += W) {
                    const V f = load<T, W>(d + c);
                    ij += load<T, W>(ri.q + c) * load<T, W>(rj.k + c) * f;
                    ji += load<T, W>(rj.q + c) * load<T, W>(ri.k + c) * f;
                }
                a[h] = sum<T, W>(ij);
                a[H + h] = sum<T, W>(ji);
            }
            std::memcpy(score + p * 2 * H, a, 2 * H * sizeof(T));
            attention(2 * H, g.phi);
            T *xi = x_out + i * C, *xj = x_out + j * C, *vi = v_out + i * 3 * C, *vj = v_out + j * 3 * C;
            const T *wi = vec + i * 3 * C, *wj = vec + j * 3 * C;
            for (int64_t h = 0; h < H; ++h) {
                const T *d1 = d + C + 3 * h * D, *d2 = d1 + D, *d3 = d2 + D;
                const T *ui = ri.v + 3 * h * D, *uj = rj.v + 3 * h * D;
                for (int64_t e = 0; e < D; e += W) {
                    const int64_t c = h * D + e;
                    const V f1 = load<T, W>(d1 + e);
                    add<T, W>(xi + c, load<T, W>(uj + e) * f1 * A[h]);
                    add<T, W>(xj + c, load<T, W>(ui + e) * f1 * A[H + h]);
                    const V f3 = load<T, W>(d3 + e) * g.vphi;
                    const V eij = load<T, W>(uj + 2 * D + e) * f3, eji = load<T, W>(ui + 2 * D + e) * f3;
                    if (s.has_vec) {
                        const V f2 = load<T, W>(d2 + e) * g.vphi;
                        const V nij = load<T, W>(uj + D + e) * f2, nji = load<T, W>(ui + D + e) * f2;
                        for (int k = 0; k < 3; ++k) {
                            add<T, W>(vi + k * C + c, load<T, W>(wj + k * C + c) * nij + eij * g.unit[k]);
                            add<T, W>(vj + k * C + c, load<T, W>(wi + k * C + c) * nji - eji * g.unit[k]);
                        }
                    } else {
                        for (int k = 0; k < 3; ++k) {
                            add<T, W>(vi + k * C + c, eij * g.unit[k]);
                            add<T, W>(vj + k * C + c, -(eji * g.unit[k]));
                        }
                    }
                }
            }
        }
        filters(s.p);
        for (int64_t i = a0; i < a1; ++i) {  // the atom itself: distance 0, cutoff function 1, no direction
            const Row<const T> r(y, i, C);
            for (int64_t h = 0; h < H; ++h) {
                V own = {};
                for (int64_t c = h * D; c < h * D + D; c += W)
                    own += load<T, W>(r.q + c) * load<T, W>(r.k + c) * load<T, W>(d + c);
                a[h] = sum<T, W>(own);
            }
            std::memcpy(score_self + i * H, a, H * sizeof(T));
            attention(H, T(1));
            for (int64_t h = 0; h < H; ++h)
                for (int64_t e = 0; e < D; e += W) {
                    const int64_t c = h * D + e, part = 3 * h * D + e;
                    add<T, W>(x_out + i * C + c, load<T, W>(r.v + part) * load<T, W>(d + C + part) * A[h]);
                    if (s.has_vec) {
                        const V n = load<T, W>(r.v + part + D) * load<T, W>(d + C + part + D);
                        for (int k = 0; k < 3; ++k)
                            add<T, W>(v_out + (3 * i + k) * C + c, load<T, W>(vec + (3 * i + k) * C + c) * n);
                    }
                }
        }
    }
}

// Adjoints of q, k, v, vec; with GEOMETRY also of distance and unit vector (added to `g_change`), with FILTERS also of
// the filters before their activation.
template <class T, int W, int CC, int HH, bool GEOMETRY, bool FILTERS>
void pair_backward(const Sizes s, const Ranges ranges, const int32_t* first, const int32_t* second,
                   const Geometry<T>* geometry, const T* bias, const T* pre, const T* pre_r, const T* y, const T* vec,
                   const T* score, const T* score_self, const T* g_x, const T* g_v, T* g_y, T* g_vec,
                   Change<T>* g_change, T* g_pre) {
    typedef Vec<T, W> V;
    const int64_t C = CC ? CC : s.channels, H = HH ? HH : s.heads, D = C / H, H2 = padded(2 * H);
    constexpr int L = Number<T>::lanes;
    std::vector<T> self(FILTERS ? ranges.n * 4 * C : 0, T(0));
#pragma omp parallel for schedule(dynamic, 1) if (ranges.n > 1)
    for (int64_t t = 0; t < ranges.n; ++t) {
        Scratch<T> scratch(12 * C + 4 * H2);
        T *d = scratch.take(4 * C), *s1 = scratch.take(4 * C), *gd = scratch.take(4 * C);
        T *gA = scratch.take(H2), *A = scratch.take(H2), *ga = scratch.take(H2), *act = scratch.take(H2);
        const int64_t a0 = ranges.atom[t], a1 = ranges.atom[t + 1];
        std::memset(g_y + a0 * 5 * C, 0, (a1 - a0) * 5 * C * sizeof(T));
        const auto filters = [&](int64_t row) {
            for (int64_t c = 0; c < 4 * C; c += W) {
                V v0, v1, unused;
                silu<T, W, 1>(load<T, W>(pre + row * 4 * C + c) + load<T, W>(bias + c), v0, v1, unused);
                store<T, W>(d + c, v0);
                store<T, W>(s1 + c, v1);
            }
        };
        const auto attention = [&](const T* a, int64_t n, T phi) {  // A, ga and silu(a) of each head
            std::memcpy(A, a, n * sizeof(T));
            for (int64_t h = 0; h < n; h += L) {
                Vec<T, L> v0, v1, unused;
                silu<T, L, 1>(load<T, L>(A + h), v0, v1, unused);
                store<T, L>(act + h, v0);
                store<T, L>(A + h, v0 * phi);
                store<T, L>(ga + h, load<T, L>(gA + h) * v1 * phi);
            }
        };
        for (int64_t p = ranges.pair[t]; p < ranges.pair[t + 1]; ++p) {
            const Geometry<T>& g = geometry[p];
            const int64_t atoms[2] = {first[p], second[p]};
            filters(p);
            for (int dir = 0; dir < 2; ++dir) {
                const T* v1 = Row<const T>(y, atoms[1 - dir], C).v;
                const T* gx = g_x + atoms[dir] * C;
                for (int64_t h = 0; h < H; ++h) {
                    V own = {};
                    for (int64_t e = 0; e < D; e += W)
                        own += load<T, W>(gx + h * D + e) * load<T, W>(v1 + 3 * h * D + e) *
                               load<T, W>(d + C + 3 * h * D + e);
                    gA[dir * H + h] = sum<T, W>(own);
                }
            }
            attention(score + p * 2 * H, 2 * H, g.phi);
            V g_vphi = {}, g_unit[3] = {{}, {}, {}};
            for (int dir = 0; dir < 2; ++dir) {
                const int64_t i = atoms[dir], j = atoms[1 - dir];
                const T sign = dir ? T(-1) : T(1);
                const T unit[3] = {sign * g.unit[0], sign * g.unit[1], sign * g.unit[2]};
                const Row<const T> ri(y, i, C), rj(y, j, C);
                const Row<T> gi(g_y, i, C), gj(g_y, j, C);
                const T *gx = g_x + i * C, *gv = g_v + i * 3 * C, *wj = vec + j * 3 * C;
                T* gw = g_vec + j * 3 * C;
                for (int64_t h = 0; h < H; ++h) {
                    const T Ah = A[dir * H + h], gah = ga[dir * H + h];
                    for (int64_t e = 0; e < D; e += W) {
                        const int64_t c = h * D + e, part = 3 * h * D + e;
                        const V q = load<T, W>(ri.q + c), k = load<T, W>(rj.k + c), fk = load<T, W>(d + c);
                        const V gfk = gah * q * k;
                        add<T, W>(gi.q + c, gah * k * fk);
                        add<T, W>(gj.k + c, gah * q * fk);
                        const V f1 = load<T, W>(d + C + part), gm = Ah * load<T, W>(gx + c);
                        const V gf1 = gm * load<T, W>(rj.v + part);
                        add<T, W>(gj.v + part, gm * f1);
                        const V gv0 = load<T, W>(gv + c), gv1 = load<T, W>(gv + C + c), gv2 = load<T, W>(gv + 2 * C + c);
                        const V v3 = load<T, W>(rj.v + part + 2 * D), f3 = load<T, W>(d + C + part + 2 * D);
                        const V along = gv0 * unit[0] + gv1 * unit[1] + gv2 * unit[2];
                        const V g3 = along * g.vphi, gf3 = g3 * v3;
                        add<T, W>(gj.v + part + 2 * D, g3 * f3);
                        const V v3f3 = v3 * f3;
                        if (GEOMETRY) {
                            const V n3 = v3f3 * (sign * g.vphi);
                            g_vphi += along * v3f3;
                            g_unit[0] += gv0 * n3;
                            g_unit[1] += gv1 * n3;
                            g_unit[2] += gv2 * n3;
                        }
                        V gf2 = {};
                        if (s.has_vec) {
                            const V v2 = load<T, W>(rj.v + part + D), f2 = load<T, W>(d + C + part + D);
                            const V w = gv0 * load<T, W>(wj + c) + gv1 * load<T, W>(wj + C + c) +
                                        gv2 * load<T, W>(wj + 2 * C + c);
                            const V g2 = w * g.vphi, n2 = v2 * f2 * g.vphi;
                            gf2 = g2 * v2;
                            add<T, W>(gj.v + part + D, g2 * f2);
                            add<T, W>(gw + c, gv0 * n2);
                            add<T, W>(gw + C + c, gv1 * n2);
                            add<T, W>(gw + 2 * C + c, gv2 * n2);
                            if (GEOMETRY) g_vphi += w * v2 * f2;
                        }
                        if (dir == 0) {
                            store<T, W>(gd + c, gfk);
                            store<T, W>(gd + C + part, gf1);
                            store<T, W>(gd + C + part + D, gf2);
                            store<T, W>(gd + C + part + 2 * D, gf3);
                        } else {
                            add<T, W>(gd + c, gfk);
                            add<T, W>(gd + C + part, gf1);
                            if (s.has_vec) add<T, W>(gd + C + part + D, gf2);
                            add<T, W>(gd + C + part + 2 * D, gf3);
                        }
                    }
                }
            }
            if (GEOMETRY) {
                V g_r = {};
                for (int64_t c = 0; c < 4 * C; c += W)
                    g_r += load<T, W>(gd + c) * load<T, W>(s1 + c) * load<T, W>(pre_r + p * 4 * C + c);
                T g_phi = 0;
                for (int64_t h = 0; h < 2 * H; ++h) g_phi += gA[h] * act[h];
                g_change[p].r += sum<T, W>(g_r) + g_phi * g.phi_r + sum<T, W>(g_vphi) * g.vphi_r;
                for (int k = 0; k < 3; ++k) g_change[p].unit[k] += sum<T, W>(g_unit[k]);
            }
            if (FILTERS)
                for (int64_t c = 0; c < 4 * C; c += W)
                    store<T, W>(g_pre + p * 4 * C + c, load<T, W>(gd + c) * load<T, W>(s1 + c));
        }
        filters(s.p);
        T* own_gd = FILTERS ? self.data() + t * 4 * C : nullptr;
        for (int64_t i = a0; i < a1; ++i) {
            const Row<const T> r(y, i, C);
            const Row<T> gi(g_y, i, C);
            const T *gx = g_x + i * C, *gv = g_v + i * 3 * C, *w = vec + i * 3 * C;
            for (int64_t h = 0; h < H; ++h) {
                V own = {};
                for (int64_t e = 0; e < D; e += W)
                    own += load<T, W>(gx + h * D + e) * load<T, W>(r.v + 3 * h * D + e) *
                           load<T, W>(d + C + 3 * h * D + e);
                gA[h] = sum<T, W>(own);
            }
            attention(score_self + i * H, H, T(1));
            for (int64_t h = 0; h < H; ++h)
                for (int64_t e = 0; e < D; e += W) {
                    const int64_t c = h * D + e, part = 3 * h * D + e;
                    const V q = load<T, W>(r.q + c), k = load<T, W>(r.k + c), fk = load<T, W>(d + c);
                    add<T, W>(gi.q + c, ga[h] * k * fk);
                    add<T, W>(gi.k + c, ga[h] * q * fk);
                    const V v1 = load<T, W>(r.v + part), gm = A[h] * load<T, W>(gx + c);
                    add<T, W>(gi.v + part, gm * load<T, W>(d + C + part));
                    if (FILTERS) {
                        add<T, W>(own_gd + c, ga[h] * q * k);
                        add<T, W>(own_gd + C + part, gm * v1);
                    }
                    if (s.has_vec) {
                        const V v2 = load<T, W>(r.v + part + D), f2 = load<T, W>(d + C + part + D);
                        V g2 = {};
                        for (int a = 0; a < 3; ++a) {
                            const V gva = load<T, W>(gv + a * C + c);
                            g2 += gva * load<T, W>(w + a * C + c);
                            add<T, W>(g_vec + (3 * i + a) * C + c, gva * v2 * f2);
                        }
                        add<T, W>(gi.v + part + D, g2 * f2);
                        if (FILTERS) add<T, W>(own_gd + C + part + D, g2 * v2);
                    }
                }
        }
    }
    if (FILTERS)
        for (int64_t c = 0; c < 4 * C; ++c) {
            T total = 0;
            for (int64_t t = 0; t < ranges.n; ++t) total += self[t * 4 * C + c];
            Vec<T, 1> v0, v1, unused;
            silu<T, 1, 1>(Vec<T, 1>{pre[s.p * 4 * C + c] + bias[c]}, v0, v1, unused);
            g_pre[s.p * 4 * C + c] = total * v1[0];
        }
}

template <class T, int W, int CC, int HH>
void pair_tangent(const Sizes s, const Ranges ranges, const int32_t* first, const int32_t* second,
                  const Geometry<T>* geometry, const Change<T>* change, const T* bias, const T* pre, const T* pre_r,
                  const T* y, const T* y_t, const T* vec, const T* vec_t, const T* score, const T* score_self,
                  T* score_t, T* score_self_t, T* x_t, T* v_t) {
    typedef Vec<T, W> V;
    const int64_t C = CC ? CC : s.channels, H = HH ? HH : s.heads, D = C / H, H2 = padded(2 * H);
    constexpr int L = Number<T>::lanes;
#pragma omp parallel for schedule(dynamic, 1) if (ranges.n > 1)
    for (int64_t t = 0; t < ranges.n; ++t) {
        Scratch<T> scratch(8 * C + 3 * H2);
        T *d = scratch.take(4 * C), *dt = scratch.take(4 * C);
        T *at = scratch.take(H2), *A = scratch.take(H2), *At = scratch.take(H2);
        const int64_t a0 = ranges.atom[t], a1 = ranges.atom[t + 1];
        std::memset(x_t + a0 * C, 0, (a1 - a0) * C * sizeof(T));
        std::memset(v_t + a0 * 3 * C, 0, (a1 - a0) * 3 * C * sizeof(T));
        const auto attention = [&](const T* a, int64_t n, T phi, T phi_t) {
            std::memcpy(A, a, n * sizeof(T));
            for (int64_t h = 0; h < n; h += L) {
                Vec<T, L> v0, v1, unused;
                silu<T, L, 1>(load<T, L>(A + h), v0, v1, unused);
                store<T, L>(A + h, v0 * phi);
                store<T, L>(At + h, v1 * load<T, L>(at + h) * phi + v0 * phi_t);
            }
        };
        for (int64_t p = ranges.pair[t]; p < ranges.pair[t + 1]; ++p) {
            const Geometry<T>& g = geometry[p];
            const T r_t = change[p].r, phi_t = g.phi_r * r_t, vphi_t = g.vphi_r * r_t;
            const int64_t atoms[2] = {first[p], second[p]};
            for (int64_t c = 0; c < 4 * C; c += W) {
                V v0, v1, unused;
                silu<T, W, 1>(load<T, W>(pre + p * 4 * C + c) + load<T, W>(bias + c), v0, v1, unused);
                store<T, W>(d + c, v0);
                store<T, W>(dt + c, v1 * load<T, W>(pre_r + p * 4 * C + c) * r_t);
            }
            for (int dir = 0; dir < 2; ++dir) {
                const Row<const T> ri(y, atoms[dir], C), rj(y, atoms[1 - dir], C);
                const Row<const T> ti(y_t, atoms[dir], C), tj(y_t, atoms[1 - dir], C);
                for (int64_t h = 0; h < H; ++h) {
                    V own = {};
                    for (int64_t c = h * D; c < h * D + D; c += W) {
                        const V q = load<T, W>(ri.q + c), k = load<T, W>(rj.k + c);
                        own += (load<T, W>(ti.q + c) * k + q * load<T, W>(tj.k + c)) * load<T, W>(d + c) +
                               q * k * load<T, W>(dt + c);
                    }
                    at[dir * H + h] = sum<T, W>(own);
                }
            }
            std::memcpy(score_t + p * 2 * H, at, 2 * H * sizeof(T));
            attention(score + p * 2 * H, 2 * H, g.phi, phi_t);
            for (int dir = 0; dir < 2; ++dir) {
                const int64_t i = atoms[dir], j = atoms[1 - dir];
                const T sign = dir ? T(-1) : T(1);
                const Row<const T> rj(y, j, C), tj(y_t, j, C);
                const T *wj = vec + j * 3 * C, *wtj = vec_t + j * 3 * C;
                T *xi = x_t + i * C, *vi = v_t + i * 3 * C;
                for (int64_t h = 0; h < H; ++h) {
                    const T Ah = A[dir * H + h], Ath = At[dir * H + h];
                    for (int64_t e = 0; e < D; e += W) {
                        const int64_t c = h * D + e, part = 3 * h * D + e;
                        const V v1 = load<T, W>(rj.v + part), f1 = load<T, W>(d + C + part);
                        const V m_t = load<T, W>(tj.v + part) * f1 + v1 * load<T, W>(dt + C + part);
                        add<T, W>(xi + c, Ath * v1 * f1 + Ah * m_t);
                        const V v3 = load<T, W>(rj.v + part + 2 * D), f3 = load<T, W>(d + C + part + 2 * D);
                        const V n3 = v3 * f3 * (sign * g.vphi);
                        const V n3_t = ((load<T, W>(tj.v + part + 2 * D) * f3 +
                                         v3 * load<T, W>(dt + C + part + 2 * D)) * g.vphi + v3 * f3 * vphi_t) * sign;
                        if (s.has_vec) {
                            const V v2 = load<T, W>(rj.v + part + D), f2 = load<T, W>(d + C + part + D);
                            const V n2 = v2 * f2 * g.vphi;
                            const V n2_t = (load<T, W>(tj.v + part + D) * f2 + v2 * load<T, W>(dt + C + part + D)) *
                                               g.vphi + v2 * f2 * vphi_t;
                            for (int k = 0; k < 3; ++k)
                                add<T, W>(vi + k * C + c, load<T, W>(wtj + k * C + c) * n2 +
                                                              load<T, W>(wj + k * C + c) * n2_t +
                                                              n3 * change[p].unit[k] + n3_t * g.unit[k]);
                        } else {
                            for (int k = 0; k < 3; ++k)
                                add<T, W>(vi + k * C + c, n3 * change[p].unit[k] + n3_t * g.unit[k]);
                        }
                    }
                }
            }
        }
        for (int64_t c = 0; c < 4 * C; c += W) {
            const V x = load<T, W>(pre + s.p * 4 * C + c) + load<T, W>(bias + c);
            store<T, W>(d + c, x * sigmoid<T, W>(x));
        }
        for (int64_t i = a0; i < a1; ++i) {
            const Row<const T> r(y, i, C), rt(y_t, i, C);
            for (int64_t h = 0; h < H; ++h) {
                V own = {};
                for (int64_t c = h * D; c < h * D + D; c += W)
                    own += (load<T, W>(rt.q + c) * load<T, W>(r.k + c) + load<T, W>(r.q + c) * load<T, W>(rt.k + c)) *
                           load<T, W>(d + c);
                at[h] = sum<T, W>(own);
            }
            std::memcpy(score_self_t + i * H, at, H * sizeof(T));
            attention(score_self + i * H, H, T(1), T(0));
            for (int64_t h = 0; h < H; ++h)
                for (int64_t e = 0; e < D; e += W) {
                    const int64_t c = h * D + e, part = 3 * h * D + e;
                    const V f1 = load<T, W>(d + C + part);
                    add<T, W>(x_t + i * C + c, At[h] * load<T, W>(r.v + part) * f1 + A[h] * load<T, W>(rt.v + part) * f1);
                    if (s.has_vec) {
                        const V f2 = load<T, W>(d + C + part + D);
                        const V n2 = load<T, W>(r.v + part + D) * f2, n2_t = load<T, W>(rt.v + part + D) * f2;
                        for (int k = 0; k < 3; ++k)
                            add<T, W>(v_t + (3 * i + k) * C + c, load<T, W>(vec_t + (3 * i + k) * C + c) * n2 +
                                                                    load<T, W>(vec + (3 * i + k) * C + c) * n2_t);
                    }
                }
        }
    }
}

template <class T, int W, int CC, int HH>
void pair_reverse(const Sizes s, const Ranges ranges, const int32_t* first, const int32_t* second,
                  const Geometry<T>* geometry, const Change<T>* change, const T* bias, const T* pre, const T* pre_r,
                  const T* y, const T* y_t, const T* vec, const T* vec_t, const T* score, const T* score_self,
                  const T* score_t, const T* score_self_t, const T* g_x, const T* g_v, const T* m_x, const T* m_v,
                  T* m_y, T* m_vec, T* m_pre, T* m_pre_r) {
    typedef Vec<T, W> V;
    const int64_t C = CC ? CC : s.channels, H = HH ? HH : s.heads, D = C / H, H2 = padded(2 * H);
    constexpr int L = Number<T>::lanes;
    std::vector<T> self(ranges.n * 4 * C, T(0));
#pragma omp parallel for schedule(dynamic, 1) if (ranges.n > 1)
    for (int64_t t = 0; t < ranges.n; ++t) {
        Scratch<T> scratch(24 * C + 7 * H2);
        T *d = scratch.take(4 * C), *dt = scratch.take(4 * C), *s1 = scratch.take(4 * C), *s2 = scratch.take(4 * C);
        T *md = scratch.take(4 * C), *mdt = scratch.take(4 * C);
        T *a = scratch.take(H2), *at = scratch.take(H2), *mA = scratch.take(H2), *mAt = scratch.take(H2);
        T *A = scratch.take(H2), *ma = scratch.take(H2), *mat = scratch.take(H2);
        std::vector<T> At_buffer(H2, T(0));
        T* At = At_buffer.data();
        const int64_t a0 = ranges.atom[t], a1 = ranges.atom[t + 1];
        std::memset(m_y + a0 * 5 * C, 0, (a1 - a0) * 5 * C * sizeof(T));
        const auto attention = [&](const T* scores, const T* scores_t, int64_t n, T phi, T phi_t) {
            std::memcpy(a, scores, n * sizeof(T));
            std::memcpy(at, scores_t, n * sizeof(T));
            for (int64_t h = 0; h < n; h += L) {
                Vec<T, L> v0, v1, v2;
                silu<T, L, 2>(load<T, L>(a + h), v0, v1, v2);
                const Vec<T, L> a_t = load<T, L>(at + h), m1 = load<T, L>(mA + h), m2 = load<T, L>(mAt + h);
                store<T, L>(A + h, v0 * phi);
                store<T, L>(At + h, v1 * a_t * phi + v0 * phi_t);
                store<T, L>(ma + h, m1 * v1 * phi + m2 * (v2 * a_t * phi + v1 * phi_t));
                store<T, L>(mat + h, m2 * v1 * phi);
            }
        };
        for (int64_t p = ranges.pair[t]; p < ranges.pair[t + 1]; ++p) {
            const Geometry<T>& g = geometry[p];
            const T r_t = change[p].r, phi_t = g.phi_r * r_t, vphi_t = g.vphi_r * r_t;
            const int64_t atoms[2] = {first[p], second[p]};
            for (int64_t c = 0; c < 4 * C; c += W) {
                V v0, v1, v2;
                silu<T, W, 2>(load<T, W>(pre + p * 4 * C + c) + load<T, W>(bias + c), v0, v1, v2);
                const V pre_t = load<T, W>(pre_r + p * 4 * C + c) * r_t;
                store<T, W>(d + c, v0);
                store<T, W>(dt + c, v1 * pre_t);
                store<T, W>(s1 + c, v1);
                store<T, W>(s2 + c, v2 * pre_t);
            }
            for (int dir = 0; dir < 2; ++dir) {
                const Row<const T> rj(y, atoms[1 - dir], C), tj(y_t, atoms[1 - dir], C);
                const T *mx = m_x + atoms[dir] * C, *gx = g_x + atoms[dir] * C;
                for (int64_t h = 0; h < H; ++h) {
                    V sum_a = {}, sum_t = {};
                    for (int64_t e = 0; e < D; e += W) {
                        const int64_t c = h * D + e, part = 3 * h * D + e;
                        const V v1 = load<T, W>(rj.v + part), f1 = load<T, W>(d + C + part);
                        const V m = v1 * f1, m_t = load<T, W>(tj.v + part) * f1 + v1 * load<T, W>(dt + C + part);
                        const V gxc = load<T, W>(gx + c);
                        sum_a += load<T, W>(mx + c) * m + gxc * m_t;
                        sum_t += gxc * m;
                    }
                    mA[dir * H + h] = sum<T, W>(sum_a);
                    mAt[dir * H + h] = sum<T, W>(sum_t);
                }
            }
            attention(score + p * 2 * H, score_t + p * 2 * H, 2 * H, g.phi, phi_t);
            for (int dir = 0; dir < 2; ++dir) {
                const int64_t i = atoms[dir], j = atoms[1 - dir];
                const T sign = dir ? T(-1) : T(1);
                const T unit[3] = {sign * g.unit[0], sign * g.unit[1], sign * g.unit[2]};
                const T unit_t[3] = {sign * change[p].unit[0], sign * change[p].unit[1], sign * change[p].unit[2]};
                const Row<const T> ri(y, i, C), rj(y, j, C), ti(y_t, i, C), tj(y_t, j, C);
                const Row<T> mi(m_y, i, C), mj(m_y, j, C);
                const T *gx = g_x + i * C, *gv = g_v + i * 3 * C, *mx = m_x + i * C, *mv = m_v + i * 3 * C;
                const T *wj = vec + j * 3 * C, *wtj = vec_t + j * 3 * C;
                T* mw = m_vec + j * 3 * C;
                for (int64_t h = 0; h < H; ++h) {
                    const T Ah = A[dir * H + h], Ath = At[dir * H + h], mah = ma[dir * H + h], math = mat[dir * H + h];
                    for (int64_t e = 0; e < D; e += W) {
                        const int64_t c = h * D + e, part = 3 * h * D + e;
                        {
                            const V q = load<T, W>(ri.q + c), k = load<T, W>(rj.k + c);
                            const V q_t = load<T, W>(ti.q + c), k_t = load<T, W>(tj.k + c);
                            const V f = load<T, W>(d + c), f_t = load<T, W>(dt + c), both = math * f;
                            const V own = mah * f + math * f_t, qk = q * k;
                            add<T, W>(mi.q + c, own * k + both * k_t);
                            add<T, W>(mj.k + c, own * q + both * q_t);
                            const V mf = mah * qk + math * (q_t * k + q * k_t), mf_t = math * qk;
                            if (dir == 0) {
                                store<T, W>(md + c, mf);
                                store<T, W>(mdt + c, mf_t);
                            } else {
                                add<T, W>(md + c, mf);
                                add<T, W>(mdt + c, mf_t);
                            }
                        }
                        {
                            const V v = load<T, W>(rj.v + part), v_t = load<T, W>(tj.v + part);
                            const V f = load<T, W>(d + C + part), f_t = load<T, W>(dt + C + part);
                            const V gxc = load<T, W>(gx + c);
                            const V mm = Ah * load<T, W>(mx + c) + Ath * gxc, mm_t = Ah * gxc;
                            add<T, W>(mj.v + part, mm * f + mm_t * f_t);
                            const V mf = mm * v + mm_t * v_t, mf_t = mm_t * v;
                            if (dir == 0) {
                                store<T, W>(md + C + part, mf);
                                store<T, W>(mdt + C + part, mf_t);
                            } else {
                                add<T, W>(md + C + part, mf);
                                add<T, W>(mdt + C + part, mf_t);
                            }
                        }
                        const V gv0 = load<T, W>(gv + c), gv1 = load<T, W>(gv + C + c), gv2 = load<T, W>(gv + 2 * C + c);
                        const V mv0 = load<T, W>(mv + c), mv1 = load<T, W>(mv + C + c), mv2 = load<T, W>(mv + 2 * C + c);
                        {
                            const V mn_t = gv0 * unit[0] + gv1 * unit[1] + gv2 * unit[2];
                            const V mn = mv0 * unit[0] + mv1 * unit[1] + mv2 * unit[2] + gv0 * unit_t[0] +
                                         gv1 * unit_t[1] + gv2 * unit_t[2];
                            const V v = load<T, W>(rj.v + part + 2 * D), v_t = load<T, W>(tj.v + part + 2 * D);
                            const V f = load<T, W>(d + C + part + 2 * D), f_t = load<T, W>(dt + C + part + 2 * D);
                            const V own = mn * g.vphi + mn_t * vphi_t, along = mn_t * g.vphi;
                            add<T, W>(mj.v + part + 2 * D, own * f + along * f_t);
                            const V mf = own * v + along * v_t, mf_t = along * v;
                            if (dir == 0) {
                                store<T, W>(md + C + part + 2 * D, mf);
                                store<T, W>(mdt + C + part + 2 * D, mf_t);
                            } else {
                                add<T, W>(md + C + part + 2 * D, mf);
                                add<T, W>(mdt + C + part + 2 * D, mf_t);
                            }
                        }
                        if (s.has_vec) {
                            const V w0 = load<T, W>(wj + c), w1 = load<T, W>(wj + C + c), w2 = load<T, W>(wj + 2 * C + c);
                            const V mn_t = gv0 * w0 + gv1 * w1 + gv2 * w2;
                            const V mn = mv0 * w0 + mv1 * w1 + mv2 * w2 + gv0 * load<T, W>(wtj + c) +
                                         gv1 * load<T, W>(wtj + C + c) + gv2 * load<T, W>(wtj + 2 * C + c);
                            const V v = load<T, W>(rj.v + part + D), v_t = load<T, W>(tj.v + part + D);
                            const V f = load<T, W>(d + C + part + D), f_t = load<T, W>(dt + C + part + D);
                            const V n = v * f * g.vphi, n_t = (v_t * f + v * f_t) * g.vphi + v * f * vphi_t;
                            add<T, W>(mw + c, mv0 * n + gv0 * n_t);
                            add<T, W>(mw + C + c, mv1 * n + gv1 * n_t);
                            add<T, W>(mw + 2 * C + c, mv2 * n + gv2 * n_t);
                            const V own = mn * g.vphi + mn_t * vphi_t, along = mn_t * g.vphi;
                            add<T, W>(mj.v + part + D, own * f + along * f_t);
                            const V mf = own * v + along * v_t, mf_t = along * v;
                            if (dir == 0) {
                                store<T, W>(md + C + part + D, mf);
                                store<T, W>(mdt + C + part + D, mf_t);
                            } else {
                                add<T, W>(md + C + part + D, mf);
                                add<T, W>(mdt + C + part + D, mf_t);
                            }
                        }
                    }
                }
            }
            if (!s.has_vec)  // no filter of the part along vectors was used
                for (int64_t h = 0; h < H; ++h) {
                    std::memset(md + C + (3 * h + 1) * D, 0, D * sizeof(T));
                    std::memset(mdt + C + (3 * h + 1) * D, 0, D * sizeof(T));
                }
            for (int64_t c = 0; c < 4 * C; c += W) {
                const V m0 = load<T, W>(md + c), m1 = load<T, W>(mdt + c), f1 = load<T, W>(s1 + c);
                store<T, W>(m_pre + p * 4 * C + c, m0 * f1 + m1 * load<T, W>(s2 + c));
                store<T, W>(m_pre_r + p * 4 * C + c, m1 * f1 * r_t);
            }
        }
        for (int64_t c = 0; c < 4 * C; c += W) {
            const V x = load<T, W>(pre + s.p * 4 * C + c) + load<T, W>(bias + c);
            store<T, W>(d + c, x * sigmoid<T, W>(x));
        }
        T* own_md = self.data() + t * 4 * C;
        for (int64_t i = a0; i < a1; ++i) {
            const Row<const T> r(y, i, C), rt(y_t, i, C);
            const Row<T> mi(m_y, i, C);
            const T *gx = g_x + i * C, *gv = g_v + i * 3 * C, *mx = m_x + i * C, *mv = m_v + i * 3 * C;
            const T *w = vec + i * 3 * C, *wt = vec_t + i * 3 * C;
            for (int64_t h = 0; h < H; ++h) {
                V sum_a = {}, sum_t = {};
                for (int64_t e = 0; e < D; e += W) {
                    const int64_t c = h * D + e, part = 3 * h * D + e;
                    const V f = load<T, W>(d + C + part), m = load<T, W>(r.v + part) * f, gxc = load<T, W>(gx + c);
                    sum_a += load<T, W>(mx + c) * m + gxc * load<T, W>(rt.v + part) * f;
                    sum_t += gxc * m;
                }
                mA[h] = sum<T, W>(sum_a);
                mAt[h] = sum<T, W>(sum_t);
            }
            attention(score_self + i * H, score_self_t + i * H, H, T(1), T(0));
            for (int64_t h = 0; h < H; ++h)
                for (int64_t e = 0; e < D; e += W) {
                    const int64_t c = h * D + e, part = 3 * h * D + e;
                    const V q = load<T, W>(r.q + c), k = load<T, W>(r.k + c), f = load<T, W>(d + c);
                    const V q_t = load<T, W>(rt.q + c), k_t = load<T, W>(rt.k + c);
                    add<T, W>(mi.q + c, (ma[h] * k + mat[h] * k_t) * f);
                    add<T, W>(mi.k + c, (ma[h] * q + mat[h] * q_t) * f);
                    add<T, W>(own_md + c, ma[h] * q * k + mat[h] * (q_t * k + q * k_t));
                    const V gxc = load<T, W>(gx + c), mm = A[h] * load<T, W>(mx + c) + At[h] * gxc, mm_t = A[h] * gxc;
                    add<T, W>(mi.v + part, mm * load<T, W>(d + C + part));
                    add<T, W>(own_md + C + part, mm * load<T, W>(r.v + part) + mm_t * load<T, W>(rt.v + part));
                    if (s.has_vec) {
                        const V v = load<T, W>(r.v + part + D), v_t = load<T, W>(rt.v + part + D);
                        const V f2 = load<T, W>(d + C + part + D);
                        V mn = {}, mn_t = {};
                        for (int b = 0; b < 3; ++b) {
                            const V gvb = load<T, W>(gv + b * C + c), mvb = load<T, W>(mv + b * C + c);
                            const V wb = load<T, W>(w + b * C + c);
                            mn_t += gvb * wb;
                            mn += mvb * wb + gvb * load<T, W>(wt + b * C + c);
                            add<T, W>(m_vec + (3 * i + b) * C + c, (mvb * v + gvb * v_t) * f2);
                        }
                        add<T, W>(mi.v + part + D, mn * f2);
                        add<T, W>(own_md + C + part + D, mn * v + mn_t * v_t);
                    }
                }
        }
    }
    for (int64_t c = 0; c < 4 * C; ++c) {
        T total = 0;
        for (int64_t t = 0; t < ranges.n; ++t) total += self[t * 4 * C + c];
        Vec<T, 1> v0, v1, unused;
        silu<T, 1, 1>(Vec<T, 1>{pre[s.p * 4 * C + c] + bias[c]}, v0, v1, unused);
        m_pre[s.p * 4 * C + c] = total * v1[0];
    }
}

// ---------------------------------------------------------------------------------------------- neighbor embedding

// Sum over neighbors of emb_j * w(r), with w = (pre + bias) * phi; every pass in one loop over pairs.
template <class T, int W>
void embed_forward(const Sizes s, const int32_t* first, const int32_t* second, const Geometry<T>* geometry,
                   const T* bias, const T* pre, const T* emb, T* out) {
    typedef Vec<T, W> V;
    const int64_t C = s.channels;
    std::memset(out, 0, s.n * C * sizeof(T));
    for (int64_t p = 0; p < s.p; ++p) {
        const int64_t i = first[p] * C, j = second[p] * C;
        for (int64_t c = 0; c < C; c += W) {
            const V w = (load<T, W>(pre + p * C + c) + load<T, W>(bias + c)) * geometry[p].phi;
            add<T, W>(out + i + c, load<T, W>(emb + j + c) * w);
            add<T, W>(out + j + c, load<T, W>(emb + i + c) * w);
        }
    }
}

// With FILTERS: adjoints of `emb` (added to g_emb) and of `pre`; with GEOMETRY: of the distance.
template <class T, int W>
void embed_backward(const Sizes s, const int32_t* first, const int32_t* second, const Geometry<T>* geometry,
                    const T* bias, const T* pre, const T* pre_r, const T* emb, const T* g_out, Change<T>* g_change,
                    T* g_pre, T* g_emb) {
    typedef Vec<T, W> V;
    const int64_t C = s.channels;
    for (int64_t p = 0; p < s.p; ++p) {
        const int64_t i = first[p] * C, j = second[p] * C;
        const T phi = geometry[p].phi, phi_r = geometry[p].phi_r;
        V g_r = {};
        for (int64_t c = 0; c < C; c += W) {
            const V x = load<T, W>(pre + p * C + c) + load<T, W>(bias + c);
            const V gi = load<T, W>(g_out + i + c), gj = load<T, W>(g_out + j + c);
            const V gw = gi * load<T, W>(emb + j + c) + gj * load<T, W>(emb + i + c);
            if (g_change) g_r += gw * (load<T, W>(pre_r + p * C + c) * phi + x * phi_r);
            if (g_pre) {
                store<T, W>(g_pre + p * C + c, gw * phi);
                add<T, W>(g_emb + j + c, gi * x * phi);
                add<T, W>(g_emb + i + c, gj * x * phi);
            }
        }
        if (g_change) g_change[p].r += sum<T, W>(g_r);
    }
}

template <class T, int W>
void embed_tangent(const Sizes s, const int32_t* first, const int32_t* second, const Geometry<T>* geometry,
                   const Change<T>* change, const T* bias, const T* pre, const T* pre_r, const T* emb, T* out_t) {
    typedef Vec<T, W> V;
    const int64_t C = s.channels;
    std::memset(out_t, 0, s.n * C * sizeof(T));
    for (int64_t p = 0; p < s.p; ++p) {
        const int64_t i = first[p] * C, j = second[p] * C;
        const T phi = geometry[p].phi * change[p].r, phi_r = geometry[p].phi_r * change[p].r;
        for (int64_t c = 0; c < C; c += W) {
            const V w_t = load<T, W>(pre_r + p * C + c) * phi + (load<T, W>(pre + p * C + c) + load<T, W>(bias + c)) * phi_r;
            add<T, W>(out_t + i + c, load<T, W>(emb + j + c) * w_t);
            add<T, W>(out_t + j + c, load<T, W>(emb + i + c) * w_t);
        }
    }
}

template <class T, int W>
void embed_reverse(const Sizes s, const int32_t* first, const int32_t* second, const Geometry<T>* geometry,
                   const Change<T>* change, const T* bias, const T* pre, const T* pre_r, const T* emb, const T* g_out,
                   const T* m_out, T* m_pre, T* m_pre_r, T* m_emb) {
    typedef Vec<T, W> V;
    const int64_t C = s.channels;
    for (int64_t p = 0; p < s.p; ++p) {
        const int64_t i = first[p] * C, j = second[p] * C;
        const T phi = geometry[p].phi, phi_t = geometry[p].phi_r * change[p].r, r_t = change[p].r;
        for (int64_t c = 0; c < C; c += W) {
            const V x = load<T, W>(pre + p * C + c) + load<T, W>(bias + c);
            const V w = x * phi, w_t = load<T, W>(pre_r + p * C + c) * (r_t * phi) + x * phi_t;
            const V gi = load<T, W>(g_out + i + c), gj = load<T, W>(g_out + j + c);
            const V mi = load<T, W>(m_out + i + c), mj = load<T, W>(m_out + j + c);
            const V ei = load<T, W>(emb + i + c), ej = load<T, W>(emb + j + c);
            const V mw = mi * ej + mj * ei, mw_t = gi * ej + gj * ei;
            store<T, W>(m_pre + p * C + c, mw * phi + mw_t * phi_t);
            store<T, W>(m_pre_r + p * C + c, mw_t * (r_t * phi));
            add<T, W>(m_emb + j + c, mi * w + gi * w_t);
            add<T, W>(m_emb + i + c, mj * w + gj * w_t);
        }
    }
}

// --------------------------------------------------------------------------------------------------- layer normalization

template <class T, int W>
void norm_forward(int64_t n, int64_t C, T eps, const T* x, const T* gamma, const T* beta, T* unit, T* inverse, T* out) {
    typedef Vec<T, W> V;
    for (int64_t i = 0; i < n; ++i) {
        V total = {}, square = {};
        for (int64_t c = 0; c < C; c += W) total += load<T, W>(x + i * C + c);
        const T mean = sum<T, W>(total) / C;
        for (int64_t c = 0; c < C; c += W) {
            const V d = load<T, W>(x + i * C + c) - mean;
            square += d * d;
        }
        const T rs = T(1) / std::sqrt(sum<T, W>(square) / C + eps);
        inverse[i] = rs;
        for (int64_t c = 0; c < C; c += W) {
            const V u = (load<T, W>(x + i * C + c) - mean) * rs;
            store<T, W>(unit + i * C + c, u);
            store<T, W>(out + i * C + c, u * load<T, W>(gamma + c) + load<T, W>(beta + c));
        }
    }
}

// g_x = (added to) the adjoint of x; with parameters: adjoints of gamma and beta are added to theirs.
template <class T, int W>
void norm_backward(int64_t n, int64_t C, const T* unit, const T* inverse, const T* gamma, const T* g_out, T* g_x,
                   T* g_gamma, T* g_beta) {
    typedef Vec<T, W> V;
    for (int64_t i = 0; i < n; ++i) {
        V s0 = {}, s1 = {};
        for (int64_t c = 0; c < C; c += W) {
            const V g = load<T, W>(g_out + i * C + c), u = load<T, W>(unit + i * C + c), b = g * load<T, W>(gamma + c);
            s0 += b;
            s1 += b * u;
            if (g_gamma) {
                add<T, W>(g_gamma + c, g * u);
                add<T, W>(g_beta + c, g);
            }
        }
        const T m0 = sum<T, W>(s0) / C, m1 = sum<T, W>(s1) / C;
        for (int64_t c = 0; c < C; c += W)
            add<T, W>(g_x + i * C + c, (load<T, W>(g_out + i * C + c) * load<T, W>(gamma + c) - m0 -
                                        load<T, W>(unit + i * C + c) * m1) * inverse[i]);
    }
}

template <class T, int W>
void norm_tangent(int64_t n, int64_t C, const T* unit, const T* inverse, const T* gamma, const T* x_t, T* out_t) {
    typedef Vec<T, W> V;
    for (int64_t i = 0; i < n; ++i) {
        V s0 = {}, s1 = {};
        for (int64_t c = 0; c < C; c += W) {
            const V x = load<T, W>(x_t + i * C + c);
            s0 += x;
            s1 += x * load<T, W>(unit + i * C + c);
        }
        const T m0 = sum<T, W>(s0) / C, m1 = sum<T, W>(s1) / C;
        for (int64_t c = 0; c < C; c += W)
            store<T, W>(out_t + i * C + c, (load<T, W>(x_t + i * C + c) - m0 - load<T, W>(unit + i * C + c) * m1) *
                                               inverse[i] * load<T, W>(gamma + c));
    }
}

// With u the normalized x, c = mean(x_t u), w = x_t - mean(x_t) - u c: out = gamma u + beta, out_t = gamma w / sigma.
template <class T, int W>
void norm_reverse(int64_t n, int64_t C, const T* unit, const T* inverse, const T* gamma, const T* x_t, const T* g_out,
                  const T* m_out, T* m_x, T* m_gamma, T* m_beta) {
    typedef Vec<T, W> V;
    std::vector<T> buffer(C);
    T* total = buffer.data();
    for (int64_t i = 0; i < n; ++i) {
        const T rs = inverse[i];
        V s0 = {}, s1 = {}, s2 = {};
        for (int64_t c = 0; c < C; c += W) {
            const V x = load<T, W>(x_t + i * C + c), u = load<T, W>(unit + i * C + c);
            s0 += x;
            s1 += x * u;
            s2 += load<T, W>(g_out + i * C + c) * load<T, W>(gamma + c) * u;
        }
        const T mean = sum<T, W>(s0) / C, slope = sum<T, W>(s1) / C, bu = sum<T, W>(s2);
        V m_rs = {}, a0 = {}, a1 = {};
        for (int64_t c = 0; c < C; c += W) {
            const V x = load<T, W>(x_t + i * C + c), u = load<T, W>(unit + i * C + c);
            const V g = load<T, W>(g_out + i * C + c), m = load<T, W>(m_out + i * C + c), ga = load<T, W>(gamma + c);
            const V w = x - mean - u * slope, b = g * ga;
            m_rs += b * w;
            add<T, W>(m_gamma + c, m * u + g * w * rs);
            add<T, W>(m_beta + c, m);
            const V a = m * ga - b * (slope * rs) - x * (rs * bu / C);
            a0 += a;
            a1 += a * u;
            store<T, W>(total + c, a);
        }
        const T m0 = sum<T, W>(a0) / C, m1 = sum<T, W>(a1) / C + rs * sum<T, W>(m_rs) / C;
        for (int64_t c = 0; c < C; c += W)
            add<T, W>(m_x + i * C + c, (load<T, W>(total + c) - m0 - load<T, W>(unit + i * C + c) * m1) * rs);
    }
}

// ------------------------------------------------------------------------------------------------ update of one layer

// o = [o1 | o2 | o3] (N, 3C), w = [w1 | w2 | w3] (N, 3, 3C) or null before the first layer:
//   x_out = x + (sum_xyz w1 w2) o2 + o3,   vec_out = vec + w3 o1 + v
template <class T, int W>
void update_forward(int64_t n, int64_t C, const T* x, const T* vec, const T* o, const T* w, const T* v, T* x_out,
                    T* vec_out) {
    typedef Vec<T, W> V;
    for (int64_t i = 0; i < n; ++i)
        for (int64_t c = 0; c < C; c += W) {
            const T* oi = o + i * 3 * C + c;
            V out = load<T, W>(x + i * C + c) + load<T, W>(oi + 2 * C);
            if (w) {
                V dot = {};
                for (int k = 0; k < 3; ++k) {
                    const T* wk = w + (3 * i + k) * 3 * C + c;
                    const int64_t at = (3 * i + k) * C + c;
                    dot += load<T, W>(wk) * load<T, W>(wk + C);
                    store<T, W>(vec_out + at,
                                load<T, W>(vec + at) + load<T, W>(wk + 2 * C) * load<T, W>(oi) + load<T, W>(v + at));
                }
                out += dot * load<T, W>(oi + C);
            } else {
                for (int k = 0; k < 3; ++k) {
                    const int64_t at = (3 * i + k) * C + c;
                    store<T, W>(vec_out + at, load<T, W>(v + at));
                }
            }
            store<T, W>(x_out + i * C + c, out);
        }
}

template <class T, int W>
void update_backward(int64_t n, int64_t C, const T* o, const T* w, const T* g_x, const T* g_vec, T* g_o, T* g_w) {
    typedef Vec<T, W> V;
    for (int64_t i = 0; i < n; ++i)
        for (int64_t c = 0; c < C; c += W) {
            const T* oi = o + i * 3 * C + c;
            T* go = g_o + i * 3 * C + c;
            const V g = load<T, W>(g_x + i * C + c);
            V dot = {}, g1 = {};
            if (w) {
                const V o1 = load<T, W>(oi), gd = g * load<T, W>(oi + C);
                for (int k = 0; k < 3; ++k) {
                    const T* wk = w + (3 * i + k) * 3 * C + c;
                    T* gw = g_w + (3 * i + k) * 3 * C + c;
                    const V w1 = load<T, W>(wk), w2 = load<T, W>(wk + C), gv = load<T, W>(g_vec + (3 * i + k) * C + c);
                    dot += w1 * w2;
                    g1 += gv * load<T, W>(wk + 2 * C);
                    store<T, W>(gw, gd * w2);
                    store<T, W>(gw + C, gd * w1);
                    store<T, W>(gw + 2 * C, gv * o1);
                }
            }
            store<T, W>(go, g1);
            store<T, W>(go + C, g * dot);
            store<T, W>(go + 2 * C, g);
        }
}

template <class T, int W>
void update_tangent(int64_t n, int64_t C, const T* x_t, const T* vec_t, const T* o, const T* w, const T* o_t,
                    const T* w_t, const T* v_t, T* x_out, T* vec_out) {
    typedef Vec<T, W> V;
    for (int64_t i = 0; i < n; ++i)
        for (int64_t c = 0; c < C; c += W) {
            const T *oi = o + i * 3 * C + c, *ot = o_t + i * 3 * C + c;
            V out = load<T, W>(x_t + i * C + c) + load<T, W>(ot + 2 * C);
            if (w) {
                V dot = {}, dot_t = {};
                for (int k = 0; k < 3; ++k) {
                    const T *wk = w + (3 * i + k) * 3 * C + c, *wt = w_t + (3 * i + k) * 3 * C + c;
                    const int64_t at = (3 * i + k) * C + c;
                    const V w1 = load<T, W>(wk), w2 = load<T, W>(wk + C);
                    dot += w1 * w2;
                    dot_t += load<T, W>(wt) * w2 + w1 * load<T, W>(wt + C);
                    store<T, W>(vec_out + at, load<T, W>(vec_t + at) + load<T, W>(wt + 2 * C) * load<T, W>(oi) +
                                                  load<T, W>(wk + 2 * C) * load<T, W>(ot) + load<T, W>(v_t + at));
                }
                out += dot_t * load<T, W>(oi + C) + dot * load<T, W>(ot + C);
            } else {
                for (int k = 0; k < 3; ++k) {
                    const int64_t at = (3 * i + k) * C + c;
                    store<T, W>(vec_out + at, load<T, W>(v_t + at));
                }
            }
            store<T, W>(x_out + i * C + c, out);
        }
}

template <class T, int W>
void update_reverse(int64_t n, int64_t C, const T* o, const T* w, const T* o_t, const T* w_t, const T* g_x,
                    const T* g_vec, const T* m_x, const T* m_vec, T* m_o, T* m_w) {
    typedef Vec<T, W> V;
    for (int64_t i = 0; i < n; ++i)
        for (int64_t c = 0; c < C; c += W) {
            const T *oi = o + i * 3 * C + c, *ot = o_t + i * 3 * C + c;
            T* mo = m_o + i * 3 * C + c;
            const V g = load<T, W>(g_x + i * C + c), m = load<T, W>(m_x + i * C + c);
            V m1 = {}, m2 = {};
            if (w) {
                const V o1 = load<T, W>(oi), o2 = load<T, W>(oi + C), o1_t = load<T, W>(ot), o2_t = load<T, W>(ot + C);
                const V md = m * o2 + g * o2_t, md_t = g * o2;
                V dot = {}, dot_t = {};
                for (int k = 0; k < 3; ++k) {
                    const T *wk = w + (3 * i + k) * 3 * C + c, *wt = w_t + (3 * i + k) * 3 * C + c;
                    T* mw = m_w + (3 * i + k) * 3 * C + c;
                    const V w1 = load<T, W>(wk), w2 = load<T, W>(wk + C), w3 = load<T, W>(wk + 2 * C);
                    const V t1 = load<T, W>(wt), t2 = load<T, W>(wt + C), t3 = load<T, W>(wt + 2 * C);
                    const V gv = load<T, W>(g_vec + (3 * i + k) * C + c), mv = load<T, W>(m_vec + (3 * i + k) * C + c);
                    dot += w1 * w2;
                    dot_t += t1 * w2 + w1 * t2;
                    m1 += mv * w3 + gv * t3;
                    store<T, W>(mw, md * w2 + md_t * t2);
                    store<T, W>(mw + C, md * w1 + md_t * t1);
                    store<T, W>(mw + 2 * C, mv * o1 + gv * o1_t);
                }
                m2 = m * dot + g * dot_t;
            }
            store<T, W>(mo, m1);
            store<T, W>(mo + C, m2);
            store<T, W>(mo + 2 * C, m);
        }
}

// --------------------------------------------------------------------------------------------------------------- heads

// ab (N, 3, I + O) = [a | b], sn (N, 2I) = [s | n] with n = |a|; the derivative of the length of a zero vector is 0.
template <class T, int W>
void length_forward(int64_t n, int64_t I, int64_t O, const T* s, const T* ab, T* sn) {
    typedef Vec<T, W> V;
    for (int64_t i = 0; i < n; ++i)
        for (int64_t c = 0; c < I; c += W) {
            V square = {};
            for (int k = 0; k < 3; ++k) {
                const V a = load<T, W>(ab + (3 * i + k) * (I + O) + c);
                square += a * a;
            }
            V length;
            for (int lane = 0; lane < W; ++lane) length[lane] = std::sqrt(square[lane]);
            store<T, W>(sn + i * 2 * I + c, load<T, W>(s + i * I + c));
            store<T, W>(sn + i * 2 * I + I + c, length);
        }
}

template <class T, int W>
inline Vec<T, W> inverse_length(Vec<T, W> length) {
    const Vec<T, W> zero = {}, safe = length == zero ? zero + T(1) : length;
    return length == zero ? zero : T(1) / safe;
}

template <class T, int W>
void length_backward(int64_t n, int64_t I, int64_t O, const T* sn, const T* ab, const T* g_sn, T* g_ab, T* g_s) {
    typedef Vec<T, W> V;
    for (int64_t i = 0; i < n; ++i)
        for (int64_t c = 0; c < I; c += W) {
            const int64_t at = i * 2 * I + c;
            const V factor = load<T, W>(g_sn + at + I) * inverse_length<T, W>(load<T, W>(sn + at + I));
            for (int k = 0; k < 3; ++k) {
                const int64_t row = (3 * i + k) * (I + O) + c;
                store<T, W>(g_ab + row, load<T, W>(ab + row) * factor);
            }
            store<T, W>(g_s + i * I + c, load<T, W>(g_sn + at));
        }
}

template <class T, int W>
void length_tangent(int64_t n, int64_t I, int64_t O, const T* sn, const T* ab, const T* s_t, const T* ab_t, T* sn_t) {
    typedef Vec<T, W> V;
    for (int64_t i = 0; i < n; ++i)
        for (int64_t c = 0; c < I; c += W) {
            const int64_t at = i * 2 * I + c;
            V dot = {};
            for (int k = 0; k < 3; ++k) {
                const int64_t row = (3 * i + k) * (I + O) + c;
                dot += load<T, W>(ab + row) * load<T, W>(ab_t + row);
            }
            store<T, W>(sn_t + at, load<T, W>(s_t + i * I + c));
            store<T, W>(sn_t + at + I, dot * inverse_length<T, W>(load<T, W>(sn + at + I)));
        }
}

template <class T, int W>
void length_reverse(int64_t n, int64_t I, int64_t O, const T* sn, const T* ab, const T* sn_t, const T* ab_t,
                    const T* g_sn, const T* m_sn, T* m_ab, T* m_s) {
    typedef Vec<T, W> V;
    for (int64_t i = 0; i < n; ++i)
        for (int64_t c = 0; c < I; c += W) {
            const int64_t at = i * 2 * I + c;
            const V inverse = inverse_length<T, W>(load<T, W>(sn + at + I)), g = load<T, W>(g_sn + at + I) * inverse;
            const V m = load<T, W>(m_sn + at + I) * inverse - g * load<T, W>(sn_t + at + I) * inverse;
            for (int k = 0; k < 3; ++k) {
                const int64_t row = (3 * i + k) * (I + O) + c;
                store<T, W>(m_ab + row, m * load<T, W>(ab + row) + g * load<T, W>(ab_t + row));
            }
            store<T, W>(m_s + i * I + c, load<T, W>(m_sn + at));
        }
}

template <class T, int W>
void silu_forward(int64_t size, const T* x, T* out) {
    for (int64_t c = 0; c < size; c += W) {
        const Vec<T, W> v = load<T, W>(x + c);
        store<T, W>(out + c, v * sigmoid<T, W>(v));
    }
}

template <class T, int W>
void silu_backward(int64_t size, const T* x, const T* g_out, T* g_x) {
    for (int64_t c = 0; c < size; c += W) {
        Vec<T, W> s0, s1, unused;
        silu<T, W, 1>(load<T, W>(x + c), s0, s1, unused);
        store<T, W>(g_x + c, load<T, W>(g_out + c) * s1);
    }
}

template <class T, int W>
void silu_reverse(int64_t size, const T* x, const T* x_t, const T* g_out, const T* m_out, T* m_x) {
    for (int64_t c = 0; c < size; c += W) {
        Vec<T, W> s0, s1, s2;
        silu<T, W, 2>(load<T, W>(x + c), s0, s1, s2);
        store<T, W>(m_x + c, load<T, W>(m_out + c) * s1 + load<T, W>(g_out + c) * s2 * load<T, W>(x_t + c));
    }
}

// u (N, 2O) = [out | gate]: scalars silu(out) or out, vectors b gate.
template <class T, int W>
void gate_forward(int64_t n, int64_t I, int64_t O, int64_t activate, const T* u, const T* ab, T* s, T* v) {
    typedef Vec<T, W> V;
    for (int64_t i = 0; i < n; ++i)
        for (int64_t c = 0; c < O; c += W) {
            const V out = load<T, W>(u + i * 2 * O + c), gate = load<T, W>(u + i * 2 * O + O + c);
            store<T, W>(s + i * O + c, activate ? out * sigmoid<T, W>(out) : out);
            for (int k = 0; k < 3; ++k)
                store<T, W>(v + (3 * i + k) * O + c, load<T, W>(ab + (3 * i + k) * (I + O) + I + c) * gate);
        }
}

template <class T, int W>
void gate_backward(int64_t n, int64_t I, int64_t O, int64_t activate, const T* u, const T* ab, const T* g_s,
                   const T* g_v, T* g_u, T* g_ab) {
    typedef Vec<T, W> V;
    for (int64_t i = 0; i < n; ++i)
        for (int64_t c = 0; c < O; c += W) {
            const V gate = load<T, W>(u + i * 2 * O + O + c), g = load<T, W>(g_s + i * O + c);
            V s0, slope, unused, g_gate = {};
            silu<T, W, 1>(load<T, W>(u + i * 2 * O + c), s0, slope, unused);
            for (int k = 0; k < 3; ++k) {
                const int64_t row = (3 * i + k) * (I + O) + I + c;
                const V gv = load<T, W>(g_v + (3 * i + k) * O + c);
                g_gate += gv * load<T, W>(ab + row);
                store<T, W>(g_ab + row, gv * gate);
            }
            store<T, W>(g_u + i * 2 * O + c, activate ? g * slope : g);
            store<T, W>(g_u + i * 2 * O + O + c, g_gate);
        }
}

template <class T, int W>
void gate_tangent(int64_t n, int64_t I, int64_t O, int64_t activate, const T* u, const T* ab, const T* u_t,
                  const T* ab_t, T* s_t, T* v_t) {
    typedef Vec<T, W> V;
    for (int64_t i = 0; i < n; ++i)
        for (int64_t c = 0; c < O; c += W) {
            const V gate = load<T, W>(u + i * 2 * O + O + c), gate_t = load<T, W>(u_t + i * 2 * O + O + c);
            const V out_t = load<T, W>(u_t + i * 2 * O + c);
            V s0, slope, unused;
            silu<T, W, 1>(load<T, W>(u + i * 2 * O + c), s0, slope, unused);
            store<T, W>(s_t + i * O + c, activate ? out_t * slope : out_t);
            for (int k = 0; k < 3; ++k) {
                const int64_t row = (3 * i + k) * (I + O) + I + c;
                store<T, W>(v_t + (3 * i + k) * O + c,
                            load<T, W>(ab_t + row) * gate + load<T, W>(ab + row) * gate_t);
            }
        }
}

template <class T, int W>
void gate_reverse(int64_t n, int64_t I, int64_t O, int64_t activate, const T* u, const T* ab, const T* u_t,
                  const T* ab_t, const T* g_s, const T* g_v, const T* m_s, const T* m_v, T* m_u, T* m_ab) {
    typedef Vec<T, W> V;
    for (int64_t i = 0; i < n; ++i)
        for (int64_t c = 0; c < O; c += W) {
            const V gate = load<T, W>(u + i * 2 * O + O + c), gate_t = load<T, W>(u_t + i * 2 * O + O + c);
            const V m = load<T, W>(m_s + i * O + c), g = load<T, W>(g_s + i * O + c);
            V s0, slope, bend, m_gate = {};
            silu<T, W, 2>(load<T, W>(u + i * 2 * O + c), s0, slope, bend);
            for (int k = 0; k < 3; ++k) {
                const int64_t row = (3 * i + k) * (I + O) + I + c;
                const V mv = load<T, W>(m_v + (3 * i + k) * O + c), gv = load<T, W>(g_v + (3 * i + k) * O + c);
                m_gate += mv * load<T, W>(ab + row) + gv * load<T, W>(ab_t + row);
                store<T, W>(m_ab + row, mv * gate + gv * gate_t);
            }
            store<T, W>(m_u + i * 2 * O + c, activate ? m * slope + g * bend * load<T, W>(u_t + i * 2 * O + c) : m);
            store<T, W>(m_u + i * 2 * O + O + c, m_gate);
        }
}

// ------------------------------------------------------------------------------------------------------------ geometry

inline uint64_t mixed(uint64_t a, uint64_t b) {  // a hash of two numbers: splitmix64's finalizer
    uint64_t h = a * 0x9E3779B97F4A7C15ull + b + 0x632BE59BD9B4E019ull;
    h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9ull;
    h = (h ^ (h >> 27)) * 0x94D049BB133111EBull;
    return h ^ (h >> 31);
}

// One of the two directions of every edge that is not longer than the cutoff: returns the number of pairs, or -1 if
// the edges are not symmetric. `edge` (P, 3) is pos[second] + shift - pos[first].
template <class T>
int64_t find_pairs(int64_t n_edges, const int64_t* src, const int64_t* dst, const T* shift, const T* pos, T cutoff,
                   int32_t* first, int32_t* second, T* edge) {
    int64_t found = 0;
    uint64_t balance = 0;
    for (int64_t e = 0; e < n_edges; ++e) {
        const int64_t j = src[e], i = dst[e];
        const T* t = shift + 3 * e;
        bool keep = j > i;
        if (i == j) keep = t[0] > 0 || (t[0] == 0 && (t[1] > 0 || (t[1] == 0 && t[2] > 0)));
        balance += keep ? mixed(i, j) : -mixed(j, i);
        if (!keep) continue;
        T d[3], square = 0;
        for (int k = 0; k < 3; ++k) {
            d[k] = pos[3 * j + k] + t[k] - pos[3 * i + k];
            square += d[k] * d[k];
        }
        if (square > cutoff * cutoff) continue;  // NaN stays
        first[found] = i;
        second[found] = j;
        for (int k = 0; k < 3; ++k) edge[3 * found + k] = d[k];
        ++found;
    }
    return balance == 0 ? found : -1;
}

// Geometry of the pairs, and the radial functions of their distances (row P: distance 0) and derivatives by distance.
template <class T>
void radial(int64_t p, int64_t K, T cutoff, int64_t vector_cutoff, const T* edge, const T* means, const T* betas,
            Geometry<T>* geometry, T* rbf, T* rbf_r) {
    const T pi = T(3.14159265358979323846), alpha = T(5) / cutoff;
    constexpr int L = Number<T>::lanes;
    const int64_t K2 = padded(K);
    std::vector<T> buffer(3 * K2, T(0));
    T *mean = buffer.data(), *beta = mean + K2, *value = beta + K2;
    std::memcpy(mean, means, K * sizeof(T));
    std::memcpy(beta, betas, K * sizeof(T));
    for (int64_t e = 0; e <= p; ++e) {
        Geometry<T> g = {0, {0, 0, 0}, 1, 0, 1, 0};
        if (e < p) {
            const T* d = edge + 3 * e;
            g.r = std::sqrt(d[0] * d[0] + d[1] * d[1] + d[2] * d[2]);
            const T inverse = g.r == 0 ? T(1) : T(1) / g.r;
            for (int k = 0; k < 3; ++k) g.unit[k] = d[k] * inverse;
            const bool inside = !(g.r >= cutoff);
            g.phi = inside ? T(0.5) * (std::cos(g.r * (pi / cutoff)) + T(1)) : T(0);
            g.phi_r = inside ? T(-0.5) * (pi / cutoff) * std::sin(g.r * (pi / cutoff)) : T(0);
            g.vphi = vector_cutoff ? g.phi : T(inside);
            g.vphi_r = vector_cutoff ? g.phi_r : T(0);
            geometry[e] = g;
        }
        const T decay = std::exp(-alpha * g.r);
        for (int64_t k = 0; k < K; k += L) {
            const Vec<T, L> away = decay - load<T, L>(mean + k);
            store<T, L>(value + k, exponential<T, L>(-(load<T, L>(beta + k) * away * away)));
        }
        for (int64_t k = 0; k < K; ++k) {
            rbf[e * K + k] = g.phi * value[k];
            if (rbf_r && e < p)
                rbf_r[e * K + k] = value[k] * (g.phi_r + T(2) * alpha * g.phi * beta[k] * decay * (decay - mean[k]));
        }
    }
}

// Adjoints of distances and unit vectors as adjoints of positions.
template <class T>
void geometry_backward(int64_t n, int64_t p, const int32_t* first, const int32_t* second, const Geometry<T>* geometry,
                       const Change<T>* g_change, T* g_pos) {
    std::memset(g_pos, 0, n * 3 * sizeof(T));
    for (int64_t e = 0; e < p; ++e) {
        const Geometry<T>& g = geometry[e];
        const Change<T>& c = g_change[e];
        const T inverse = g.r == 0 ? T(1) : T(1) / g.r;
        const T along = g.unit[0] * c.unit[0] + g.unit[1] * c.unit[1] + g.unit[2] * c.unit[2];
        for (int k = 0; k < 3; ++k) {
            const T value = g.unit[k] * c.r + (c.unit[k] - g.unit[k] * along) * inverse;
            g_pos[3 * second[e] + k] += value;
            g_pos[3 * first[e] + k] -= value;
        }
    }
}

template <class T>
void geometry_tangent(int64_t p, const int32_t* first, const int32_t* second, const Geometry<T>* geometry,
                      const T* pos_t, Change<T>* change) {
    for (int64_t e = 0; e < p; ++e) {
        const Geometry<T>& g = geometry[e];
        const T inverse = g.r == 0 ? T(1) : T(1) / g.r;
        T d[3], along = 0;
        for (int k = 0; k < 3; ++k) {
            d[k] = pos_t[3 * second[e] + k] - pos_t[3 * first[e] + k];
            along += g.unit[k] * d[k];
        }
        change[e].r = along;
        for (int k = 0; k < 3; ++k) change[e].unit[k] = (d[k] - g.unit[k] * along) * inverse;
    }
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------- C interface

// Every function twice, `_f32` and `_f64`. `width`, a power of two that divides the channels of a head, is the number of
// lanes that one operation works on; wider is faster.

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

// The published sizes are compiled with constants, which saves most of the address arithmetic: 128 or 256 channels, 8
// heads; and 64, common for small data. CC = 0: any other.
#define SHAPE(CALL, CHANNELS, HEADS, LANES_)                                      \
    if (c == CHANNELS && h == HEADS) {                                            \
        constexpr int W = LANES_, CC = CHANNELS, HH = HEADS;                      \
        CALL;                                                                     \
        return;                                                                   \
    }
#define SHAPES(T, CALL)                                                           \
    SHAPE(CALL, 128, 8, Number<T>::lanes)                                         \
    SHAPE(CALL, 256, 8, Number<T>::lanes)                                         \
    SHAPE(CALL, 64, 8, 8)                                                         \
    constexpr int CC = 0, HH = 0;                                                 \
    LANES(T, CALL)

#define INTERFACE(T, NAME)                                                                                            \
    void product_##NAME(int64_t m, int64_t n, int64_t k, const T* a, int64_t a_row, int64_t a_column, const T* b,     \
                        int64_t b_row, const T* bias, T* c, int64_t c_row, int64_t accumulate, int64_t threads) {     \
        product<T>({m, n, k, a, b, bias, a_row, a_column, b_row, c_row, c, accumulate != 0}, threads);                \
    }                                                                                                                 \
    void column_sum_##NAME(int64_t m, int64_t n, const T* values, T* out) { column_sum<T>(m, n, values, out); }        \
    void length_forward_##NAME(int64_t width, int64_t n, int64_t i, int64_t o, const T* s, const T* ab, T* sn) {      \
        LANES(T, (length_forward<T, W>(n, i, o, s, ab, sn)))                                                          \
    }                                                                                                                 \
    void length_backward_##NAME(int64_t width, int64_t n, int64_t i, int64_t o, const T* sn, const T* ab, const       \
        T* g_sn, T* g_ab, T* g_s) {                                                                                   \
        LANES(T, (length_backward<T, W>(n, i, o, sn, ab, g_sn, g_ab, g_s)))                                           \
    }                                                                                                                 \
    void length_tangent_##NAME(int64_t width, int64_t n, int64_t i, int64_t o, const T* sn, const T* ab, const        \
        T* s_t, const T* ab_t, T* sn_t) {                                                                             \
        LANES(T, (length_tangent<T, W>(n, i, o, sn, ab, s_t, ab_t, sn_t)))                                            \
    }                                                                                                                 \
    void length_reverse_##NAME(int64_t width, int64_t n, int64_t i, int64_t o, const T* sn, const T* ab, const        \
        T* sn_t, const T* ab_t, const T* g_sn, const T* m_sn, T* m_ab, T* m_s) {                                      \
        LANES(T, (length_reverse<T, W>(n, i, o, sn, ab, sn_t, ab_t, g_sn, m_sn, m_ab, m_s)))                          \
    }                                                                                                                 \
    void silu_forward_##NAME(int64_t width, int64_t size, const T* x, T* out) {                                       \
        LANES(T, (silu_forward<T, W>(size, x, out)))                                                                  \
    }                                                                                                                 \
    void silu_backward_##NAME(int64_t width, int64_t size, const T* x, const T* g_out, T* g_x) {                      \
        LANES(T, (silu_backward<T, W>(size, x, g_out, g_x)))                                                          \
    }                                                                                                                 \
    void silu_reverse_##NAME(int64_t width, int64_t size, const T* x, const T* x_t, const T* g_out, const T*          \
        m_out, T* m_x) {                                                                                              \
        LANES(T, (silu_reverse<T, W>(size, x, x_t, g_out, m_out, m_x)))                                               \
    }                                                                                                                 \
    void gate_forward_##NAME(int64_t width, int64_t n, int64_t i, int64_t o, int64_t activate, const T* u, const      \
        T* ab, T* s, T* v) {                                                                                          \
        LANES(T, (gate_forward<T, W>(n, i, o, activate, u, ab, s, v)))                                                \
    }                                                                                                                 \
    void gate_backward_##NAME(int64_t width, int64_t n, int64_t i, int64_t o, int64_t activate, const T* u,           \
        const T* ab, const T* g_s, const T* g_v, T* g_u, T* g_ab) {                                                   \
        LANES(T, (gate_backward<T, W>(n, i, o, activate, u, ab, g_s, g_v, g_u, g_ab)))                                \
    }                                                                                                                 \
    void gate_tangent_##NAME(int64_t width, int64_t n, int64_t i, int64_t o, int64_t activate, const T* u, const      \
        T* ab, const T* u_t, const T* ab_t, T* s_t, T* v_t) {                                                         \
        LANES(T, (gate_tangent<T, W>(n, i, o, activate, u, ab, u_t, ab_t, s_t, v_t)))                                 \
    }                                                                                                                 \
    void gate_reverse_##NAME(int64_t width, int64_t n, int64_t i, int64_t o, int64_t activate, const T* u, const      \
        T* ab, const T* u_t, const T* ab_t, const T* g_s, const T* g_v, const T* m_s, const T* m_v, T* m_u, T*        \
        m_ab) {                                                                                                       \
        LANES(T, (gate_reverse<T, W>(n, i, o, activate, u, ab, u_t, ab_t, g_s, g_v, m_s, m_v, m_u, m_ab)))            \
    }                                                                                                                 \
    int64_t find_pairs_##NAME(int64_t n_edges, const int64_t* src, const int64_t* dst, const T* shift, const T* pos,  \
                              double cutoff, int32_t* first, int32_t* second, T* edge) {                              \
        return find_pairs<T>(n_edges, src, dst, shift, pos, T(cutoff), first, second, edge);                          \
    }                                                                                                                 \
    void radial_##NAME(int64_t p, int64_t k, double cutoff, int64_t vector_cutoff, const T* edge, const T* means,     \
                       const T* betas, T* geometry, T* rbf, T* rbf_r) {                                               \
        radial<T>(p, k, T(cutoff), vector_cutoff, edge, means, betas, (Geometry<T>*)geometry, rbf, rbf_r);            \
    }                                                                                                                 \
    void geometry_backward_##NAME(int64_t n, int64_t p, const int32_t* first, const int32_t* second,                  \
                                  const T* geometry, const T* g_change, T* g_pos) {                                   \
        geometry_backward<T>(n, p, first, second, (const Geometry<T>*)geometry, (const Change<T>*)g_change, g_pos);   \
    }                                                                                                                 \
    void geometry_tangent_##NAME(int64_t p, const int32_t* first, const int32_t* second, const T* geometry,           \
                                 const T* pos_t, T* change) {                                                         \
        geometry_tangent<T>(p, first, second, (const Geometry<T>*)geometry, pos_t, (Change<T>*)change);               \
    }                                                                                                                 \
    void pair_forward_##NAME(int64_t width, int64_t n, int64_t p, int64_t c, int64_t h, int64_t n_ranges,             \
                             const int64_t* pair_ptr, const int64_t* atom_ptr, const int32_t* first,                  \
                             const int32_t* second, const T* geometry, const T* bias, const T* pre, const T* y,       \
                             const T* vec, T* score, T* score_self, T* x_out, T* v_out) {                             \
        const Sizes s = {n, p, c, h, vec != nullptr};                                                                 \
        const Ranges r = {n_ranges, pair_ptr, atom_ptr};                                                              \
        SHAPES(T, (pair_forward<T, W, CC, HH>(s, r, first, second, (const Geometry<T>*)geometry, bias, pre, y, vec, score,     \
                                     score_self, x_out, v_out)))                                                      \
    }                                                                                                                 \
    void pair_backward_##NAME(int64_t width, int64_t n, int64_t p, int64_t c, int64_t h, int64_t n_ranges,            \
                              const int64_t* pair_ptr, const int64_t* atom_ptr, const int32_t* first,                 \
                              const int32_t* second, const T* geometry, const T* bias, const T* pre, const T* pre_r,  \
                              const T* y, const T* vec, const T* score, const T* score_self, const T* g_x,            \
                              const T* g_v, T* g_y, T* g_vec, T* g_change, T* g_pre) {                                \
        const Sizes s = {n, p, c, h, vec != nullptr};                                                                 \
        const Ranges r = {n_ranges, pair_ptr, atom_ptr};                                                              \
        const Geometry<T>* geo = (const Geometry<T>*)geometry;                                                        \
        Change<T>* gc = (Change<T>*)g_change;                                                                         \
        if (g_change && g_pre) {                                                                                      \
            SHAPES(T, (pair_backward<T, W, CC, HH, true, true>(s, r, first, second, geo, bias, pre, pre_r, y, vec, score,      \
                                                      score_self, g_x, g_v, g_y, g_vec, gc, g_pre)))                  \
        } else if (g_change) {                                                                                        \
            SHAPES(T, (pair_backward<T, W, CC, HH, true, false>(s, r, first, second, geo, bias, pre, pre_r, y, vec, score,     \
                                                       score_self, g_x, g_v, g_y, g_vec, gc, g_pre)))                 \
        } else {                                                                                                      \
            SHAPES(T, (pair_backward<T, W, CC, HH, false, true>(s, r, first, second, geo, bias, pre, pre_r, y, vec, score,     \
                                                       score_self, g_x, g_v, g_y, g_vec, gc, g_pre)))                 \
        }                                                                                                             \
    }                                                                                                                 \
    void pair_tangent_##NAME(int64_t width, int64_t n, int64_t p, int64_t c, int64_t h, int64_t n_ranges,             \
                             const int64_t* pair_ptr, const int64_t* atom_ptr, const int32_t* first,                  \
                             const int32_t* second, const T* geometry, const T* change, const T* bias, const T* pre,  \
                             const T* pre_r, const T* y, const T* y_t, const T* vec, const T* vec_t, const T* score,  \
                             const T* score_self, T* score_t, T* score_self_t, T* x_t, T* v_t) {                      \
        const Sizes s = {n, p, c, h, vec != nullptr};                                                                 \
        const Ranges r = {n_ranges, pair_ptr, atom_ptr};                                                              \
        SHAPES(T, (pair_tangent<T, W, CC, HH>(s, r, first, second, (const Geometry<T>*)geometry, (const Change<T>*)change,     \
                                     bias, pre, pre_r, y, y_t, vec, vec_t, score, score_self, score_t, score_self_t,  \
                                     x_t, v_t)))                                                                      \
    }                                                                                                                 \
    void pair_reverse_##NAME(int64_t width, int64_t n, int64_t p, int64_t c, int64_t h, int64_t n_ranges,             \
                             const int64_t* pair_ptr, const int64_t* atom_ptr, const int32_t* first,                  \
                             const int32_t* second, const T* geometry, const T* change, const T* bias, const T* pre,  \
                             const T* pre_r, const T* y, const T* y_t, const T* vec, const T* vec_t, const T* score,  \
                             const T* score_self, const T* score_t, const T* score_self_t, const T* g_x,              \
                             const T* g_v, const T* m_x, const T* m_v, T* m_y, T* m_vec, T* m_pre, T* m_pre_r) {      \
        const Sizes s = {n, p, c, h, vec != nullptr};                                                                 \
        const Ranges r = {n_ranges, pair_ptr, atom_ptr};                                                              \
        SHAPES(T, (pair_reverse<T, W, CC, HH>(s, r, first, second, (const Geometry<T>*)geometry, (const Change<T>*)change,     \
                                     bias, pre, pre_r, y, y_t, vec, vec_t, score, score_self, score_t, score_self_t,  \
                                     g_x, g_v, m_x, m_v, m_y, m_vec, m_pre, m_pre_r)))                                \
    }                                                                                                                 \
    void embed_forward_##NAME(int64_t width, int64_t n, int64_t p, int64_t c, const int32_t* first,                   \
                              const int32_t* second, const T* geometry, const T* bias, const T* pre, const T* emb,    \
                              T* out) {                                                                               \
        const Sizes s = {n, p, c, 0, false};                                                                          \
        LANES(T, (embed_forward<T, W>(s, first, second, (const Geometry<T>*)geometry, bias, pre, emb, out)))          \
    }                                                                                                                 \
    void embed_backward_##NAME(int64_t width, int64_t n, int64_t p, int64_t c, const int32_t* first,                  \
                               const int32_t* second, const T* geometry, const T* bias, const T* pre, const T* pre_r, \
                               const T* emb, const T* g_out, T* g_change, T* g_pre, T* g_emb) {                       \
        const Sizes s = {n, p, c, 0, false};                                                                          \
        LANES(T, (embed_backward<T, W>(s, first, second, (const Geometry<T>*)geometry, bias, pre, pre_r, emb, g_out,  \
                                       (Change<T>*)g_change, g_pre, g_emb)))                                          \
    }                                                                                                                 \
    void embed_tangent_##NAME(int64_t width, int64_t n, int64_t p, int64_t c, const int32_t* first,                   \
                              const int32_t* second, const T* geometry, const T* change, const T* bias, const T* pre, \
                              const T* pre_r, const T* emb, T* out_t) {                                               \
        const Sizes s = {n, p, c, 0, false};                                                                          \
        LANES(T, (embed_tangent<T, W>(s, first, second, (const Geometry<T>*)geometry, (const Change<T>*)change, bias, \
                                      pre, pre_r, emb, out_t)))                                                       \
    }                                                                                                                 \
    void embed_reverse_##NAME(int64_t width, int64_t n, int64_t p, int64_t c, const int32_t* first,                   \
                              const int32_t* second, const T* geometry, const T* change, const T* bias, const T* pre, \
                              const T* pre_r, const T* emb, const T* g_out, const T* m_out, T* m_pre, T* m_pre_r,     \
                              T* m_emb) {                                                                             \
        const Sizes s = {n, p, c, 0, false};                                                                          \
        LANES(T, (embed_reverse<T, W>(s, first, second, (const Geometry<T>*)geometry, (const Change<T>*)change, bias, \
                                      pre, pre_r, emb, g_out, m_out, m_pre, m_pre_r, m_emb)))                         \
    }                                                                                                                 \
    void norm_forward_##NAME(int64_t width, int64_t n, int64_t c, double eps, const T* x, const T* gamma,             \
                             const T* beta, T* unit, T* inverse, T* out) {                                            \
        LANES(T, (norm_forward<T, W>(n, c, T(eps), x, gamma, beta, unit, inverse, out)))                              \
    }                                                                                                                 \
    void norm_backward_##NAME(int64_t width, int64_t n, int64_t c, const T* unit, const T* inverse, const T* gamma,   \
                              const T* g_out, T* g_x, T* g_gamma, T* g_beta) {                                        \
        LANES(T, (norm_backward<T, W>(n, c, unit, inverse, gamma, g_out, g_x, g_gamma, g_beta)))                      \
    }                                                                                                                 \
    void norm_tangent_##NAME(int64_t width, int64_t n, int64_t c, const T* unit, const T* inverse, const T* gamma,    \
                             const T* x_t, T* out_t) {                                                                \
        LANES(T, (norm_tangent<T, W>(n, c, unit, inverse, gamma, x_t, out_t)))                                        \
    }                                                                                                                 \
    void norm_reverse_##NAME(int64_t width, int64_t n, int64_t c, const T* unit, const T* inverse, const T* gamma,    \
                             const T* x_t, const T* g_out, const T* m_out, T* m_x, T* m_gamma, T* m_beta) {           \
        LANES(T, (norm_reverse<T, W>(n, c, unit, inverse, gamma, x_t, g_out, m_out, m_x, m_gamma, m_beta)))           \
    }                                                                                                                 \
    void update_forward_##NAME(int64_t width, int64_t n, int64_t c, const T* x, const T* vec, const T* o, const T* w, \
                               const T* v, T* x_out, T* vec_out) {                                                    \
        LANES(T, (update_forward<T, W>(n, c, x, vec, o, w, v, x_out, vec_out)))                                       \
    }                                                                                                                 \
    void update_backward_##NAME(int64_t width, int64_t n, int64_t c, const T* o, const T* w, const T* g_x,            \
                                const T* g_vec, T* g_o, T* g_w) {                                                     \
        LANES(T, (update_backward<T, W>(n, c, o, w, g_x, g_vec, g_o, g_w)))                                           \
    }                                                                                                                 \
    void update_tangent_##NAME(int64_t width, int64_t n, int64_t c, const T* x_t, const T* vec_t, const T* o,         \
                               const T* w, const T* o_t, const T* w_t, const T* v_t, T* x_out, T* vec_out) {          \
        LANES(T, (update_tangent<T, W>(n, c, x_t, vec_t, o, w, o_t, w_t, v_t, x_out, vec_out)))                       \
    }                                                                                                                 \
    void update_reverse_##NAME(int64_t width, int64_t n, int64_t c, const T* o, const T* w, const T* o_t,             \
                               const T* w_t, const T* g_x, const T* g_vec, const T* m_x, const T* m_vec, T* m_o,      \
                               T* m_w) {                                                                              \
        LANES(T, (update_reverse<T, W>(n, c, o, w, o_t, w_t, g_x, g_vec, m_x, m_vec, m_o, m_w)))                      \
    }

extern "C" {
INTERFACE(float, f32)
INTERFACE(double, f64)
}
