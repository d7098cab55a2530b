// Messages between pairs of atoms: attention of a layer, neighbor embedding, and the geometry that they are made of.
//
// A pair {i, j} is visited once and serves both directions. Suffixes: _t tangent of a value, g_ adjoint in `backward`,
// m_ adjoint in `reverse`.

#pragma once

#include <algorithm>

#include "product.h"

namespace {

// Contiguous ranges of pairs and atoms that share no atom with one another: whole molecules. One range is one task.
struct Ranges {
    int64_t n;
    const int64_t* pair;  // (n + 1,)
    const int64_t* atom;  // (n + 1,)
};

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

// One row of numbers per atom in the layouts of the layer: [q | k | v], v by head, then part, then channel.
template <class T>
struct Row {
    T *q, *k, *v;
    Row(T* y, int64_t atom, int64_t c) : q(y + atom * 5 * c), k(q + c), v(q + 2 * c) {}
};

// Filters of pairs: linear in the radial functions of the distance, made anew by every pass for some pairs at a time.
// Kept in memory, they would be the largest arrays of the network, and fetching them would cost more than making them.
template <class T>
struct Filters {
    int64_t columns, n_rbf, row;  // row: numbers in a row of the weight, see row_size
    const T *weight_t, *bias;     // (n_rbf, row), (row,)
    const T *rbf, *rbf_r;         // (P + 1, n_rbf), (P, n_rbf)
    const int32_t* active;        // (P + 1,) radial functions beyond this one are 0 at the pair's distance

    // Neighbors in the list of pairs have similar distances, so that few of the radial functions differ from 0.
    int64_t used(int64_t begin, int64_t n) const {
        int32_t most = 1;
        for (int64_t p = begin; p < begin + n; ++p) most = active[p] > most ? active[p] : most;
        return most;
    }
    void make(int64_t begin, int64_t n, T* out) const {
        product_rows<T>({n, padded(columns), used(begin, n), rbf + begin * n_rbf, weight_t, bias, n_rbf, 1, row, row,
                         out, false, true}, 0, n);
    }
    void make_r(int64_t begin, int64_t n, T* out) const {
        product_rows<T>({n, padded(columns), used(begin, n), rbf_r + begin * n_rbf, weight_t, nullptr, n_rbf, 1, row,
                         row, out, false, true}, 0, n);
    }
    // Add the gradient of the weight (n_rbf, row), and in one more row of the bias, from adjoints of n filters.
    void gradient(int64_t begin, int64_t n, const T* g, const T* g_r, T* out) const {
        const int64_t m = used(begin, n);
        product_rows<T>({m, padded(columns), n, rbf + begin * n_rbf, g, nullptr, 1, n_rbf, row, row, out, true, true}, 0,
                        m);
        if (g_r)
            product_rows<T>({m, padded(columns), n, rbf_r + begin * n_rbf, g_r, nullptr, 1, n_rbf, row, row, out, true,
                             true}, 0, m);
        column_sum(n, columns, g, row, out + n_rbf * row);
    }
    int64_t gradient_size() const { return (n_rbf + 1) * row; }
};

constexpr int64_t TILE = 48;  // pairs whose filters are made at a time: they stay in the second-level cache

// The sum of the parts that `n` tasks have found; one after the other, so that it does not depend on which was ready first.
template <class T>
void add_parts(int64_t n, const T* parts, int64_t size, T* out) {
    std::memcpy(out, parts, size * sizeof(T));
    for (int64_t t = 1; t < n; ++t)
        for (int64_t c = 0; c < size; ++c) out[c] += parts[t * size + c];
}

template <class T>
struct Scratch {
    T* next;
    explicit Scratch(int64_t size) : next(scratch_memory<T, PAIRS>(size)) {}
    T* take(int64_t size) {
        T* p = next;
        next += padded(size);
        return p;
    }
};

template <class T, int W, int CC, int HH>
void pair_forward(const Sizes s, const Ranges ranges, const int32_t* first, const int32_t* second,
                  const Geometry<T>* geometry, const Filters<T> f, const T* y, const T* vec, T* score, T* score_self,
                  T* x_out, T* v_out) {
    typedef Vec<T, W> V;
    const int64_t C = CC ? CC : s.channels, H = HH ? HH : s.heads, D = C / H, H2 = padded(2 * H);
    constexpr int L = Number<T>::lanes;
#pragma omp parallel for schedule(dynamic, 1) if (ranges.n > 1)
    for (int64_t t = 0; t < ranges.n; ++t) {
        Scratch<T> scratch(padded(4 * C) + (2 + W) * H2 + TILE * f.row);
        T *tile = scratch.take(TILE * f.row), *d = scratch.take(4 * C), *a = scratch.take(H2), *A = scratch.take(H2);
        T* by_head = scratch.take(H2 * W);
        const int64_t a0 = ranges.atom[t], a1 = ranges.atom[t + 1];
        std::memset(x_out + a0 * C, 0, (a1 - a0) * C * sizeof(T));
        std::memset(v_out + a0 * 3 * C, 0, (a1 - a0) * 3 * C * sizeof(T));
        const auto filters = [&](int64_t row) {
            for (int64_t c = 0; c < 4 * C; c += W) {
                const V x = load<T, W>(tile + row * f.row + c);
                store<T, W>(d + c, x * sigmoid<T, W>(x));
            }
        };
        const auto attention = [&](int64_t n, T phi) {
            for (int64_t h = 0; h < n; h += L) {
                const Vec<T, L> x = load<T, L>(a + h);
                store<T, L>(A + h, x * sigmoid<T, L>(x) * phi);
            }
        };
        for (int64_t p0 = ranges.pair[t], p1; p0 < ranges.pair[t + 1]; p0 = p1) {
        p1 = p0 + TILE < ranges.pair[t + 1] ? p0 + TILE : ranges.pair[t + 1];
        f.make(p0, p1 - p0, tile);
        for (int64_t p = p0; p < p1; ++p) {
            const Geometry<T>& g = geometry[p];
            const int64_t i = first[p], j = second[p];
            const Row<const T> ri(y, i, C), rj(y, j, C);
            filters(p - p0);
            for (int64_t h = 0; h < H; ++h) {
                V ij = {}, ji = {};
                for (int64_t c = h * D; c < h * D + D; c += W) {
                    const V fk = load<T, W>(d + c);
                    ij += load<T, W>(ri.q + c) * load<T, W>(rj.k + c) * fk;
                    ji += load<T, W>(rj.q + c) * load<T, W>(ri.k + c) * fk;
                }
                store<T, W>(by_head + h * W, ij);
                store<T, W>(by_head + (H + h) * W, ji);
            }
            sums<T, W>(H2, by_head, a);
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
        }
        f.make(s.p, 1, tile);
        filters(0);
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
                   const Geometry<T>* geometry, const Filters<T> f, const T* y, const T* vec, const T* score,
                   const T* score_self, const T* g_x, const T* g_v, T* g_y, T* g_vec, Change<T>* g_change,
                   T* g_filters) {
    typedef Vec<T, W> V;
    const int64_t C = CC ? CC : s.channels, H = HH ? HH : s.heads, D = C / H, H2 = padded(2 * H);
    constexpr int L = Number<T>::lanes;
    const int64_t parts_size = FILTERS ? ranges.n * f.gradient_size() : 0;
    T* parts = zeroed(scratch_memory<T, PARTS>(parts_size), parts_size);
#pragma omp parallel for schedule(dynamic, 1) if (ranges.n > 1)
    for (int64_t t = 0; t < ranges.n; ++t) {
        Scratch<T> scratch(2 * padded(4 * C) + (4 + W) * H2 + 3 * TILE * f.row);
        T *tile = scratch.take(TILE * f.row), *tile_r = scratch.take(TILE * f.row), *g_tile = scratch.take(TILE * f.row);
        T* gradient = FILTERS ? parts + t * f.gradient_size() : nullptr;
        T *d = scratch.take(4 * C), *s1 = scratch.take(4 * C), *by_head = scratch.take(H2 * W);
        T *gA = scratch.take(H2), *A = scratch.take(H2), *ga = scratch.take(H2), *act = scratch.take(H2);
        const int64_t a0 = ranges.atom[t], a1 = ranges.atom[t + 1];
        std::memset(g_y + a0 * 5 * C, 0, (a1 - a0) * 5 * C * sizeof(T));
        const auto filters = [&](int64_t row) {
            for (int64_t c = 0; c < 4 * C; c += W) {
                V v0, v1, unused;
                silu<T, W, 1>(load<T, W>(tile + row * f.row + c), v0, v1, unused);
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
        for (int64_t p0 = ranges.pair[t], p1; p0 < ranges.pair[t + 1]; p0 = p1) {
        p1 = p0 + TILE < ranges.pair[t + 1] ? p0 + TILE : ranges.pair[t + 1];
        f.make(p0, p1 - p0, tile);
        if (GEOMETRY) f.make_r(p0, p1 - p0, tile_r);
        for (int64_t p = p0; p < p1; ++p) {
            const Geometry<T>& g = geometry[p];
            const int64_t atoms[2] = {first[p], second[p]};
            filters(p - p0);
            const Row<const T> v[2] = {{y, atoms[0], C}, {y, atoms[1], C}};
            const Row<T> m[2] = {{g_y, atoms[0], C}, {g_y, atoms[1], C}};
            for (int64_t h = 0; h < H; ++h) {
                V own[2] = {};
                for (int64_t e = 0; e < D; e += W) {
                    const int64_t c = h * D + e, part = 3 * h * D + e;
                    const V f1 = load<T, W>(d + C + part);
                    for (int i = 0; i < 2; ++i)
                        own[i] += load<T, W>(g_x + atoms[i] * C + c) * load<T, W>(v[1 - i].v + part) * f1;
                }
                for (int i = 0; i < 2; ++i) store<T, W>(by_head + (i * H + h) * W, own[i]);
            }
            sums<T, W>(H2, by_head, gA);
            attention(score + p * 2 * H, 2 * H, g.phi);
            V g_r = {}, g_vphi = {}, g_unit[3] = {};
            const T *from_r = tile_r + (p - p0) * f.row;
            T* to = g_tile + (p - p0) * f.row;
            const auto filter = [&](int64_t at, V g_f) {  // adjoint of a filter, through silu
                const V g_pre = g_f * load<T, W>(s1 + at);
                if (GEOMETRY) g_r += g_pre * load<T, W>(from_r + at);
                if (FILTERS) store<T, W>(to + at, g_pre);
            };
            // One part of the filters at a time, for both directions, as in `pair_reverse`.
            for (int64_t h = 0; h < H; ++h)
                for (int64_t e = 0; e < D; e += W) {
                    const int64_t c = h * D + e, part = 3 * h * D + e;
                    const V f0 = load<T, W>(d + c), f1 = load<T, W>(d + C + part);
                    V gf0 = {}, gf1 = {};
#pragma GCC unroll 2
                    for (int i = 0; i < 2; ++i) {
                        const T g_a = ga[i * H + h];
                        const V q = load<T, W>(v[i].q + c), k = load<T, W>(v[1 - i].k + c);
                        add<T, W>(m[i].q + c, g_a * k * f0);
                        add<T, W>(m[1 - i].k + c, g_a * q * f0);
                        gf0 += g_a * q * k;
                        const V gm = A[i * H + h] * load<T, W>(g_x + atoms[i] * C + c);
                        add<T, W>(m[1 - i].v + part, gm * f1);
                        gf1 += gm * load<T, W>(v[1 - i].v + part);
                    }
                    filter(c, gf0);
                    filter(C + part, gf1);
                }
            for (int64_t h = 0; h < H; ++h)
                for (int64_t e = 0; e < D; e += W) {
                    const int64_t c = h * D + e, part = 3 * h * D + D + e;
                    const V f2 = load<T, W>(d + C + part), f3 = load<T, W>(d + C + part + D);
                    V gf2 = {}, gf3 = {};
#pragma GCC unroll 2
                    for (int i = 0; i < 2; ++i) {
                        const int64_t here = 3 * atoms[i] * C + c, there = 3 * atoms[1 - i] * C + c;
                        const T vphi = i ? -g.vphi : g.vphi;  // the other direction has the opposite unit vector
                        const V u3 = load<T, W>(v[1 - i].v + part + D), u3f3 = u3 * f3;
                        V along = {}, turned = {};
                        for (int b = 0; b < 3; ++b) {
                            const V gv = load<T, W>(g_v + here + b * C);
                            along += gv * g.unit[b];
                            if (s.has_vec) turned += gv * load<T, W>(vec + there + b * C);
                            if (GEOMETRY) g_unit[b] += gv * (u3f3 * vphi);
                        }
                        const V g3 = along * vphi;
                        add<T, W>(m[1 - i].v + part + D, g3 * f3);
                        gf3 += g3 * u3;
                        if (GEOMETRY) g_vphi += (i ? -along : along) * u3f3;
                        if (s.has_vec) {
                            const V u2 = load<T, W>(v[1 - i].v + part), u2f2 = u2 * f2, n2 = u2f2 * g.vphi;
                            for (int b = 0; b < 3; ++b)
                                add<T, W>(g_vec + there + b * C, load<T, W>(g_v + here + b * C) * n2);
                            const V g2 = turned * g.vphi;
                            add<T, W>(m[1 - i].v + part, g2 * f2);
                            gf2 += g2 * u2;
                            if (GEOMETRY) g_vphi += turned * u2f2;
                        }
                    }
                    filter(C + part, gf2);
                    filter(C + part + D, gf3);
                }
            if (GEOMETRY) {
                T g_phi = 0;
                for (int64_t h = 0; h < 2 * H; ++h) g_phi += gA[h] * act[h];
                g_change[p].r += sum<T, W>(g_r) + g_phi * g.phi_r + sum<T, W>(g_vphi) * g.vphi_r;
                for (int k = 0; k < 3; ++k) g_change[p].unit[k] += sum<T, W>(g_unit[k]);
            }
        }
        if (FILTERS) f.gradient(p0, p1 - p0, g_tile, nullptr, gradient);
        }
        f.make(s.p, 1, tile);
        filters(0);
        T* own_gd = g_tile;
        std::memset(own_gd, 0, 4 * C * sizeof(T));
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
        if (FILTERS) {
            for (int64_t c = 0; c < 4 * C; c += W) store<T, W>(own_gd + c, load<T, W>(own_gd + c) * load<T, W>(s1 + c));
            f.gradient(s.p, 1, own_gd, nullptr, gradient);
        }
    }
    if (FILTERS) add_parts(ranges.n, parts, f.gradient_size(), g_filters);
}

template <class T, int W, int CC, int HH>
void pair_tangent(const Sizes s, const Ranges ranges, const int32_t* first, const int32_t* second,
                  const Geometry<T>* geometry, const Change<T>* change, const Filters<T> f, const T* y, const T* y_t,
                  const T* vec, const T* vec_t, const T* score, const T* score_self, T* score_t, T* score_self_t, T* x_t, T* v_t) {
    typedef Vec<T, W> V;
    const int64_t C = CC ? CC : s.channels, H = HH ? HH : s.heads, D = C / H, H2 = padded(2 * H);
    constexpr int L = Number<T>::lanes;
#pragma omp parallel for schedule(dynamic, 1) if (ranges.n > 1)
    for (int64_t t = 0; t < ranges.n; ++t) {
        Scratch<T> scratch(2 * padded(4 * C) + (3 + W) * H2 + 2 * TILE * f.row);
        T *tile = scratch.take(TILE * f.row), *tile_r = scratch.take(TILE * f.row);
        T *d = scratch.take(4 * C), *dt = scratch.take(4 * C), *by_head = scratch.take(H2 * W);
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
        for (int64_t p0 = ranges.pair[t], p1; p0 < ranges.pair[t + 1]; p0 = p1) {
        p1 = p0 + TILE < ranges.pair[t + 1] ? p0 + TILE : ranges.pair[t + 1];
        f.make(p0, p1 - p0, tile);
        f.make_r(p0, p1 - p0, tile_r);
        for (int64_t p = p0; p < p1; ++p) {
            const Geometry<T>& g = geometry[p];
            const T r_t = change[p].r, phi_t = g.phi_r * r_t, vphi_t = g.vphi_r * r_t;
            const int64_t atoms[2] = {first[p], second[p]};
            for (int64_t c = 0; c < 4 * C; c += W) {
                V v0, v1, unused;
                silu<T, W, 1>(load<T, W>(tile + (p - p0) * f.row + c), v0, v1, unused);
                store<T, W>(d + c, v0);
                store<T, W>(dt + c, v1 * load<T, W>(tile_r + (p - p0) * f.row + c) * r_t);
            }
            const Row<const T> v[2] = {{y, atoms[0], C}, {y, atoms[1], C}}, vt[2] = {{y_t, atoms[0], C}, {y_t, atoms[1], C}};
            for (int64_t h = 0; h < H; ++h) {
                V own[2] = {};
                for (int64_t c = h * D; c < h * D + D; c += W) {
                    const V f0 = load<T, W>(d + c), f_t = load<T, W>(dt + c);
#pragma GCC unroll 2
                    for (int i = 0; i < 2; ++i) {
                        const V q = load<T, W>(v[i].q + c), k = load<T, W>(v[1 - i].k + c);
                        own[i] += (load<T, W>(vt[i].q + c) * k + q * load<T, W>(vt[1 - i].k + c)) * f0 + q * k * f_t;
                    }
                }
                for (int i = 0; i < 2; ++i) store<T, W>(by_head + (i * H + h) * W, own[i]);
            }
            sums<T, W>(H2, by_head, at);
            std::memcpy(score_t + p * 2 * H, at, 2 * H * sizeof(T));
            attention(score + p * 2 * H, 2 * H, g.phi, phi_t);
            for (int64_t h = 0; h < H; ++h)
                for (int64_t e = 0; e < D; e += W) {
                    const int64_t c = h * D + e, part = 3 * h * D + e;
                    const V f0 = load<T, W>(d + C + part), f_t = load<T, W>(dt + C + part);
#pragma GCC unroll 2
                    for (int i = 0; i < 2; ++i) {
                        const V u = load<T, W>(v[1 - i].v + part), u_t = load<T, W>(vt[1 - i].v + part);
                        add<T, W>(x_t + atoms[i] * C + c, At[i * H + h] * (u * f0) + A[i * H + h] * (u_t * f0 + u * f_t));
                    }
                }
            for (int64_t h = 0; h < H; ++h)
                for (int64_t e = 0; e < D; e += W) {
                    const int64_t c = h * D + e, part = 3 * h * D + D + e;
                    const V f3 = load<T, W>(d + C + part + D), f3_t = load<T, W>(dt + C + part + D);
                    const V f2 = load<T, W>(d + C + part), f2_t = load<T, W>(dt + C + part);
#pragma GCC unroll 2
                    for (int i = 0; i < 2; ++i) {
                        const int64_t here = 3 * atoms[i] * C + c, there = 3 * atoms[1 - i] * C + c;
                        const T sign = i ? T(-1) : T(1);  // the other direction has the opposite unit vector
                        const V u3 = load<T, W>(v[1 - i].v + part + D), n3 = u3 * f3 * (sign * g.vphi);
                        const V n3_t = (load<T, W>(vt[1 - i].v + part + D) * f3 + u3 * f3_t) * (sign * g.vphi) +
                                       u3 * f3 * (sign * vphi_t);
                        V n2 = {}, n2_t = {};
                        if (s.has_vec) {
                            const V u2 = load<T, W>(v[1 - i].v + part);
                            n2 = u2 * f2 * g.vphi;
                            n2_t = (load<T, W>(vt[1 - i].v + part) * f2 + u2 * f2_t) * g.vphi + u2 * f2 * vphi_t;
                        }
                        for (int b = 0; b < 3; ++b) {
                            V out = n3 * change[p].unit[b] + n3_t * g.unit[b];
                            if (s.has_vec)
                                out += load<T, W>(vec_t + there + b * C) * n2 + load<T, W>(vec + there + b * C) * n2_t;
                            add<T, W>(v_t + here + b * C, out);
                        }
                    }
                }
        }
        }
        f.make(s.p, 1, tile);
        for (int64_t c = 0; c < 4 * C; c += W) {
            const V x = load<T, W>(tile + c);
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
                  const Geometry<T>* geometry, const Change<T>* change, const Filters<T> f, const T* y, const T* y_t,
                  const T* vec, const T* vec_t, const T* score, const T* score_self, const T* score_t, const T* score_self_t, const T* g_x, const T* g_v, const T* m_x, const T* m_v,
                  T* m_y, T* m_vec, T* m_filters) {
    typedef Vec<T, W> V;
    const int64_t C = CC ? CC : s.channels, H = HH ? HH : s.heads, D = C / H, H2 = padded(2 * H);
    constexpr int L = Number<T>::lanes;
    T* parts = zeroed(scratch_memory<T, PARTS>(ranges.n * f.gradient_size()), ranges.n * f.gradient_size());
#pragma omp parallel for schedule(dynamic, 1) if (ranges.n > 1)
    for (int64_t t = 0; t < ranges.n; ++t) {
        Scratch<T> scratch(4 * padded(4 * C) + (8 + 2 * W) * H2 + 4 * TILE * f.row);
        T *tile = scratch.take(TILE * f.row), *tile_r = scratch.take(TILE * f.row);
        T *m_tile = scratch.take(TILE * f.row), *m_tile_r = scratch.take(TILE * f.row);
        T* gradient = parts + t * f.gradient_size();
        T *d = scratch.take(4 * C), *dt = scratch.take(4 * C), *s1 = scratch.take(4 * C), *s2 = scratch.take(4 * C);
        T *by_head = scratch.take(H2 * W), *by_head_t = scratch.take(H2 * W);
        T *a = scratch.take(H2), *at = scratch.take(H2), *mA = scratch.take(H2), *mAt = scratch.take(H2);
        T *A = scratch.take(H2), *At = scratch.take(H2), *ma = scratch.take(H2), *mat = scratch.take(H2);
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
        for (int64_t p0 = ranges.pair[t], p1; p0 < ranges.pair[t + 1]; p0 = p1) {
        p1 = p0 + TILE < ranges.pair[t + 1] ? p0 + TILE : ranges.pair[t + 1];
        f.make(p0, p1 - p0, tile);
        f.make_r(p0, p1 - p0, tile_r);
        for (int64_t p = p0; p < p1; ++p) {
            const Geometry<T>& g = geometry[p];
            const T r_t = change[p].r, phi_t = g.phi_r * r_t, vphi_t = g.vphi_r * r_t;
            const int64_t atoms[2] = {first[p], second[p]};
            for (int64_t c = 0; c < 4 * C; c += W) {
                V v0, v1, v2;
                silu<T, W, 2>(load<T, W>(tile + (p - p0) * f.row + c), v0, v1, v2);
                const V pre_t = load<T, W>(tile_r + (p - p0) * f.row + c) * r_t;
                store<T, W>(d + c, v0);
                store<T, W>(dt + c, v1 * pre_t);
                store<T, W>(s1 + c, v1);
                store<T, W>(s2 + c, v2 * pre_t);
            }
            const Row<const T> v[2] = {{y, atoms[0], C}, {y, atoms[1], C}}, vt[2] = {{y_t, atoms[0], C}, {y_t, atoms[1], C}};
            for (int64_t h = 0; h < H; ++h) {
                V sum_a[2] = {}, sum_t[2] = {};
                for (int64_t e = 0; e < D; e += W) {
                    const int64_t c = h * D + e, part = 3 * h * D + e;
                    const V f0 = load<T, W>(d + C + part), f_t = load<T, W>(dt + C + part);
#pragma GCC unroll 2
                    for (int i = 0; i < 2; ++i) {
                        const V u = load<T, W>(v[1 - i].v + part), n = u * f0;
                        const V n_t = load<T, W>(vt[1 - i].v + part) * f0 + u * f_t;
                        const V gx = load<T, W>(g_x + atoms[i] * C + c);
                        sum_a[i] += load<T, W>(m_x + atoms[i] * C + c) * n + gx * n_t;
                        sum_t[i] += gx * n;
                    }
                }
                for (int i = 0; i < 2; ++i) {
                    store<T, W>(by_head + (i * H + h) * W, sum_a[i]);
                    store<T, W>(by_head_t + (i * H + h) * W, sum_t[i]);
                }
            }
            sums<T, W>(H2, by_head, mA);
            sums<T, W>(H2, by_head_t, mAt);
            attention(score + p * 2 * H, score_t + p * 2 * H, 2 * H, g.phi, phi_t);
            T *to = m_tile + (p - p0) * f.row, *to_r = m_tile_r + (p - p0) * f.row;
            const auto filter = [&](int64_t at, V m, V m_t) {  // adjoints of a filter and its tangent, through silu
                const V f1 = load<T, W>(s1 + at);
                store<T, W>(to + at, m * f1 + m_t * load<T, W>(s2 + at));
                store<T, W>(to_r + at, m_t * f1 * r_t);
            };
            const Row<T> m[2] = {{m_y, atoms[0], C}, {m_y, atoms[1], C}};
            // One part of the filters at a time, for both directions: more would not fit into the registers.
            for (int64_t h = 0; h < H; ++h)
                for (int64_t c = h * D; c < h * D + D; c += W) {
                    const V f0 = load<T, W>(d + c), f_t = load<T, W>(dt + c);
                    V mf = {}, mf_t = {};
#pragma GCC unroll 2
                    for (int i = 0; i < 2; ++i) {
                        const T m0 = ma[i * H + h], m1 = mat[i * H + h];
                        const V q = load<T, W>(v[i].q + c), k = load<T, W>(v[1 - i].k + c), qk = q * k;
                        const V q_t = load<T, W>(vt[i].q + c), k_t = load<T, W>(vt[1 - i].k + c);
                        const V own = m0 * f0 + m1 * f_t, both = m1 * f0;
                        add<T, W>(m[i].q + c, own * k + both * k_t);
                        add<T, W>(m[1 - i].k + c, own * q + both * q_t);
                        mf += m0 * qk + m1 * (q_t * k + q * k_t);
                        mf_t += m1 * qk;
                    }
                    filter(c, mf, mf_t);
                }
            for (int64_t h = 0; h < H; ++h)
                for (int64_t e = 0; e < D; e += W) {
                    const int64_t c = h * D + e, part = 3 * h * D + e;
                    const V f0 = load<T, W>(d + C + part), f_t = load<T, W>(dt + C + part);
                    V mf = {}, mf_t = {};
#pragma GCC unroll 2
                    for (int i = 0; i < 2; ++i) {
                        const V gx = load<T, W>(g_x + atoms[i] * C + c), mx = load<T, W>(m_x + atoms[i] * C + c);
                        const V u = load<T, W>(v[1 - i].v + part), u_t = load<T, W>(vt[1 - i].v + part);
                        const V mm = A[i * H + h] * mx + At[i * H + h] * gx, mm_t = A[i * H + h] * gx;
                        add<T, W>(m[1 - i].v + part, mm * f0 + mm_t * f_t);
                        mf += mm * u + mm_t * u_t;
                        mf_t += mm_t * u;
                    }
                    filter(C + part, mf, mf_t);
                }
            for (int64_t h = 0; h < H; ++h)
                for (int64_t e = 0; e < D; e += W) {
                    const int64_t c = h * D + e, part = 3 * h * D + 2 * D + e;
                    const V f0 = load<T, W>(d + C + part), f_t = load<T, W>(dt + C + part);
                    V mf = {}, mf_t = {};
#pragma GCC unroll 2
                    for (int i = 0; i < 2; ++i) {
                        const T sign = i ? T(-1) : T(1);
                        V mn = {}, mn_t = {};
                        for (int b = 0; b < 3; ++b) {
                            const V gv = load<T, W>(g_v + (3 * atoms[i] + b) * C + c);
                            mn_t += gv * g.unit[b];
                            mn += load<T, W>(m_v + (3 * atoms[i] + b) * C + c) * g.unit[b] + gv * change[p].unit[b];
                        }
                        const V u = load<T, W>(v[1 - i].v + part), u_t = load<T, W>(vt[1 - i].v + part);
                        const V own = mn * (sign * g.vphi) + mn_t * (sign * vphi_t), along = mn_t * (sign * g.vphi);
                        add<T, W>(m[1 - i].v + part, own * f0 + along * f_t);
                        mf += own * u + along * u_t;
                        mf_t += along * u;
                    }
                    filter(C + part, mf, mf_t);
                }
            for (int64_t h = 0; h < H; ++h)
                for (int64_t e = 0; e < D; e += W) {
                    const int64_t c = h * D + e, part = 3 * h * D + D + e;
                    V mf = {}, mf_t = {};
                    if (s.has_vec) {
                        const V f0 = load<T, W>(d + C + part), f_t = load<T, W>(dt + C + part);
#pragma GCC unroll 2
                        for (int i = 0; i < 2; ++i) {
                            const int64_t here = 3 * atoms[i] * C + c, there = 3 * atoms[1 - i] * C + c;
                            const V u = load<T, W>(v[1 - i].v + part), u_t = load<T, W>(vt[1 - i].v + part);
                            const V n = u * f0 * g.vphi, n_t = (u_t * f0 + u * f_t) * g.vphi + u * f0 * vphi_t;
                            V mn = {}, mn_t = {};
                            for (int b = 0; b < 3; ++b) {
                                const V gv = load<T, W>(g_v + here + b * C), mv = load<T, W>(m_v + here + b * C);
                                const V w = load<T, W>(vec + there + b * C);
                                mn_t += gv * w;
                                mn += mv * w + gv * load<T, W>(vec_t + there + b * C);
                                add<T, W>(m_vec + there + b * C, mv * n + gv * n_t);
                            }
                            const V own = mn * g.vphi + mn_t * vphi_t, along = mn_t * g.vphi;
                            add<T, W>(m[1 - i].v + part, own * f0 + along * f_t);
                            mf += own * u + along * u_t;
                            mf_t += along * u;
                        }
                    }
                    filter(C + part, mf, mf_t);
                }
        }
        f.gradient(p0, p1 - p0, m_tile, m_tile_r, gradient);
        }
        f.make(s.p, 1, tile);
        for (int64_t c = 0; c < 4 * C; c += W) {
            V v0, v1, unused;
            silu<T, W, 1>(load<T, W>(tile + c), v0, v1, unused);
            store<T, W>(d + c, v0);
            store<T, W>(s1 + c, v1);
        }
        T* own_md = m_tile;
        std::memset(own_md, 0, 4 * C * sizeof(T));
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
        for (int64_t c = 0; c < 4 * C; c += W) store<T, W>(own_md + c, load<T, W>(own_md + c) * load<T, W>(s1 + c));
        f.gradient(s.p, 1, own_md, nullptr, gradient);
    }
    add_parts(ranges.n, parts, f.gradient_size(), m_filters);
}

// ---------------------------------------------------------------------------------------------- neighbor embedding

// Sum over neighbors of emb_j w(r), where w is a filter times the cutoff function.
template <class T, int W>
void embed_forward(const Sizes s, const int32_t* first, const int32_t* second, const Geometry<T>* geometry,
                   const Filters<T> f, const T* emb, T* out) {
    typedef Vec<T, W> V;
    const int64_t C = s.channels;
    T* tile = scratch_memory<T, PAIRS>(TILE * f.row);
    std::memset(out, 0, s.n * C * sizeof(T));
    for (int64_t p = 0; p < s.p; ++p) {
        if (p % TILE == 0) f.make(p, s.p - p < TILE ? s.p - p : TILE, tile);
        const int64_t i = first[p] * C, j = second[p] * C;
        for (int64_t c = 0; c < C; c += W) {
            const V w = load<T, W>(tile + p % TILE * f.row + c) * geometry[p].phi;
            add<T, W>(out + i + c, load<T, W>(emb + j + c) * w);
            add<T, W>(out + j + c, load<T, W>(emb + i + c) * w);
        }
    }
}

// With `g_change`: adjoints of the distances are added; with `g_filters`: gradient of weight and bias, and g_emb.
template <class T, int W>
void embed_backward(const Sizes s, const int32_t* first, const int32_t* second, const Geometry<T>* geometry,
                    const Filters<T> f, const T* emb, const T* g_out, Change<T>* g_change, T* g_filters, T* g_emb) {
    typedef Vec<T, W> V;
    const int64_t C = s.channels;
    T *tile = scratch_memory<T, PAIRS>(3 * TILE * f.row), *tile_r = tile + TILE * f.row, *g_tile = tile_r + TILE * f.row;
    if (g_filters) {
        std::memset(g_filters, 0, f.gradient_size() * sizeof(T));
        std::memset(g_emb, 0, s.n * C * sizeof(T));
    }
    for (int64_t p0 = 0; p0 < s.p; p0 += TILE) {
        const int64_t n = s.p - p0 < TILE ? s.p - p0 : TILE;
        f.make(p0, n, tile);
        if (g_change) f.make_r(p0, n, tile_r);
        for (int64_t p = p0; p < p0 + n; ++p) {
            const int64_t i = first[p] * C, j = second[p] * C, at = (p - p0) * f.row;
            const T phi = geometry[p].phi, phi_r = geometry[p].phi_r;
            V g_r = {};
            for (int64_t c = 0; c < C; c += W) {
                const V x = load<T, W>(tile + at + c), gi = load<T, W>(g_out + i + c), gj = load<T, W>(g_out + j + c);
                const V gw = gi * load<T, W>(emb + j + c) + gj * load<T, W>(emb + i + c);
                if (g_change) g_r += gw * (load<T, W>(tile_r + at + c) * phi + x * phi_r);
                if (g_filters) {
                    store<T, W>(g_tile + at + c, gw * phi);
                    add<T, W>(g_emb + j + c, gi * x * phi);
                    add<T, W>(g_emb + i + c, gj * x * phi);
                }
            }
            if (g_change) g_change[p].r += sum<T, W>(g_r);
        }
        if (g_filters) f.gradient(p0, n, g_tile, nullptr, g_filters);
    }
}

template <class T, int W>
void embed_tangent(const Sizes s, const int32_t* first, const int32_t* second, const Geometry<T>* geometry,
                   const Change<T>* change, const Filters<T> f, const T* emb, T* out_t) {
    typedef Vec<T, W> V;
    const int64_t C = s.channels;
    T *tile = scratch_memory<T, PAIRS>(2 * TILE * f.row), *tile_r = tile + TILE * f.row;
    std::memset(out_t, 0, s.n * C * sizeof(T));
    for (int64_t p = 0; p < s.p; ++p) {
        if (p % TILE == 0) {
            f.make(p, s.p - p < TILE ? s.p - p : TILE, tile);
            f.make_r(p, s.p - p < TILE ? s.p - p : TILE, tile_r);
        }
        const int64_t i = first[p] * C, j = second[p] * C, at = p % TILE * f.row;
        const T phi = geometry[p].phi * change[p].r, phi_r = geometry[p].phi_r * change[p].r;
        for (int64_t c = 0; c < C; c += W) {
            const V w_t = load<T, W>(tile_r + at + c) * phi + load<T, W>(tile + at + c) * phi_r;
            add<T, W>(out_t + i + c, load<T, W>(emb + j + c) * w_t);
            add<T, W>(out_t + j + c, load<T, W>(emb + i + c) * w_t);
        }
    }
}

template <class T, int W>
void embed_reverse(const Sizes s, const int32_t* first, const int32_t* second, const Geometry<T>* geometry,
                   const Change<T>* change, const Filters<T> f, const T* emb, const T* g_out, const T* m_out,
                   T* m_filters, T* m_emb) {
    typedef Vec<T, W> V;
    const int64_t C = s.channels;
    T *tile = scratch_memory<T, PAIRS>(4 * TILE * f.row), *tile_r = tile + TILE * f.row, *m_tile = tile_r + TILE * f.row;
    T* m_tile_r = m_tile + TILE * f.row;
    std::memset(m_filters, 0, f.gradient_size() * sizeof(T));
    std::memset(m_emb, 0, s.n * C * sizeof(T));
    for (int64_t p0 = 0; p0 < s.p; p0 += TILE) {
        const int64_t n = s.p - p0 < TILE ? s.p - p0 : TILE;
        f.make(p0, n, tile);
        f.make_r(p0, n, tile_r);
        for (int64_t p = p0; p < p0 + n; ++p) {
            const int64_t i = first[p] * C, j = second[p] * C, at = (p - p0) * f.row;
            const T phi = geometry[p].phi, phi_t = geometry[p].phi_r * change[p].r, r_t = change[p].r;
            for (int64_t c = 0; c < C; c += W) {
                const V x = load<T, W>(tile + at + c), w = x * phi;
                const V w_t = load<T, W>(tile_r + at + c) * (r_t * phi) + x * phi_t;
                const V gi = load<T, W>(g_out + i + c), gj = load<T, W>(g_out + j + c);
                const V mi = load<T, W>(m_out + i + c), mj = load<T, W>(m_out + j + c);
                const V ei = load<T, W>(emb + i + c), ej = load<T, W>(emb + j + c);
                const V mw = mi * ej + mj * ei, mw_t = gi * ej + gj * ei;
                store<T, W>(m_tile + at + c, mw * phi + mw_t * phi_t);
                store<T, W>(m_tile_r + at + c, mw_t * (r_t * phi));
                add<T, W>(m_emb + j + c, mi * w + gi * w_t);
                add<T, W>(m_emb + i + c, mj * w + gj * w_t);
            }
        }
        f.gradient(p0, n, m_tile, m_tile_r, m_filters);
    }
}

// ------------------------------------------------------------------------------------------------------------ geometry

inline uint64_t mixed(uint64_t a, uint64_t b) {  // a hash of two numbers: splitmix64's finalizer
    uint64_t h = a * 0x9E3779B97F4A7C15ull + b + 0x632BE59BD9B4E019ull;
    h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9ull;
    h = (h ^ (h >> 27)) * 0x94D049BB133111EBull;
    return h ^ (h >> 31);
}

constexpr int64_t SORTED = 512;  // so many pairs at a time are sorted by distance: see Filters::used

template <class T>
void sort_pairs(int64_t n, int32_t* first, int32_t* second, T* edge) {
    struct Pair {
        T square, edge[3];
        int32_t first, second;
    };
    Pair pairs[SORTED];
    for (int64_t p = 0; p < n; ++p) {
        const T* d = edge + 3 * p;
        pairs[p] = {d[0] * d[0] + d[1] * d[1] + d[2] * d[2], {d[0], d[1], d[2]}, first[p], second[p]};
        if (!(pairs[p].square >= 0)) pairs[p].square = 0;  // NaN has no place in an order
    }
    std::stable_sort(pairs, pairs + n, [](const Pair& a, const Pair& b) { return a.square < b.square; });
    for (int64_t p = 0; p < n; ++p) {
        first[p] = pairs[p].first;
        second[p] = pairs[p].second;
        std::memcpy(edge + 3 * p, pairs[p].edge, sizeof(pairs[p].edge));
    }
}

// One of the two directions of every edge that is not longer than the cutoff, by structure and distance: returns the
// number of pairs, or -1 if the edges are not symmetric or an atomic number is not below `max_z`. `edge` (P, 3) is
// pos[second] + shift - pos[first].
template <class T>
int64_t find_pairs(int64_t n_edges, int64_t n, int64_t max_z, const int64_t* src, const int64_t* dst, const T* shift,
                   const T* pos, const int64_t* system, const int64_t* z, T cutoff, int64_t room, int32_t* first,
                   int32_t* second, T* edge) {
    for (int64_t i = 0; i < n; ++i)
        if (z[i] < 0 || z[i] >= max_z) return -1;
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
        if (found == room) return -1;
        first[found] = i;
        second[found] = j;
        for (int k = 0; k < 3; ++k) edge[3 * found + k] = d[k];
        ++found;
    }
    if (balance != 0) return -1;
    for (int64_t begin = 0, end; begin < found; begin = end) {
        for (end = begin; end < found && end < begin + SORTED && system[first[end]] == system[first[begin]];) ++end;
        sort_pairs(end - begin, first + begin, second + begin, edge + 3 * begin);
    }
    return found;
}

// Geometry of the pairs, and the radial functions of their distances (row P: distance 0) and derivatives by distance.
template <class T>
void radial(int64_t p, int64_t K, T cutoff, int64_t vector_cutoff, const T* edge, const T* means, const T* betas,
            Geometry<T>* geometry, T* rbf, T* rbf_r, int32_t* active) {
    const T pi = T(3.14159265358979323846), alpha = T(5) / cutoff;
    constexpr int L = Number<T>::lanes;
    const int64_t K2 = padded(K);
    T *mean = zeroed(scratch_memory<T, PAIRS>(3 * K2), 3 * K2), *beta = mean + K2, *value = beta + K2;
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
        active[e] = int32_t(K);
        while (active[e] > 1 && value[active[e] - 1] < Number<T>::nothing) --active[e];
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
