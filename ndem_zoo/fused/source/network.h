// The four passes over a whole network, each one call, with memory laid out once (what they compute: backbone.py).

#pragma once

#include "atoms.h"
#include "pairs.h"

namespace {

constexpr int LAYER_WEIGHTS = 15;
// Positions in the list of weights; the order is that of backbone.py.
enum { GAMMA, BETA, Q, Q_BIAS, K, K_BIAS, V_, V_BIAS, O, O_BIAS, VEC, DK, DK_BIAS, DV, DV_BIAS };
enum { EMBEDDING, NEIGHBOR, DISTANCE, DISTANCE_BIAS, COMBINE, COMBINE_BIAS, OUT_GAMMA, OUT_BETA };

// What Python hands over: sizes and addresses.
struct Description {
    int64_t n, p, channels, heads, n_rbf, layers, has_vec0, threads, n_ranges;
    const int64_t *pair_ptr, *atom_ptr, *z;
    const int32_t *first, *second, *active;
    const void *geometry, *rbf, *rbf_r;  // rbf_r null: no derivatives will be wanted
    const void* const* weights;          // layers * 15 + 8
    void* values;                        // network_size(...) numbers, which the passes share
    double eps;
};

// Hands out parts of one block of memory; without a block it only counts.
template <class T>
struct Arena {
    T* base;
    int64_t used;
    T* take(int64_t size) {
        T* p = base ? base + used : nullptr;
        used += padded(size);
        return p;
    }
};

template <class T>
struct LayerValues {
    T *qkv_t, *filter_t, *filter_bias, *o_t, *vec_t, *qkv_bias;  // weights as the passes read them
    T *unit, *inverse, *normed, *y, *w, *score, *score_self, *x_sum, *o, *vec;  // vec: before the layer
};
template <class T>
struct LayerAdjoints {
    T *x, *vec, *o, *w, *x_sum, *y, *normed;  // x, vec: after the layer
};
template <class T>
struct LayerTangents {
    T *x, *vec, *normed, *y, *w, *score, *score_self, *x_sum, *o;  // x, vec: before the layer
};

template <class T>
struct Network {
    const Description& d;
    const int64_t n, p, C, H, L;
    const int64_t qkv_row, filter_row, o_row, embed_row;
    std::vector<LayerValues<T>> layers;
    T *emb, *embed_t, *embed_bias, *first, *combine_t, *unit, *inverse;
    int64_t size;

    explicit Network(const Description& description)
        : d(description), n(d.n), p(d.p), C(d.channels), H(d.heads), L(d.layers), qkv_row(row_size(5 * C)),
          filter_row(row_size(4 * C)), o_row(row_size(3 * C)), embed_row(row_size(C)), layers(L) {
        Arena<T> a{static_cast<T*>(d.values), 0};
        for (int64_t l = 0; l < L; ++l) {
            LayerValues<T>& v = layers[l];
            v.qkv_t = a.take(C * qkv_row);
            v.filter_t = a.take(d.n_rbf * filter_row);
            v.filter_bias = a.take(filter_row);
            v.o_t = a.take(C * o_row);
            v.vec_t = a.take(C * o_row);
            v.qkv_bias = a.take(qkv_row);
            v.unit = a.take(n * C);
            v.inverse = a.take(n);
            v.normed = a.take(n * C);
            v.y = a.take(n * 5 * C);
            v.w = has_vec(l) ? a.take(n * 9 * C) : nullptr;
            v.score = a.take(p * 2 * H);
            v.score_self = a.take(n * H);
            v.x_sum = a.take(n * C);
            v.o = a.take(n * 3 * C);
            v.vec = has_vec(l) ? a.take(n * 3 * C) : nullptr;
        }
        emb = a.take(n * C);
        embed_t = a.take(d.n_rbf * embed_row);
        embed_bias = a.take(embed_row);
        first = a.take(n * 2 * C);
        combine_t = a.take(2 * C * embed_row);
        unit = a.take(n * C);
        inverse = a.take(n);
        size = a.used;
    }

    bool has_vec(int64_t l) const { return l > 0 || d.has_vec0; }
    const T* weight(int64_t l, int which) const { return static_cast<const T*>(d.weights[l * LAYER_WEIGHTS + which]); }
    const T* other(int which) const { return weight(L, which); }
    const Geometry<T>* geometry() const { return static_cast<const Geometry<T>*>(d.geometry); }
    Sizes sizes(int64_t l) const { return {n, p, C, H, l >= 0 && has_vec(l)}; }
    Ranges ranges() const { return {d.n_ranges, d.pair_ptr, d.atom_ptr}; }
    Filters<T> filters(int64_t l) const {
        return {4 * C, d.n_rbf, filter_row, layers[l].filter_t, layers[l].filter_bias, static_cast<const T*>(d.rbf),
                static_cast<const T*>(d.rbf_r), d.active};
    }
    Filters<T> embed_filters() const {
        return {C, d.n_rbf, embed_row, embed_t, embed_bias, static_cast<const T*>(d.rbf), static_cast<const T*>(d.rbf_r), d.active};
    }

    // c = [c +] a b^T for a weight b that was transposed into rows of `row`
    void forward_product(int64_t m, int64_t n_out, int64_t k, const T* a, const T* b, int64_t row, const T* bias, T* c,
                         bool accumulate = false) const {
        product<T>({m, n_out, k, a, b, bias, k, 1, row, n_out, c, accumulate, true}, d.threads);
    }
    // c = [c +] a b for a weight b (k, n_out) as it is, and some columns of a
    void backward_product(int64_t m, int64_t n_out, int64_t k, const T* a, int64_t a_row, const T* b, int64_t b_row,
                          T* c, bool accumulate) const {
        product<T>({m, n_out, k, a, b, nullptr, a_row, 1, b_row, n_out, c, accumulate}, d.threads);
    }
    // c += g^T x over m rows: the gradient of a weight (n_out, k)
    void weight_gradient(int64_t m, int64_t n_out, int64_t k, const T* g, int64_t g_row, const T* x, int64_t x_row,
                         T* c) const {
        product<T>({n_out, k, m, g, x, nullptr, 1, g_row, x_row, k, c, true}, d.threads);
    }

    // Zeros in what the columns leave of the rows: products read whole vectors.
    void clear_rest(int64_t rows, int64_t columns, T* out, int64_t row) const {
        for (int64_t r = 0; r < rows; ++r) std::memset(out + r * row + columns, 0, (row - columns) * sizeof(T));
    }
    void filled(int64_t columns, const T* bias, T* out, int64_t row) const {
        std::memcpy(out, bias, columns * sizeof(T));
        std::memset(out + columns, 0, (row - columns) * sizeof(T));
    }

    // Weights of a layer as its products read them, made right before: they are then still in the cache.
    void prepare(int64_t l) {
        LayerValues<T>& v = layers[l];
        clear_rest(C, 5 * C, v.qkv_t, qkv_row);
        transpose(C, C, weight(l, Q), v.qkv_t, qkv_row);
        transpose(C, C, weight(l, K), v.qkv_t + C, qkv_row);
        transpose(3 * C, C, weight(l, V_), v.qkv_t + 2 * C, qkv_row);
        std::memcpy(v.qkv_bias, weight(l, Q_BIAS), C * sizeof(T));
        std::memcpy(v.qkv_bias + C, weight(l, K_BIAS), C * sizeof(T));
        filled(3 * C, weight(l, V_BIAS), v.qkv_bias + 2 * C, qkv_row - 2 * C);
        clear_rest(d.n_rbf, 4 * C, v.filter_t, filter_row);
        transpose(C, d.n_rbf, weight(l, DK), v.filter_t, filter_row);
        transpose(3 * C, d.n_rbf, weight(l, DV), v.filter_t + C, filter_row);
        std::memcpy(v.filter_bias, weight(l, DK_BIAS), C * sizeof(T));
        filled(3 * C, weight(l, DV_BIAS), v.filter_bias + C, filter_row - C);
        clear_rest(C, 3 * C, v.o_t, o_row);
        transpose(3 * C, C, weight(l, O), v.o_t, o_row);
        if (!has_vec(l)) return;
        clear_rest(C, 3 * C, v.vec_t, o_row);
        transpose(3 * C, C, weight(l, VEC), v.vec_t, o_row);
    }
    void prepare() {  // those of the neighbor embedding
        clear_rest(d.n_rbf, C, embed_t, embed_row);
        transpose(C, d.n_rbf, other(DISTANCE), embed_t, embed_row);
        filled(C, other(DISTANCE_BIAS), embed_bias, embed_row);
        clear_rest(2 * C, C, combine_t, embed_row);
        transpose(C, 2 * C, other(COMBINE), combine_t, embed_row);
    }

    LayerAdjoints<T> adjoints(Arena<T>& a, int64_t l) const {
        const int64_t nw = has_vec(l) ? n * 9 * C : 0;
        return {a.take(n * C), a.take(n * 3 * C), a.take(n * 3 * C), a.take(nw), a.take(n * C), a.take(n * 5 * C),
                a.take(n * C)};
    }
    LayerTangents<T> tangents(Arena<T>& a, int64_t l) const {
        const int64_t nv = has_vec(l) ? n * 3 * C : 0;
        return {a.take(n * C), a.take(nv), a.take(n * C), a.take(n * 5 * C), a.take(3 * nv), a.take(p * 2 * H),
                a.take(n * H), a.take(n * C), a.take(n * 3 * C)};
    }
};

// What `backward` and `tangent` keep for `gradient`, in one block each.
template <class T>
struct Kept {
    std::vector<LayerAdjoints<T>> g;
    std::vector<LayerTangents<T>> t;
    T *g_out, *g_first, *g_neighbors;              // adjoints before the last norm, before the first layer
    T *x_last, *neighbors, *change;                // tangents
    int64_t adjoints_size, tangents_size;

    Kept(const Network<T>& net, T* adjoints, T* tangents) {
        Arena<T> a{adjoints, 0}, b{tangents, 0};
        for (int64_t l = 0; l < net.L; ++l) {
            g.push_back(net.adjoints(a, l));
            t.push_back(net.tangents(b, l));
        }
        g_out = a.take(net.n * net.C);
        g_first = a.take(net.n * net.C);
        g_neighbors = a.take(net.n * net.C);
        x_last = b.take(net.n * net.C);
        neighbors = b.take(net.n * net.C);
        change = b.take(net.p * 4);
        adjoints_size = a.used;
        tangents_size = b.used;
    }
};

// Adjoint of the normalized scalars from that of [q | k | v].
template <class T>
void qkv_backward(const Network<T>& net, int64_t l, const T* g_y, T* g_normed) {
    const int64_t C = net.C;
    net.backward_product(net.n, C, C, g_y, 5 * C, net.weight(l, Q), C, g_normed, false);
    net.backward_product(net.n, C, C, g_y + C, 5 * C, net.weight(l, K), C, g_normed, true);
    net.backward_product(net.n, C, 3 * C, g_y + 2 * C, 5 * C, net.weight(l, V_), C, g_normed, true);
}

// (k + 1, row), added to weight (n, k) and, from the last row, to bias (n,)
template <class T>
void add_untransposed(int64_t n, int64_t k, const T* from, int64_t row, T* weight, T* bias) {
    for (int64_t c = 0; c < n; ++c)
        for (int64_t r = 0; r < k; ++r) weight[c * k + r] += from[r * row + c];
    for (int64_t c = 0; c < n; ++c) bias[c] += from[k * row + c];
}

// How many numbers of memory the caller has to lend: 0 values, 1 adjoints, 2 tangents.
template <class T>
int64_t network_size(const Description& d, int64_t kind) {
    Description counting = d;
    counting.values = nullptr;
    const Network<T> net(counting);
    const Kept<T> kept(net, nullptr, nullptr);
    return kind == 0 ? net.size : kind == 1 ? kept.adjoints_size : kept.tangents_size;
}

template <class T, int W, int CC, int HH>
void network_forward(const Description& d, const T* vec0, T* x_out, T* vec_out) {
    Network<T> net(d);
    const int64_t n = net.n, C = net.C;
    net.prepare();
    T* memory = scratch_memory<T, PASSES>(10 * n * C);
    T *x = memory, *next = x + n * C, *v_sum = next + n * C, *sums = v_sum + 3 * n * C;
    for (int64_t i = 0; i < n; ++i) {
        std::memcpy(net.emb + i * C, net.other(NEIGHBOR) + d.z[i] * C, C * sizeof(T));
        std::memcpy(net.first + i * 2 * C, net.other(EMBEDDING) + d.z[i] * C, C * sizeof(T));
    }
    embed_forward<T, W>(net.sizes(-1), d.first, d.second, net.geometry(), net.embed_filters(), net.emb, sums);
    for (int64_t i = 0; i < n; ++i) std::memcpy(net.first + i * 2 * C + C, sums + i * C, C * sizeof(T));
    net.forward_product(n, C, 2 * C, net.first, net.combine_t, net.embed_row, net.other(COMBINE_BIAS), x);
    for (int64_t l = 0; l < net.L; ++l) {
        LayerValues<T>& v = net.layers[l];
        net.prepare(l);
        if (l == 0 && d.has_vec0) std::memcpy(v.vec, vec0, n * 3 * C * sizeof(T));
        norm_forward<T, W>(n, C, T(d.eps), x, net.weight(l, GAMMA), net.weight(l, BETA), v.unit, v.inverse, v.normed);
        net.forward_product(n, 5 * C, C, v.normed, v.qkv_t, net.qkv_row, v.qkv_bias, v.y);
        if (v.vec) net.forward_product(3 * n, 3 * C, C, v.vec, v.vec_t, net.o_row, nullptr, v.w);
        pair_forward<T, W, CC, HH>(net.sizes(l), net.ranges(), d.first, d.second, net.geometry(), net.filters(l), v.y,
                                   v.vec, v.score, v.score_self, v.x_sum, v_sum);
        net.forward_product(n, 3 * C, C, v.x_sum, v.o_t, net.o_row, net.weight(l, O_BIAS), v.o);
        T* vec_next = l + 1 < net.L ? net.layers[l + 1].vec : vec_out;
        update_forward<T, W>(n, C, x, v.vec, v.o, v.w, v_sum, next, vec_next);
        T* old = x;
        x = next;
        next = old;
    }
    norm_forward<T, W>(n, C, T(d.eps), x, net.other(OUT_GAMMA), net.other(OUT_BETA), net.unit, net.inverse, x_out);
}

// adjoints null: nothing is kept.
template <class T, int W, int CC, int HH>
void network_backward(const Description& d, const T* g_x_out, const T* g_vec_out, T* adjoints, T* g_pos) {
    const Network<T> net(d);
    const int64_t n = net.n, C = net.C;
    Kept<T> kept(net, adjoints, nullptr);
    Arena<T> a{scratch_memory<T, PASSES>(4 * net.p + 5 * n * C + (adjoints ? 0 : 23 * n * C) + 1024), 0};
    Change<T>* g_change = zeroed(reinterpret_cast<Change<T>*>(a.take(4 * net.p)), net.p);
    T *into = a.take(n * C), *current = zeroed(a.take(n * C), n * C), *current_vec = a.take(n * 3 * C);
    LayerAdjoints<T> passing = adjoints ? LayerAdjoints<T>{} : net.adjoints(a, net.L - 1);
    if (adjoints) std::memcpy(kept.g_out, g_x_out, n * C * sizeof(T));
    norm_backward<T, W>(n, C, net.unit, net.inverse, net.other(OUT_GAMMA), g_x_out, current, nullptr, nullptr);
    std::memcpy(current_vec, g_vec_out, n * 3 * C * sizeof(T));
    for (int64_t l = net.L - 1; l >= 0; --l) {
        const LayerValues<T>& v = net.layers[l];
        const LayerAdjoints<T> g = adjoints ? kept.g[l] : passing;
        std::memcpy(g.x, current, n * C * sizeof(T));
        std::memcpy(g.vec, current_vec, n * 3 * C * sizeof(T));
        update_backward<T, W>(n, C, v.o, v.w, g.x, g.vec, g.o, g.w);
        net.backward_product(n, C, 3 * C, g.o, 3 * C, net.weight(l, O), C, g.x_sum, false);
        if (v.vec) net.backward_product(3 * n, C, 3 * C, g.w, 3 * C, net.weight(l, VEC), C, current_vec, true);
        pair_backward<T, W, CC, HH, true, false>(net.sizes(l), net.ranges(), d.first, d.second, net.geometry(),
                                                 net.filters(l), v.y, v.vec, v.score, v.score_self, g.x_sum, g.vec, g.y,
                                                 current_vec, g_change, nullptr);
        qkv_backward(net, l, g.y, g.normed);
        norm_backward<T, W>(n, C, v.unit, v.inverse, net.weight(l, GAMMA), g.normed, current, nullptr, nullptr);
    }
    T* neighbors = adjoints ? kept.g_neighbors : into;
    net.backward_product(n, C, C, current, C, net.other(COMBINE) + C, 2 * C, neighbors, false);
    embed_backward<T, W>(net.sizes(-1), d.first, d.second, net.geometry(), net.embed_filters(), net.emb, neighbors,
                         g_change, nullptr, nullptr);
    if (adjoints) std::memcpy(kept.g_first, current, n * C * sizeof(T));
    geometry_backward<T>(n, net.p, d.first, d.second, net.geometry(), g_change, g_pos);
}

template <class T, int W, int CC, int HH>
void network_tangent(const Description& d, const T* pos_t, T* tangents, T* x_t_out, T* vec_t_out) {
    const Network<T> net(d);
    const int64_t n = net.n, C = net.C;
    Kept<T> kept(net, nullptr, tangents);
    T* v_t = scratch_memory<T, PASSES>(3 * n * C);
    Change<T>* change = reinterpret_cast<Change<T>*>(kept.change);
    geometry_tangent<T>(net.p, d.first, d.second, net.geometry(), pos_t, change);
    embed_tangent<T, W>(net.sizes(-1), d.first, d.second, net.geometry(), change, net.embed_filters(), net.emb,
                        kept.neighbors);
    net.forward_product(n, C, C, kept.neighbors, net.combine_t + C * net.embed_row, net.embed_row, nullptr,
                        kept.t[0].x);
    if (d.has_vec0) std::memset(kept.t[0].vec, 0, n * 3 * C * sizeof(T));  // encoded vectors do not depend on positions
    for (int64_t l = 0; l < net.L; ++l) {
        const LayerValues<T>& v = net.layers[l];
        const LayerTangents<T>& t = kept.t[l];
        norm_tangent<T, W>(n, C, v.unit, v.inverse, net.weight(l, GAMMA), t.x, t.normed);
        net.forward_product(n, 5 * C, C, t.normed, v.qkv_t, net.qkv_row, nullptr, t.y);
        if (v.vec) net.forward_product(3 * n, 3 * C, C, t.vec, v.vec_t, net.o_row, nullptr, t.w);
        pair_tangent<T, W, CC, HH>(net.sizes(l), net.ranges(), d.first, d.second, net.geometry(), change,
                                   net.filters(l), v.y, t.y, v.vec, t.vec, v.score, v.score_self, t.score,
                                   t.score_self, t.x_sum, v_t);
        net.forward_product(n, 3 * C, C, t.x_sum, v.o_t, net.o_row, nullptr, t.o);
        const bool last = l + 1 == net.L;
        update_tangent<T, W>(n, C, t.x, t.vec, v.o, v.w, t.o, t.w, v_t, last ? kept.x_last : kept.t[l + 1].x,
                             last ? vec_t_out : kept.t[l + 1].vec);
    }
    norm_tangent<T, W>(n, C, net.unit, net.inverse, net.other(OUT_GAMMA), kept.x_last, x_t_out);
}

// adjoints, tangents null: the gradient of a scalar of the features alone. It is added to `out`, which has an address for
// every weight.
template <class T, int W, int CC, int HH>
void network_gradient(const Description& d, const T* m_x_out, const T* m_vec_out, T* adjoints, T* tangents,
                      void* const* out, T* g_pos, T* g_vec0) {
    const Network<T> net(d);
    const int64_t n = net.n, C = net.C, K_ = d.n_rbf;
    const Kept<T> kept(net, adjoints, tangents);
    const bool second = adjoints != nullptr;
    const auto gradient = [&](int64_t l, int which) { return static_cast<T*>(out[l * LAYER_WEIGHTS + which]); };
    const int64_t filter_size = (K_ + 1) * net.filter_row;
    Arena<T> a{scratch_memory<T, PASSES>(4 * net.p + filter_size + 26 * n * C + 1024), 0};
    Change<T>* g_change = g_pos ? zeroed(reinterpret_cast<Change<T>*>(a.take(4 * net.p)), net.p) : nullptr;
    const Change<T>* change = reinterpret_cast<const Change<T>*>(kept.change);
    T *x = zeroed(a.take(n * C), n * C), *vec = a.take(n * 3 * C), *vec_next = a.take(n * 3 * C), *filter = a.take(filter_size);
    T *m_o = a.take(n * 3 * C), *m_w = a.take(n * 9 * C), *m_sum = a.take(n * C), *m_y = a.take(n * 5 * C);
    T* m_normed = a.take(n * C);
    T *out_gamma = gradient(net.L, OUT_GAMMA), *out_beta = gradient(net.L, OUT_BETA);
    if (second)
        norm_reverse<T, W>(n, C, net.unit, net.inverse, net.other(OUT_GAMMA), kept.x_last, kept.g_out, m_x_out, x,
                           out_gamma, out_beta);
    else
        norm_backward<T, W>(n, C, net.unit, net.inverse, net.other(OUT_GAMMA), m_x_out, x, out_gamma, out_beta);
    std::memcpy(vec, m_vec_out, n * 3 * C * sizeof(T));
    for (int64_t l = net.L - 1; l >= 0; --l) {
        const LayerValues<T>& v = net.layers[l];
        const LayerAdjoints<T>& g = kept.g[l];
        const LayerTangents<T>& t = kept.t[l];
        if (second)
            update_reverse<T, W>(n, C, v.o, v.w, t.o, t.w, g.x, g.vec, x, vec, m_o, m_w);
        else
            update_backward<T, W>(n, C, v.o, v.w, x, vec, m_o, m_w);
        net.backward_product(n, C, 3 * C, m_o, 3 * C, net.weight(l, O), C, m_sum, false);
        if (v.vec) {
            std::memcpy(vec_next, vec, n * 3 * C * sizeof(T));
            net.backward_product(3 * n, C, 3 * C, m_w, 3 * C, net.weight(l, VEC), C, vec_next, true);
            net.weight_gradient(3 * n, 3 * C, C, m_w, 3 * C, v.vec, C, gradient(l, VEC));
            if (second) net.weight_gradient(3 * n, 3 * C, C, g.w, 3 * C, t.vec, C, gradient(l, VEC));
        }
        const Sizes s = net.sizes(l);
        if (second)
            pair_reverse<T, W, CC, HH>(s, net.ranges(), d.first, d.second, net.geometry(), change, net.filters(l), v.y,
                                       t.y, v.vec, t.vec, v.score, v.score_self, t.score, t.score_self, g.x_sum, g.vec,
                                       m_sum, vec, m_y, vec_next, filter);
        else if (g_change)
            pair_backward<T, W, CC, HH, true, true>(s, net.ranges(), d.first, d.second, net.geometry(), net.filters(l),
                                                    v.y, v.vec, v.score, v.score_self, m_sum, vec, m_y, vec_next,
                                                    g_change, filter);
        else
            pair_backward<T, W, CC, HH, false, true>(s, net.ranges(), d.first, d.second, net.geometry(),
                                                     net.filters(l), v.y, v.vec, v.score, v.score_self, m_sum, vec, m_y,
                                                     vec_next, nullptr, filter);
        qkv_backward(net, l, m_y, m_normed);
        T *gamma = gradient(l, GAMMA), *beta = gradient(l, BETA);
        if (second)
            norm_reverse<T, W>(n, C, v.unit, v.inverse, net.weight(l, GAMMA), t.x, g.normed, m_normed, x, gamma, beta);
        else
            norm_backward<T, W>(n, C, v.unit, v.inverse, net.weight(l, GAMMA), m_normed, x, gamma, beta);
        const int projections[3][2] = {{Q, 0}, {K, 1}, {V_, 2}};
        for (const auto& projection : projections) {
            const int64_t column = projection[1] * C, width = projection[0] == V_ ? 3 * C : C;
            T* weight = gradient(l, projection[0]);
            net.weight_gradient(n, width, C, m_y + column, 5 * C, v.normed, C, weight);
            if (second) net.weight_gradient(n, width, C, g.y + column, 5 * C, t.normed, C, weight);
            column_sum(n, width, m_y + column, 5 * C, gradient(l, projection[0] + 1));
        }
        net.weight_gradient(n, 3 * C, C, m_o, 3 * C, v.x_sum, C, gradient(l, O));
        if (second) net.weight_gradient(n, 3 * C, C, g.o, 3 * C, t.x_sum, C, gradient(l, O));
        column_sum(n, 3 * C, m_o, 3 * C, gradient(l, O_BIAS));
        add_untransposed(C, K_, filter, net.filter_row, gradient(l, DK), gradient(l, DK_BIAS));
        add_untransposed(3 * C, K_, filter + C, net.filter_row, gradient(l, DV), gradient(l, DV_BIAS));
        if (v.vec) std::swap(vec, vec_next);
    }
    if (g_vec0) std::memcpy(g_vec0, vec, n * 3 * C * sizeof(T));
    net.weight_gradient(n, C, 2 * C, x, C, net.first, 2 * C, gradient(net.L, COMBINE));
    if (second)  // the atom's own embedding has no tangent
        product<T>({C, C, n, kept.g_first, kept.neighbors, nullptr, 1, C, C, 2 * C, gradient(net.L, COMBINE) + C, true},
                   d.threads);
    column_sum(n, C, x, C, gradient(net.L, COMBINE_BIAS));
    T *m_first = m_w, *m_emb = m_sum, *neighbors = m_normed;
    net.backward_product(n, 2 * C, C, x, C, net.other(COMBINE), 2 * C, m_first, false);
    for (int64_t i = 0; i < n; ++i) std::memcpy(neighbors + i * C, m_first + i * 2 * C + C, C * sizeof(T));
    if (second)
        embed_reverse<T, W>(net.sizes(-1), d.first, d.second, net.geometry(), change, net.embed_filters(), net.emb,
                            kept.g_neighbors, neighbors, filter, m_emb);
    else
        embed_backward<T, W>(net.sizes(-1), d.first, d.second, net.geometry(), net.embed_filters(), net.emb, neighbors,
                             g_change, filter, m_emb);
    add_untransposed(C, K_, filter, net.embed_row, gradient(net.L, DISTANCE), gradient(net.L, DISTANCE_BIAS));
    for (int64_t i = 0; i < n; ++i)
        for (int64_t c = 0; c < C; ++c) {
            gradient(net.L, EMBEDDING)[d.z[i] * C + c] += m_first[i * 2 * C + c];
            gradient(net.L, NEIGHBOR)[d.z[i] * C + c] += m_emb[i * C + c];
        }
    if (g_pos) geometry_backward<T>(n, net.p, d.first, d.second, net.geometry(), g_change, g_pos);
}

}  // namespace
