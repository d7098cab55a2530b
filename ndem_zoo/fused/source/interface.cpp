// The functions that are called from Python (native.py), by their plain C names.
//
// Arrays are dense and row-major; N atoms, P pairs, C channels, H heads, D = C / H, K radial functions.

#include "head.h"

// ---------------------------------------------------------------------------------------------------------- C interface

// Every function twice, `_f32` and `_f64`; `width` as for LANES, by the channels of a head.

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
    void product_##NAME(int64_t m, int64_t n, int64_t k, const T* a, int64_t a_row, int64_t a_column,                 \
        const T* b, int64_t b_row, const T* bias, T* c, int64_t c_row, int64_t accumulate, int64_t threads) {         \
        product<T>({m, n, k, a, b, bias, a_row, a_column, b_row, c_row, c, accumulate != 0}, threads);                \
    }                                                                                                                 \
    int64_t find_pairs_##NAME(int64_t n_edges, int64_t n, int64_t max_z, const int64_t* src, const int64_t* dst,      \
        const T* shift, const T* pos, const int64_t* system, const int64_t* z, double cutoff, int64_t room,           \
        int32_t* first, int32_t* second, T* edge) {                                                                   \
        return find_pairs<T>(n_edges, n, max_z, src, dst, shift, pos, system, z, T(cutoff), room, first, second, edge);\
    }                                                                                                                 \
    void radial_##NAME(int64_t p, int64_t k, double cutoff, int64_t vector_cutoff, const T* edge,                     \
        const T* means, const T* betas, T* geometry, T* rbf, T* rbf_r, int32_t* active) {                             \
        radial<T>(p, k, T(cutoff), vector_cutoff, edge, means, betas, (Geometry<T>*)geometry, rbf, rbf_r, active);    \
    }                                                                                                                 \
    int64_t network_size_##NAME(const Description* d, int64_t kind) {                                                 \
        return network_size<T>(*d, kind);                                                                             \
    }                                                                                                                 \
    void network_forward_##NAME(int64_t width, const Description* d, const T* vec0, T* x_out, T* vec_out) {           \
        const int64_t c = d->channels, h = d->heads;                                                                  \
        SHAPES(T, (network_forward<T, W, CC, HH>(*d, vec0, x_out, vec_out)))                                          \
    }                                                                                                                 \
    void network_backward_##NAME(int64_t width, const Description* d, const T* g_x, const T* g_vec,                   \
        T* adjoints, T* g_pos) {                                                                                      \
        const int64_t c = d->channels, h = d->heads;                                                                  \
        SHAPES(T, (network_backward<T, W, CC, HH>(*d, g_x, g_vec, adjoints, g_pos)))                                  \
    }                                                                                                                 \
    void network_tangent_##NAME(int64_t width, const Description* d, const T* pos_t, T* tangents, T* x_t,             \
        T* vec_t) {                                                                                                   \
        const int64_t c = d->channels, h = d->heads;                                                                  \
        SHAPES(T, (network_tangent<T, W, CC, HH>(*d, pos_t, tangents, x_t, vec_t)))                                   \
    }                                                                                                                 \
    void network_gradient_##NAME(int64_t width, const Description* d, const T* m_x, const T* m_vec,                   \
        T* adjoints, T* tangents, void* const* out, T* g_pos, T* g_vec0) {                                            \
        const int64_t c = d->channels, h = d->heads;                                                                  \
        SHAPES(T, (network_gradient<T, W, CC, HH>(*d, m_x, m_vec, adjoints, tangents, out, g_pos, g_vec0)))           \
    }                                                                                                                 \
    int64_t head_size_##NAME(const HeadDescription* d, int64_t kind) {                                                \
        return head_size<T>(*d, kind);                                                                                \
    }                                                                                                                 \
    void head_forward_##NAME(const HeadDescription* d, const T* s, T* s_out, T* v_out) {                              \
        head_forward<T>(*d, s, s_out, v_out);                                                                         \
    }                                                                                                                 \
    void head_backward_##NAME(const HeadDescription* d, const T* g_s, const T* g_v, T* adjoints, T* g_s_in,           \
        T* g_v_in) {                                                                                                  \
        head_backward<T>(*d, g_s, g_v, adjoints, g_s_in, g_v_in);                                                     \
    }                                                                                                                 \
    void head_tangent_##NAME(const HeadDescription* d, const T* s_t, const T* v_t, T* tangents, T* s_t_out,           \
        T* v_t_out) {                                                                                                 \
        head_tangent<T>(*d, s_t, v_t, tangents, s_t_out, v_t_out);                                                    \
    }                                                                                                                 \
    void head_gradient_##NAME(const HeadDescription* d, const T* m_s, const T* m_v, T* adjoints, T* tangents,         \
        const T* v_t, void* const* out, T* m_s_in, T* m_v_in) {                                                       \
        head_gradient<T>(*d, m_s, m_v, adjoints, tangents, v_t, out, m_s_in, m_v_in);                                 \
    }

extern "C" {
int64_t count_flops() { return product_flops; }
INTERFACE(float, f32)
INTERFACE(double, f64)
}
