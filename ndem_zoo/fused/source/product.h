// Matrix products of the sizes that occur in a network: some hundred rows, some ten to some hundred columns.

#pragma once

#include <atomic>

#include "vector.h"

namespace {

// A general library allocates its result and copies transposed arguments; MKL also runs at half speed on AMD's processors
// (benchmarks/speed prints its rate beside oneDNN's). Here one block of MR rows and NV vectors stays in registers.
#if defined(__AVX512F__)
constexpr int MR = 6, NV = 4;
#else
constexpr int MR = 6, NV = 1;
#endif
constexpr int64_t FEW = 96;  // rows of `a` for which a panel is read as it is: packing it would take longer
constexpr int64_t KC = 256;  // rows of `b` in one packed panel: it has to stay in the second-level cache

template <class T>
struct Product {  // c (m, n) = [c +] a b [+ bias]; a (m, k) of any strides, b (k, n) and c with contiguous rows
    int64_t m, n, k;
    const T *a, *b, *bias;
    int64_t a_row, a_column, b_row, c_row;
    T* c;
    bool accumulate;
    bool padded = false;  // rows of `b` are filled with zeros to whole vectors, and lie well in the cache as they are
};

template <class T, int R, int V>
inline void product_block(int64_t depth, const T* a, int64_t a_row, int64_t a_column, const T* panel,
                          int64_t panel_row, T* c, int64_t c_row, const T* start, int64_t start_row) {
    constexpr int L = Number<T>::lanes;
    typedef Vec<T, L> X;
    X sums[R][V];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) sums[r][v] = start ? load<T, L>(start + r * start_row + v * L) : X{};
    for (int64_t d = 0; d < depth; ++d) {
        X row[V];
        for (int v = 0; v < V; ++v) row[v] = load<T, L>(panel + d * panel_row + v * L);
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
                   const T* panel, int64_t panel_row) {
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
            case 6: product_block<T, 6, V>(depth, a, p.a_row, p.a_column, panel, panel_row, c, c_row, start, start_row); break;
            case 5: product_block<T, 5, V>(depth, a, p.a_row, p.a_column, panel, panel_row, c, c_row, start, start_row); break;
            case 4: product_block<T, 4, V>(depth, a, p.a_row, p.a_column, panel, panel_row, c, c_row, start, start_row); break;
            case 3: product_block<T, 3, V>(depth, a, p.a_row, p.a_column, panel, panel_row, c, c_row, start, start_row); break;
            case 2: product_block<T, 2, V>(depth, a, p.a_row, p.a_column, panel, panel_row, c, c_row, start, start_row); break;
            default: product_block<T, 1, V>(depth, a, p.a_row, p.a_column, panel, panel_row, c, c_row, start, start_row);
        }
        if (!whole)
            for (int r = 0; r < rows; ++r)
                std::memcpy(p.c + (m + r) * p.c_row + n0, edge + r * V * L, width * sizeof(T));
    }
}

// Floating-point operations of all products so far: what a count of the work adds to what torch sees.
std::atomic<int64_t> product_flops{0};

template <class T>
void product_rows(const Product<T>& p, int64_t m0, int64_t m1) {
    constexpr int L = Number<T>::lanes;
    T* packed = scratch_memory<T, PANEL>(KC * NV * L);
    product_flops.fetch_add(2 * (m1 - m0) * p.n * p.k, std::memory_order_relaxed);
    for (int64_t k0 = 0; k0 < p.k; k0 += KC) {
        const int64_t depth = p.k - k0 < KC ? p.k - k0 : KC;
        for (int64_t n0 = 0; n0 < p.n; n0 += NV * L) {
            const int64_t width = p.n - n0 < NV * L ? p.n - n0 : NV * L, vectors = (width + L - 1) / L;
            const T* panel = p.b + k0 * p.b_row + n0;
            int64_t panel_row = p.b_row;
            if (!p.padded && (m1 - m0 > FEW || width < NV * L)) {
                panel = packed;
                panel_row = vectors * L;
                for (int64_t d = 0; d < depth; ++d) {
                    T* row = packed + d * panel_row;
                    std::memcpy(row, p.b + (k0 + d) * p.b_row + n0, width * sizeof(T));
                    for (int64_t n = width; n < panel_row; ++n) row[n] = 0;
                }
            }
            switch (vectors) {
#if defined(__AVX512F__)
                case 4: product_panel<T, 4>(p, k0, depth, n0, width, m0, m1, panel, panel_row); break;
                case 3: product_panel<T, 3>(p, k0, depth, n0, width, m0, m1, panel, panel_row); break;
                case 2: product_panel<T, 2>(p, k0, depth, n0, width, m0, m1, panel, panel_row); break;
#endif
                default: product_panel<T, 1>(p, k0, depth, n0, width, m0, m1, panel, panel_row);
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
    if (p.m == 0) return;
    const int64_t blocks = (p.m + MR - 1) / MR;
    if (threads > blocks) threads = blocks;
    if (threads <= 1 || p.m * p.n * p.k < 1000000) return product_rows(p, 0, p.m);
#pragma omp parallel for schedule(static, 1)
    for (int64_t t = 0; t < threads; ++t) {
        const int64_t first = blocks * t / threads * MR, last = blocks * (t + 1) / threads * MR;
        product_rows(p, first, last < p.m ? last : p.m);
    }
}

// out (n,) += sum of the rows of (m, n), which are `row` numbers apart
template <class T>
void column_sum(int64_t m, int64_t n, const T* values, int64_t row, T* out) {
    for (int64_t i = 0; i < m; ++i)
        for (int64_t c = 0; c < n; ++c) out[c] += values[i * row + c];
}

// Numbers in a row that holds n: whole vectors, and such that rows of a power of two do not fall on one another in the
// cache.
inline int64_t row_size(int64_t n) { return padded(n) + 16; }

// A square of whole vectors: squares off the diagonal change places, half as large each time.
template <class T>
void transpose_block(const T* in, int64_t in_row, T* out, int64_t out_row) {
    constexpr int L = Number<T>::lanes;
#if defined(__clang__)  // has no shuffle by a vector
    for (int i = 0; i < L; ++i)
        for (int j = 0; j < L; ++j) out[j * out_row + i] = in[i * in_row + j];
#else
    typedef typename Number<T>::integer Int;
    typedef Int Ints __attribute__((vector_size(L * sizeof(Int))));
    Vec<T, L> rows[L];
    for (int i = 0; i < L; ++i) rows[i] = load<T, L>(in + i * in_row);
#pragma GCC unroll 4
    for (int s = L / 2; s > 0; s /= 2) {
        Ints low, high;
        for (int j = 0; j < L; ++j) {
            low[j] = j & s ? L + j - s : j;
            high[j] = j & s ? L + j : j + s;
        }
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i)
            if (!(i & s)) {
                const Vec<T, L> a = rows[i], b = rows[i + s];
                rows[i] = __builtin_shuffle(a, b, low);
                rows[i + s] = __builtin_shuffle(a, b, high);
            }
    }
    for (int i = 0; i < L; ++i) store<T, L>(out + i * out_row, rows[i]);
#endif
}

// A weight (n, k) as (k, n), in rows of `row` numbers filled up with zeros.
template <class T>
void transpose(int64_t n, int64_t k, const T* weight, T* out, int64_t row) {
    constexpr int64_t L = Number<T>::lanes;
    for (int64_t k0 = 0; k0 < k; k0 += L)
        for (int64_t n0 = 0; n0 < n; n0 += L) {
            if (n0 + L <= n && k0 + L <= k) {
                transpose_block(weight + n0 * k + k0, k, out + k0 * row + n0, row);
                continue;
            }
            for (int64_t d = k0; d < (k0 + L < k ? k0 + L : k); ++d)
                for (int64_t c = n0; c < (n0 + L < n ? n0 + L : n); ++c) out[d * row + c] = weight[c * k + d];
        }
}

}  // namespace
