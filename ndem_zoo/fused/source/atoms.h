// What happens at each atom alone: normalization, update of a layer, heads.

#pragma once

#include "vector.h"

namespace {

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

// ab (N, 3, row) = [a | b], row = I + O, or I if no vectors are wanted; sn (N, 2I) = [s | n] with n = |a|; the derivative of the length of a zero vector is 0.
template <class T, int W>
void length_forward(int64_t n, int64_t I, int64_t O, int64_t row, const T* s, const T* ab, T* sn) {
    typedef Vec<T, W> V;
    for (int64_t i = 0; i < n; ++i)
        for (int64_t c = 0; c < I; c += W) {
            V square = {};
            for (int k = 0; k < 3; ++k) {
                const V a = load<T, W>(ab + (3 * i + k) * row + c);
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
void length_backward(int64_t n, int64_t I, int64_t O, int64_t row, const T* sn, const T* ab, const T* g_sn, T* g_ab, T* g_s) {
    typedef Vec<T, W> V;
    for (int64_t i = 0; i < n; ++i)
        for (int64_t c = 0; c < I; c += W) {
            const int64_t at = i * 2 * I + c;
            const V factor = load<T, W>(g_sn + at + I) * inverse_length<T, W>(load<T, W>(sn + at + I));
            for (int k = 0; k < 3; ++k) {
                const int64_t at3 = (3 * i + k) * row + c;
                store<T, W>(g_ab + at3, load<T, W>(ab + at3) * factor);
            }
            store<T, W>(g_s + i * I + c, load<T, W>(g_sn + at));
        }
}

template <class T, int W>
void length_tangent(int64_t n, int64_t I, int64_t O, int64_t row, const T* sn, const T* ab, const T* s_t, const T* ab_t, T* sn_t) {
    typedef Vec<T, W> V;
    for (int64_t i = 0; i < n; ++i)
        for (int64_t c = 0; c < I; c += W) {
            const int64_t at = i * 2 * I + c;
            V dot = {};
            for (int k = 0; k < 3; ++k) {
                const int64_t at3 = (3 * i + k) * row + c;
                dot += load<T, W>(ab + at3) * load<T, W>(ab_t + at3);
            }
            store<T, W>(sn_t + at, load<T, W>(s_t + i * I + c));
            store<T, W>(sn_t + at + I, dot * inverse_length<T, W>(load<T, W>(sn + at + I)));
        }
}

template <class T, int W>
void length_reverse(int64_t n, int64_t I, int64_t O, int64_t row, const T* sn, const T* ab, const T* sn_t, const T* ab_t,
                    const T* g_sn, const T* m_sn, T* m_ab, T* m_s) {
    typedef Vec<T, W> V;
    for (int64_t i = 0; i < n; ++i)
        for (int64_t c = 0; c < I; c += W) {
            const int64_t at = i * 2 * I + c;
            const V inverse = inverse_length<T, W>(load<T, W>(sn + at + I)), g = load<T, W>(g_sn + at + I) * inverse;
            const V m = load<T, W>(m_sn + at + I) * inverse - g * load<T, W>(sn_t + at + I) * inverse;
            for (int k = 0; k < 3; ++k) {
                const int64_t at3 = (3 * i + k) * row + c;
                store<T, W>(m_ab + at3, m * load<T, W>(ab + at3) + g * load<T, W>(ab_t + at3));
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
void gate_forward(int64_t n, int64_t I, int64_t O, int64_t row, bool activate, const T* u, const T* ab, T* s, T* v) {
    typedef Vec<T, W> V;
    for (int64_t i = 0; i < n; ++i)
        for (int64_t c = 0; c < O; c += W) {
            const V out = load<T, W>(u + i * 2 * O + c), gate = load<T, W>(u + i * 2 * O + O + c);
            store<T, W>(s + i * O + c, activate ? out * sigmoid<T, W>(out) : out);
            for (int k = 0; k < 3 && row > I; ++k)
                store<T, W>(v + (3 * i + k) * O + c, load<T, W>(ab + (3 * i + k) * row + I + c) * gate);
        }
}

template <class T, int W>
void gate_backward(int64_t n, int64_t I, int64_t O, int64_t row, bool activate, const T* u, const T* ab, const T* g_s,
                   const T* g_v, T* g_u, T* g_ab) {
    typedef Vec<T, W> V;
    for (int64_t i = 0; i < n; ++i)
        for (int64_t c = 0; c < O; c += W) {
            const V gate = load<T, W>(u + i * 2 * O + O + c), g = load<T, W>(g_s + i * O + c);
            V s0, slope, unused, g_gate = {};
            silu<T, W, 1>(load<T, W>(u + i * 2 * O + c), s0, slope, unused);
            for (int k = 0; k < 3 && row > I; ++k) {
                const int64_t at3 = (3 * i + k) * row + I + c;
                const V gv = load<T, W>(g_v + (3 * i + k) * O + c);
                g_gate += gv * load<T, W>(ab + at3);
                store<T, W>(g_ab + at3, gv * gate);
            }
            store<T, W>(g_u + i * 2 * O + c, activate ? g * slope : g);
            store<T, W>(g_u + i * 2 * O + O + c, g_gate);
        }
}

template <class T, int W>
void gate_tangent(int64_t n, int64_t I, int64_t O, int64_t row, bool activate, const T* u, const T* ab, const T* u_t,
                  const T* ab_t, T* s_t, T* v_t) {
    typedef Vec<T, W> V;
    for (int64_t i = 0; i < n; ++i)
        for (int64_t c = 0; c < O; c += W) {
            const V gate = load<T, W>(u + i * 2 * O + O + c), gate_t = load<T, W>(u_t + i * 2 * O + O + c);
            const V out_t = load<T, W>(u_t + i * 2 * O + c);
            V s0, slope, unused;
            silu<T, W, 1>(load<T, W>(u + i * 2 * O + c), s0, slope, unused);
            store<T, W>(s_t + i * O + c, activate ? out_t * slope : out_t);
            for (int k = 0; k < 3 && row > I; ++k) {
                const int64_t at3 = (3 * i + k) * row + I + c;
                store<T, W>(v_t + (3 * i + k) * O + c,
                            load<T, W>(ab_t + at3) * gate + load<T, W>(ab + at3) * gate_t);
            }
        }
}

template <class T, int W>
void gate_reverse(int64_t n, int64_t I, int64_t O, int64_t row, bool activate, const T* u, const T* ab, const T* u_t,
                  const T* ab_t, const T* g_s, const T* g_v, const T* m_s, const T* m_v, T* m_u, T* m_ab) {
    typedef Vec<T, W> V;
    for (int64_t i = 0; i < n; ++i)
        for (int64_t c = 0; c < O; c += W) {
            const V gate = load<T, W>(u + i * 2 * O + O + c), gate_t = load<T, W>(u_t + i * 2 * O + O + c);
            const V m = load<T, W>(m_s + i * O + c), g = load<T, W>(g_s + i * O + c);
            V s0, slope, bend, m_gate = {};
            silu<T, W, 2>(load<T, W>(u + i * 2 * O + c), s0, slope, bend);
            for (int k = 0; k < 3 && row > I; ++k) {
                const int64_t at3 = (3 * i + k) * row + I + c;
                const V mv = load<T, W>(m_v + (3 * i + k) * O + c), gv = load<T, W>(g_v + (3 * i + k) * O + c);
                m_gate += mv * load<T, W>(ab + at3) + gv * load<T, W>(ab_t + at3);
                store<T, W>(m_ab + at3, mv * gate + gv * gate_t);
            }
            store<T, W>(m_u + i * 2 * O + c, activate ? m * slope + g * bend * load<T, W>(u_t + i * 2 * O + c) : m);
            store<T, W>(m_u + i * 2 * O + O + c, m_gate);
        }
}

}  // namespace
