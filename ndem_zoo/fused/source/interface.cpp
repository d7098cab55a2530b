// The functions that are called from Python (native.py), by their plain C names.
//
// Arrays are dense and row-major; N atoms, P pairs, C channels, H heads, D = C / H, K radial functions.

#include "network.h"

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
    void product_##NAME(int64_t m, int64_t n, int64_t k, const T* a, int64_t a_row, int64_t a_column, const T*        \
        b, int64_t b_row, const T* bias, T* c, int64_t c_row, int64_t accumulate, int64_t threads) {                  \
        product<T>({m, n, k, a, b, bias, a_row, a_column, b_row, c_row, c, accumulate != 0}, threads);                \
    }                                                                                                                 \
    void column_sum_##NAME(int64_t m, int64_t n, const T* values, T* out) {                                           \
        column_sum<T>(m, n, values, n, false, out);                                                                   \
    }                                                                                                                 \
    int64_t find_pairs_##NAME(int64_t n_edges, const int64_t* src, const int64_t* dst, const T* shift, const T*       \
        pos, const int64_t* system, double cutoff, int64_t room, int32_t* first, int32_t* second, T* edge) {                                               \
        return find_pairs<T>(n_edges, src, dst, shift, pos, system, T(cutoff), room, first, second, edge);                          \
    }                                                                                                                 \
    void radial_##NAME(int64_t p, int64_t k, double cutoff, int64_t vector_cutoff, const T* edge, const T*            \
        means, const T* betas, T* geometry, T* rbf, T* rbf_r, int32_t* active) {                                                       \
        radial<T>(p, k, T(cutoff), vector_cutoff, edge, means, betas, (Geometry<T>*)geometry, rbf, rbf_r, active);            \
    }                                                                                                                 \
    int64_t network_size_##NAME(const Description* d, int64_t kind) {                                                 \
        return network_size<T>(*d, kind);                                                                             \
    }                                                                                                                 \
    void network_forward_##NAME(int64_t width, const Description* d, const T* vec0, T* x_out, T* vec_out) {           \
        const int64_t c = d->channels, h = d->heads;                                                                  \
        SHAPES(T, (network_forward<T, W, CC, HH>(*d, vec0, x_out, vec_out)))                                          \
    }                                                                                                                 \
    void network_backward_##NAME(int64_t width, const Description* d, const T* g_x, const T* g_vec, T* adjoints,      \
        T* g_pos) {                                                                                                   \
        const int64_t c = d->channels, h = d->heads;                                                                  \
        SHAPES(T, (network_backward<T, W, CC, HH>(*d, g_x, g_vec, adjoints, g_pos)))                                  \
    }                                                                                                                 \
    void network_tangent_##NAME(int64_t width, const Description* d, const T* pos_t, T* tangents, T* x_t, T*          \
        vec_t) {                                                                                                      \
        const int64_t c = d->channels, h = d->heads;                                                                  \
        SHAPES(T, (network_tangent<T, W, CC, HH>(*d, pos_t, tangents, x_t, vec_t)))                                   \
    }                                                                                                                 \
    void network_gradient_##NAME(int64_t width, const Description* d, const T* m_x, const T* m_vec, T* adjoints,      \
        T* tangents, void* const* out, T* g_pos, T* g_vec0) {                                                         \
        const int64_t c = d->channels, h = d->heads;                                                                  \
        SHAPES(T, (network_gradient<T, W, CC, HH>(*d, m_x, m_vec, adjoints, tangents, out, g_pos, g_vec0)))           \
    }                                                                                                                 \
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
    }

extern "C" {
int64_t count_flops() { return product_flops; }
INTERFACE(float, f32)
INTERFACE(double, f64)
}
