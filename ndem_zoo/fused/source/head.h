// The four passes over a head: gated equivariant blocks, one after the other (names of values: see heads.py).

#pragma once

#include "network.h"

namespace {

constexpr int BLOCK_WEIGHTS = 6, MAX_BLOCKS = 8;
enum { VEC1, VEC2, HIDDEN, HIDDEN_BIAS, OUT, OUT_BIAS };

// What Python hands over: sizes and addresses.
struct HeadDescription {
    int64_t n, blocks, threads;
    const int64_t* sizes;        // of each block: channels I, O, whether scalars are activated, whether vectors are made
    const void* const* weights;  // blocks * 6
    const void* v;               // vectors (N, 3, I) of the features; kept by the caller
    void* values;                // head_size(...) numbers, which the passes share
};

template <class T>
struct Block {
    int64_t I, O, row, vec_row, hidden_row, out_row;  // row: of ab
    bool activate, vectors;
    T *vec_t, *hidden_t, *out_t, *ab, *sn, *h, *t, *u, *v_made;
    const T* v;  // vectors before the block
};
template <class T>
struct BlockAdjoints {
    T *s, *v, *u, *h, *sn, *ab;  // s, v: after the block
};
template <class T>
struct BlockTangents {
    T *ab, *sn, *h, *t, *u, *v;  // v: after the block
};

template <class T>
struct HeadNetwork {
    const HeadDescription& d;
    const int64_t n;
    Block<T> blocks[MAX_BLOCKS];
    int64_t size, widest = 0;

    explicit HeadNetwork(const HeadDescription& description) : d(description), n(d.n) {
        Arena<T> a{static_cast<T*>(d.values), 0};
        const T* v = static_cast<const T*>(d.v);
        for (int64_t i = 0; i < d.blocks; ++i) {
            Block<T>& b = blocks[i];
            b.I = d.sizes[4 * i];
            b.O = d.sizes[4 * i + 1];
            b.activate = d.sizes[4 * i + 2];
            b.vectors = d.sizes[4 * i + 3];
            b.row = b.vectors ? b.I + b.O : b.I;
            b.vec_row = row_size(b.row);
            b.hidden_row = row_size(b.I);
            b.out_row = row_size(2 * b.O);
            b.vec_t = a.take(b.I * b.vec_row);
            b.hidden_t = a.take(2 * b.I * b.hidden_row);
            b.out_t = a.take(b.I * b.out_row);
            b.ab = a.take(3 * n * b.row);
            b.sn = a.take(n * 2 * b.I);
            b.h = a.take(n * b.I);
            b.t = a.take(n * b.I);
            b.u = a.take(n * 2 * b.O);
            b.v = v;
            b.v_made = a.take(b.vectors ? 3 * n * b.O : 0);
            v = b.v_made;
            widest = std::max({widest, b.row, b.O});
        }
        size = a.used;
    }
    const T* weight(int64_t block, int which) const {
        return static_cast<const T*>(d.weights[block * BLOCK_WEIGHTS + which]);
    }
    // c = a b^T for a transposed weight b; c = [c +] a b for a weight as it is; c = [c +] g^T x
    void forward_product(int64_t m, int64_t n_out, int64_t k, const T* a, const T* b, int64_t row, const T* bias,
                         T* c) const {
        product<T>({m, n_out, k, a, b, bias, k, 1, row, n_out, c, false, true}, d.threads);
    }
    void backward_product(int64_t m, int64_t n_out, int64_t k, const T* a, int64_t a_row, const T* b, T* c,
                          bool accumulate) const {
        product<T>({m, n_out, k, a, b, nullptr, a_row, 1, n_out, n_out, c, accumulate}, d.threads);
    }
    void weight_gradient(int64_t m, int64_t n_out, int64_t k, const T* g, int64_t g_row, const T* x, T* c) const {
        product<T>({n_out, k, m, g, x, nullptr, 1, g_row, k, k, c, true}, d.threads);
    }
    // Adjoint of the vectors before a block from that of [a | b].
    void vector_backward(int64_t i, const T* g_ab, T* g_v) const {
        const Block<T>& b = blocks[i];
        backward_product(3 * n, b.I, b.I, g_ab, b.row, weight(i, VEC1), g_v, false);
        if (b.vectors) backward_product(3 * n, b.I, b.O, g_ab + b.I, b.row, weight(i, VEC2), g_v, true);
    }
    BlockAdjoints<T> adjoints(Arena<T>& a, int64_t i) const {
        const Block<T>& b = blocks[i];
        return {a.take(n * b.O), a.take(b.vectors ? 3 * n * b.O : 0), a.take(n * 2 * b.O), a.take(n * b.I),
                a.take(n * 2 * b.I), a.take(3 * n * b.row)};
    }
    BlockTangents<T> tangents(Arena<T>& a, int64_t i) const {
        const Block<T>& b = blocks[i];
        return {a.take(3 * n * b.row), a.take(n * 2 * b.I), a.take(n * b.I), a.take(n * b.I), a.take(n * 2 * b.O),
                a.take(b.vectors ? 3 * n * b.O : 0)};
    }
    void prepare() {
        for (int64_t i = 0; i < d.blocks; ++i) {
            Block<T>& b = blocks[i];
            zeroed(b.vec_t, b.I * b.vec_row);
            transpose(b.I, b.I, weight(i, VEC1), b.vec_t, b.vec_row);
            if (b.vectors) transpose(b.O, b.I, weight(i, VEC2), b.vec_t + b.I, b.vec_row);
            zeroed(b.hidden_t, 2 * b.I * b.hidden_row);
            transpose(b.I, 2 * b.I, weight(i, HIDDEN), b.hidden_t, b.hidden_row);
            zeroed(b.out_t, b.I * b.out_row);
            transpose(2 * b.O, b.I, weight(i, OUT), b.out_t, b.out_row);
        }
    }
};

inline int64_t lanes_of(int64_t n) { return n % 16 == 0 ? 16 : n & -n; }

#define BY_LANES(T, COUNT, CALL)                \
    {                                           \
        const int64_t width = lanes_of(COUNT);  \
        LANES(T, CALL)                          \
    }

template <class T>
int64_t head_size(const HeadDescription& d, int64_t kind) {
    HeadDescription counting = d;
    counting.values = nullptr;
    const HeadNetwork<T> head(counting);
    Arena<T> a{nullptr, 0}, b{nullptr, 0};
    for (int64_t i = 0; i < d.blocks; ++i) {
        head.adjoints(a, i);
        head.tangents(b, i);
    }
    return kind == 0 ? head.size : kind == 1 ? a.used : b.used;
}

template <class T>
void head_forward(const HeadDescription& d, const T* s_in, T* s_out, T* v_out) {
    HeadNetwork<T> head(d);
    head.prepare();
    const int64_t n = head.n;
    T* made = scratch_memory<T, PASSES>(2 * n * padded(head.widest));
    for (int64_t i = 0; i < d.blocks; ++i) {
        const Block<T>& b = head.blocks[i];
        const bool last = i + 1 == d.blocks;
        T *s = last ? s_out : made + (i % 2) * n * padded(head.widest), *v = last && v_out ? v_out : b.v_made;
        head.forward_product(3 * n, b.row, b.I, b.v, b.vec_t, b.vec_row, nullptr, b.ab);
        BY_LANES(T, b.I, (length_forward<T, W>(n, b.I, b.O, b.row, s_in, b.ab, b.sn)))
        head.forward_product(n, b.I, 2 * b.I, b.sn, b.hidden_t, b.hidden_row, head.weight(i, HIDDEN_BIAS), b.h);
        BY_LANES(T, n * b.I, (silu_forward<T, W>(n * b.I, b.h, b.t)))
        head.forward_product(n, 2 * b.O, b.I, b.t, b.out_t, b.out_row, head.weight(i, OUT_BIAS), b.u);
        BY_LANES(T, b.O, (gate_forward<T, W>(n, b.I, b.O, b.row, b.activate, b.u, b.ab, s, v)))
        s_in = s;
    }
}

// adjoints null: nothing is kept.
template <class T>
void head_backward(const HeadDescription& d, const T* g_s_out, const T* g_v_out, T* adjoints, T* g_s_in, T* g_v_in) {
    const HeadNetwork<T> head(d);
    const int64_t n = head.n, most = padded(head.widest);
    Arena<T> passing{scratch_memory<T, PASSES>(18 * n * most + 1024), 0};
    T *g_t = passing.take(n * most), *g_s = passing.take(n * most), *g_v = passing.take(3 * n * most);
    const int64_t mark = passing.used;
    Arena<T> kept{adjoints, 0};
    BlockAdjoints<T> g[MAX_BLOCKS];
    for (int64_t i = 0; i < d.blocks && adjoints; ++i) g[i] = head.adjoints(kept, i);
    for (int64_t i = d.blocks - 1; i >= 0; --i) {
        const Block<T>& b = head.blocks[i];
        const bool last = i + 1 == d.blocks;
        if (!adjoints) {
            passing.used = mark;
            g[i] = head.adjoints(passing, i);
        }
        std::memcpy(g[i].s, last ? g_s_out : g_s, n * b.O * sizeof(T));
        if (b.vectors) std::memcpy(g[i].v, last ? g_v_out : g_v, 3 * n * b.O * sizeof(T));
        BY_LANES(T, b.O, (gate_backward<T, W>(n, b.I, b.O, b.row, b.activate, b.u, b.ab, g[i].s, g[i].v, g[i].u, g[i].ab)))
        head.backward_product(n, b.I, 2 * b.O, g[i].u, 2 * b.O, head.weight(i, OUT), g_t, false);
        BY_LANES(T, n * b.I, (silu_backward<T, W>(n * b.I, b.h, g_t, g[i].h)))
        head.backward_product(n, 2 * b.I, b.I, g[i].h, b.I, head.weight(i, HIDDEN), g[i].sn, false);
        BY_LANES(T, b.I, (length_backward<T, W>(n, b.I, b.O, b.row, b.sn, b.ab, g[i].sn, g[i].ab, i ? g_s : g_s_in)))
        head.vector_backward(i, g[i].ab, i ? g_v : g_v_in);
    }
}

template <class T>
void head_tangent(const HeadDescription& d, const T* s_t, const T* v_t, T* tangents, T* s_t_out, T* v_t_out) {
    const HeadNetwork<T> head(d);
    const int64_t n = head.n;
    T* made = scratch_memory<T, PASSES>(2 * n * padded(head.widest));
    Arena<T> kept{tangents, 0};
    for (int64_t i = 0; i < d.blocks; ++i) {
        const Block<T>& b = head.blocks[i];
        const BlockTangents<T> t = head.tangents(kept, i);
        const bool last = i + 1 == d.blocks;
        T *s = last ? s_t_out : made + (i % 2) * n * padded(head.widest), *v = last && v_t_out ? v_t_out : t.v;
        head.forward_product(3 * n, b.row, b.I, v_t, b.vec_t, b.vec_row, nullptr, t.ab);
        BY_LANES(T, b.I, (length_tangent<T, W>(n, b.I, b.O, b.row, b.sn, b.ab, s_t, t.ab, t.sn)))
        head.forward_product(n, b.I, 2 * b.I, t.sn, b.hidden_t, b.hidden_row, nullptr, t.h);
        BY_LANES(T, n * b.I, (silu_backward<T, W>(n * b.I, b.h, t.h, t.t)))  // the same factor
        head.forward_product(n, 2 * b.O, b.I, t.t, b.out_t, b.out_row, nullptr, t.u);
        BY_LANES(T, b.O, (gate_tangent<T, W>(n, b.I, b.O, b.row, b.activate, b.u, b.ab, t.u, t.ab, s, v)))
        s_t = s;
        v_t = t.v;
    }
}

// adjoints, tangents null: the gradient of a scalar of the outputs alone. It is added to `out`. v_t: tangents of the
// features' vectors.
template <class T>
void head_gradient(const HeadDescription& d, const T* m_s_out, const T* m_v_out, T* adjoints, T* tangents,
                   const T* v_t, void* const* out, T* m_s_in, T* m_v_in) {
    const HeadNetwork<T> head(d);
    const int64_t n = head.n, most = padded(head.widest);
    const bool second = adjoints != nullptr;
    Arena<T> a{scratch_memory<T, PASSES>(18 * n * most + 1024), 0}, kept_g{adjoints, 0}, kept_t{tangents, 0};
    T *m_u = a.take(2 * n * most), *m_ab = a.take(3 * n * most), *m_t = a.take(n * most), *g_t = a.take(n * most);
    T *m_h = a.take(n * most), *m_sn = a.take(2 * n * most), *s_made = a.take(n * most), *v_made = a.take(3 * n * most);
    BlockAdjoints<T> g[MAX_BLOCKS];
    BlockTangents<T> t[MAX_BLOCKS];
    for (int64_t i = 0; i < d.blocks && second; ++i) {
        g[i] = head.adjoints(kept_g, i);
        t[i] = head.tangents(kept_t, i);
    }
    const T *m_s = m_s_out, *m_v = m_v_out;
    for (int64_t i = d.blocks - 1; i >= 0; --i) {
        const Block<T>& b = head.blocks[i];
        const auto gradient = [&](int which) { return static_cast<T*>(out[i * BLOCK_WEIGHTS + which]); };
        const T* v_before = i ? (second ? t[i - 1].v : nullptr) : v_t;
        T *s_next = i ? s_made : m_s_in, *v_next = i ? v_made : m_v_in;
        if (second) {
            BY_LANES(T, b.O, (gate_reverse<T, W>(n, b.I, b.O, b.row, b.activate, b.u, b.ab, t[i].u, t[i].ab, g[i].s,
                                                 g[i].v, m_s, m_v, m_u, m_ab)))
            head.backward_product(n, b.I, 2 * b.O, g[i].u, 2 * b.O, head.weight(i, OUT), g_t, false);
        } else {
            BY_LANES(T, b.O, (gate_backward<T, W>(n, b.I, b.O, b.row, b.activate, b.u, b.ab, m_s, m_v, m_u, m_ab)))
        }
        head.backward_product(n, b.I, 2 * b.O, m_u, 2 * b.O, head.weight(i, OUT), m_t, false);
        if (second) {
            BY_LANES(T, n * b.I, (silu_reverse<T, W>(n * b.I, b.h, t[i].h, g_t, m_t, m_h)))
        } else {
            BY_LANES(T, n * b.I, (silu_backward<T, W>(n * b.I, b.h, m_t, m_h)))
        }
        head.backward_product(n, 2 * b.I, b.I, m_h, b.I, head.weight(i, HIDDEN), m_sn, false);
        if (second) {
            BY_LANES(T, b.I, (length_reverse<T, W>(n, b.I, b.O, b.row, b.sn, b.ab, t[i].sn, t[i].ab, g[i].sn, m_sn, m_ab,
                                                   s_next)))
        } else {
            BY_LANES(T, b.I, (length_backward<T, W>(n, b.I, b.O, b.row, b.sn, b.ab, m_sn, m_ab, s_next)))
        }
        const auto weights = [&](int which, int64_t m, int64_t n_out, int64_t k, const T* m_y, int64_t y_row, const T* x,
                                 const T* g_y, const T* x_t) {
            head.weight_gradient(m, n_out, k, m_y, y_row, x, gradient(which));
            if (second) head.weight_gradient(m, n_out, k, g_y, y_row, x_t, gradient(which));
        };
        weights(VEC1, 3 * n, b.I, b.I, m_ab, b.row, b.v, g[i].ab, v_before);
        if (b.vectors) weights(VEC2, 3 * n, b.O, b.I, m_ab + b.I, b.row, b.v, g[i].ab + b.I, v_before);
        weights(HIDDEN, n, b.I, 2 * b.I, m_h, b.I, b.sn, g[i].h, t[i].sn);
        weights(OUT, n, 2 * b.O, b.I, m_u, 2 * b.O, b.t, g[i].u, t[i].t);
        column_sum(n, b.I, m_h, b.I, gradient(HIDDEN_BIAS));
        column_sum(n, 2 * b.O, m_u, 2 * b.O, gradient(OUT_BIAS));
        head.vector_backward(i, m_ab, v_next);
        m_s = s_next;
        m_v = v_next;
    }
}

}  // namespace
