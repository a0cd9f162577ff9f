// The activations, each once: value, derivative, name and parameters. Included by every ISA file
// inside its target region (M is then that ISA's vector arithmetic), by activation_info.cpp for the
// names, and by device code, where M works on scalars: nvcc lets it call what is constexpr. M::V is
// the operand type; comparisons give masks for `?:`. Must not include a standard header, nor hold a function that is
// emitted without M as a template argument: two instruction sets would share its symbol.
//
// `gradient(g, s, p)` returns g * act'(z). Its s is the layer's output where keeps_output says so, the pre-activation z
// otherwise, rounded to the dtype of the tensor that it was stored in. Values at kinks, NaN and infinity are torch's.
// `expand(z, p)` returns the value and three derivatives, for derivatives of networks along their input.
#pragma once

#include "problem.h"

namespace fastmlp {

struct ParameterInfo {
  const char* name = nullptr;
  double initial = 0;
  bool positive = false;  // whether it has to be above 0

  constexpr bool allows(double value) const { return !positive || value > 0; }
};

// The value of an activation at a point, and its derivatives there.
template <class M> struct Taylor {
  typename M::V value, first, second, third;
};

// The first three derivatives of a sigmoid y, in terms of y.
template <class M> struct SigmoidSlopes {
  typename M::V first, second, third;
  static constexpr SigmoidSlopes of(typename M::V y) {
    const auto one = M::fill(1), first = y * (one - y);
    return {first, first * (one - M::fill(2) * y), first * (one - M::fill(6) * first)};
  }
};

// Of z y(z), from y and its derivatives.
template <class M>
constexpr Taylor<M> times_argument(typename M::V z, typename M::V y, typename M::V first, typename M::V second,
                                   typename M::V third) {
  return {z * y, y + z * first, M::fill(2) * first + z * second, M::fill(3) * second + z * third};
}

struct Identity {
  static constexpr const char* name = "identity";
  static constexpr ParameterInfo parameters[2] = {};
  static constexpr bool keeps_output = true;
  template <class M> static constexpr typename M::V value(typename M::V z, Scalars) { return z; }
  template <class M> static constexpr typename M::V gradient(typename M::V g, typename M::V, Scalars) { return g; }
  template <class M> static constexpr Taylor<M> expand(typename M::V z, Scalars) {
    return {z, M::fill(1), M::fill(0), M::fill(0)};
  }
};

struct Relu {
  static constexpr const char* name = "relu";
  static constexpr ParameterInfo parameters[2] = {};
  static constexpr bool keeps_output = true;
  template <class M> static constexpr typename M::V value(typename M::V z, Scalars) {
    const auto zero = M::fill(0);
    return z < zero ? zero : z;
  }
  template <class M> static constexpr typename M::V gradient(typename M::V g, typename M::V s, Scalars) {
    const auto zero = M::fill(0);
    return s <= zero ? zero : g;
  }
  template <class M> static constexpr Taylor<M> expand(typename M::V z, Scalars p) {
    const auto zero = M::fill(0);
    return {value<M>(z, p), z <= zero ? zero : M::fill(1), zero, zero};
  }
};

// Torch keeps z of these three, so that their output may be changed in place; and an output near its limit, rounded to
// 16 bits, no longer tells the derivative.
struct LeakyRelu {
  static constexpr const char* name = "leaky_relu";
  static constexpr ParameterInfo parameters[2] = {{"negative_slope", 0.01}};
  static constexpr bool keeps_output = false;
  template <class M> static constexpr typename M::V value(typename M::V z, Scalars p) {
    return z > M::fill(0) ? z : z * M::fill(p.a);
  }
  template <class M> static constexpr typename M::V gradient(typename M::V g, typename M::V s, Scalars p) {
    return s > M::fill(0) ? g : g * M::fill(p.a);
  }
  template <class M> static constexpr Taylor<M> expand(typename M::V z, Scalars p) {
    const auto zero = M::fill(0);
    return {value<M>(z, p), z > zero ? M::fill(1) : M::fill(p.a), zero, zero};
  }
};

struct Elu {
  static constexpr const char* name = "elu";
  static constexpr ParameterInfo parameters[2] = {{"alpha", 1.0}};
  static constexpr bool keeps_output = false;
  template <class M> static constexpr typename M::V value(typename M::V z, Scalars p) {
    return z < M::fill(0) ? M::fill(p.a) * M::expm1_of_negative(z) : z;
  }
  template <class M> static constexpr typename M::V gradient(typename M::V g, typename M::V s, Scalars p) {
    return s > M::fill(0) ? g : g * (M::fill(p.a) * M::exp(s));
  }
  template <class M> static constexpr Taylor<M> expand(typename M::V z, Scalars p) {
    const auto zero = M::fill(0), bend = M::fill(p.a) * M::exp(z);
    const auto curvature = z >= zero ? zero : bend;
    return {value<M>(z, p), z > zero ? M::fill(1) : bend, curvature, curvature};
  }
};

// ELU of z / alpha, times alpha (Barron, Continuously Differentiable Exponential Linear Units, 2017). As torch does, it
// multiplies by 1 / alpha in the operand type. An alpha that is not positive is left to torch, which raises for zero.
struct Celu {
  static constexpr const char* name = "celu";
  static constexpr ParameterInfo parameters[2] = {{"alpha", 1.0, true}};
  static constexpr bool keeps_output = false;
  template <class M> static constexpr typename M::V value(typename M::V z, Scalars p) {
    return z < M::fill(0) ? M::fill(p.a) * M::expm1_of_negative(z * M::fill(1 / p.a)) : z;
  }
  template <class M> static constexpr typename M::V gradient(typename M::V g, typename M::V s, Scalars p) {
    const auto rate = M::fill(1 / p.a);
    return s > M::fill(0) ? g : g * (rate * M::fill(p.a) * M::exp(s * rate));
  }
  template <class M> static constexpr Taylor<M> expand(typename M::V z, Scalars p) {
    const auto zero = M::fill(0), rate = M::fill(1 / p.a), bend = rate * M::fill(p.a) * M::exp(z * rate);
    const auto bent = z >= zero ? zero : rate * bend;
    return {value<M>(z, p), z > zero ? M::fill(1) : bend, bent, rate * bent};
  }
};

struct Selu {
  static constexpr const char* name = "selu";
  static constexpr ParameterInfo parameters[2] = {};
  static constexpr bool keeps_output = false;
  // Klambauer et al., Self-Normalizing Neural Networks, 2017, equation 14.
  static constexpr double alpha = 1.6732632423543772848170429916717;
  static constexpr double scale = 1.0507009873554804934193349852946;
  template <class M> static constexpr typename M::V value(typename M::V z, Scalars) {
    return z < M::fill(0) ? M::fill(alpha * scale) * M::expm1_of_negative(z) : M::fill(scale) * z;
  }
  template <class M> static constexpr typename M::V gradient(typename M::V g, typename M::V s, Scalars) {
    return g * (s > M::fill(0) ? M::fill(scale) : M::fill(alpha * scale) * M::exp(s));
  }
  template <class M> static constexpr Taylor<M> expand(typename M::V z, Scalars p) {
    const auto zero = M::fill(0), bend = M::fill(alpha * scale) * M::exp(z);
    const auto curvature = z >= zero ? zero : bend;
    return {value<M>(z, p), z > zero ? M::fill(scale) : bend, curvature, curvature};
  }
};

struct Sigmoid {
  static constexpr const char* name = "sigmoid";
  static constexpr ParameterInfo parameters[2] = {};
  static constexpr bool keeps_output = true;
  template <class M> static constexpr typename M::V value(typename M::V z, Scalars) { return M::sigmoid(z); }
  template <class M> static constexpr typename M::V gradient(typename M::V g, typename M::V s, Scalars) {
    return g * (s * (M::fill(1) - s));
  }
  template <class M> static constexpr Taylor<M> expand(typename M::V z, Scalars) {
    const auto y = M::sigmoid(z);
    const auto slopes = SigmoidSlopes<M>::of(y);
    return {y, slopes.first, slopes.second, slopes.third};
  }
};

struct Tanh {
  static constexpr const char* name = "tanh";
  static constexpr ParameterInfo parameters[2] = {};
  static constexpr bool keeps_output = true;
  template <class M> static constexpr typename M::V value(typename M::V z, Scalars) { return M::tanh(z); }
  template <class M> static constexpr typename M::V gradient(typename M::V g, typename M::V s, Scalars) {
    return g * (M::fill(1) - s * s);
  }
  template <class M> static constexpr Taylor<M> expand(typename M::V z, Scalars) {
    const auto y = M::tanh(z), square = y * y, first = M::fill(1) - square;
    return {y, first, M::fill(-2) * y * first, first * (M::fill(6) * square - M::fill(2))};
  }
};

// z times the normal distribution function (Hendrycks and Gimpel, 2016).
struct Gelu {
  static constexpr const char* name = "gelu";
  static constexpr ParameterInfo parameters[2] = {};
  static constexpr bool keeps_output = false;
  static constexpr double inverse_sqrt_2pi = 0.39894228040143267794;
  template <class M> static constexpr typename M::V value(typename M::V z, Scalars) {
    return z * cumulative<M>(z, M::exp_of_negative(M::fill(-0.5) * z * z));
  }
  template <class M> static constexpr typename M::V gradient(typename M::V g, typename M::V s, Scalars) {
    const auto bell = M::exp_of_negative(M::fill(-0.5) * s * s);
    return g * (cumulative<M>(s, bell) + s * (bell * M::fill(inverse_sqrt_2pi)));
  }
  template <class M> static constexpr typename M::V cumulative(typename M::V z, typename M::V bell) {
    const auto tail = bell * M::normal_tail(M::abs(z));
    return z > M::fill(0) ? M::fill(1) - tail : tail;
  }
  template <class M> static constexpr Taylor<M> expand(typename M::V z, Scalars) {
    // Beyond 40 the density is 0 in both dtypes, and powers of z could overflow.
    const auto top = M::fill(40), below = z > top ? top : z, x = below < -top ? -top : below, square = x * x;
    const auto bell = M::exp_of_negative(M::fill(-0.5) * square), phi = cumulative<M>(z, bell);
    const auto density = bell * M::fill(inverse_sqrt_2pi);
    return {z * phi, phi + x * density, density * (M::fill(2) - square), density * x * (square - M::fill(4))};
  }
};

// z / 2 (1 + tanh u) = z sigmoid(2 u), u = sqrt(2 / pi) (z + 0.044715 z^3).
struct GeluTanh {
  static constexpr const char* name = "gelu_tanh";
  static constexpr ParameterInfo parameters[2] = {};
  static constexpr bool keeps_output = false;
  static constexpr double twice_sqrt_2_over_pi = 1.5957691216057307117598;
  static constexpr double cubic = 0.044715;
  template <class M> static constexpr typename M::V value(typename M::V z, Scalars) {
    return z * M::sigmoid(M::fill(twice_sqrt_2_over_pi) * (z + M::fill(cubic) * (z * z * z)));
  }
  template <class M> static constexpr typename M::V gradient(typename M::V g, typename M::V s, Scalars) {
    const auto scale = M::fill(twice_sqrt_2_over_pi);
    const auto one = M::fill(1);
    const auto square = s * s;
    const auto y = M::sigmoid(scale * (s + M::fill(cubic) * (square * s)));
    const auto inner = scale * (one + M::fill(3 * cubic) * square);
    return g * (y + s * (y * (one - y)) * inner);
  }
  template <class M> static constexpr Taylor<M> expand(typename M::V z, Scalars) {
    // Beyond 20 the sigmoid is 0 or 1 in both dtypes, and powers of z could overflow.
    const auto top = M::fill(20), one = M::fill(1), scale = M::fill(twice_sqrt_2_over_pi);
    const auto below = z > top ? top : z, x = below < -top ? -top : below, square = x * x;
    const auto y = M::sigmoid(scale * (x + M::fill(cubic) * (square * x)));
    const auto slopes = SigmoidSlopes<M>::of(y);
    // Derivatives of the sigmoid's argument.
    const auto u1 = scale * (one + M::fill(3 * cubic) * square), u2 = scale * (M::fill(6 * cubic) * x);
    const auto u3 = scale * M::fill(6 * cubic);
    const auto second = slopes.second * (u1 * u1) + slopes.first * u2;
    const auto third = slopes.third * (u1 * u1 * u1) + M::fill(3) * slopes.second * (u1 * u2) + slopes.first * u3;
    return times_argument<M>(z, y, slopes.first * u1, second, third);
  }
};

struct Silu {
  static constexpr const char* name = "silu";
  static constexpr ParameterInfo parameters[2] = {};
  static constexpr bool keeps_output = false;
  template <class M> static constexpr typename M::V value(typename M::V z, Scalars) { return z * M::sigmoid(z); }
  template <class M> static constexpr typename M::V gradient(typename M::V g, typename M::V s, Scalars) {
    const auto one = M::fill(1);
    const auto y = M::sigmoid(s);
    return g * (y * (one + s * (one - y)));
  }
  template <class M> static constexpr Taylor<M> expand(typename M::V z, Scalars) {
    const auto y = M::sigmoid(z);
    const auto slopes = SigmoidSlopes<M>::of(y);
    return times_argument<M>(z, y, slopes.first, slopes.second, slopes.third);
  }
};

// z tanh(log(1 + e^z)) = z n / (n + 2) with n = e^z (e^z + 2) (Misra, 2019). Above z = 20 the
// quotient is 1 in double precision, and e^z would overflow.
struct Mish {
  static constexpr const char* name = "mish";
  static constexpr ParameterInfo parameters[2] = {};
  static constexpr bool keeps_output = false;
  template <class M> static constexpr typename M::V value(typename M::V z, Scalars) {
    const auto e = exp_below_20<M>(z);
    const auto n = e * (e + M::fill(2));
    return z * (n / (n + M::fill(2)));
  }
  template <class M> static constexpr typename M::V gradient(typename M::V g, typename M::V s, Scalars) {
    const auto two = M::fill(2);
    const auto e = exp_below_20<M>(s);
    const auto n = e * (e + two);
    const auto inverse = M::fill(1) / (n + two);
    // s * 0 keeps the NaN that torch gives at infinity.
    const auto bend = s > M::fill(20) ? s * M::fill(0) : s * (M::fill(4) * e * (e + M::fill(1)) * inverse * inverse);
    return g * (n * inverse + bend);
  }
  template <class M> static constexpr typename M::V exp_below_20(typename M::V z) {
    const auto top = M::fill(20);
    return M::exp(z > top ? top : z);
  }
  template <class M> static constexpr Taylor<M> expand(typename M::V z, Scalars) {
    // y = tanh(softplus(z)), y' = q w with q = 1 - y^2 and w = sigmoid(z).
    const auto zero = M::fill(0), one = M::fill(1), two = M::fill(2);
    const auto e = exp_below_20<M>(z), n = e * (e + two), inverse = one / (n + two), y = n * inverse;
    const auto curved = M::fill(4) * (e + one) * (e + one) * inverse * inverse;
    const auto q = z > M::fill(20) ? zero : curved, w = e / (e + one);
    const auto slopes = SigmoidSlopes<M>::of(w);
    const auto first = q * w, inner = slopes.first - two * y * w * w;
    const auto inner_slope = slopes.second - two * first * w * w - M::fill(4) * y * w * slopes.first;
    const auto third = q * inner_slope - two * y * first * inner;
    return times_argument<M>(z, y, first, q * inner, third);
  }
};

struct Hardswish {
  static constexpr const char* name = "hardswish";
  static constexpr ParameterInfo parameters[2] = {};
  static constexpr bool keeps_output = false;
  template <class M> static constexpr typename M::V value(typename M::V z, Scalars) {
    const auto zero = M::fill(0);
    const auto six = M::fill(6);
    auto gate = z + M::fill(3);
    gate = gate < zero ? zero : gate;
    gate = gate > six ? six : gate;
    return z * gate / six;
  }
  template <class M> static constexpr typename M::V gradient(typename M::V g, typename M::V s, Scalars) {
    const auto three = M::fill(3);
    const auto middle = g * (s / three + M::fill(0.5));
    return s <= -three ? M::fill(0) : (s >= three ? g : middle);
  }
  template <class M> static constexpr Taylor<M> expand(typename M::V z, Scalars p) {
    const auto zero = M::fill(0), one = M::fill(1), three = M::fill(3);
    const auto slope = z / three + M::fill(0.5), curvature = one / three;
    const auto below = z <= -three ? zero : slope, bent = z > -three ? curvature : zero;
    return {value<M>(z, p), z >= three ? one : below, z < three ? bent : zero, zero};
  }
};

// log(1 + e^(beta z)) / beta, the identity where beta z exceeds the threshold.
struct Softplus {
  static constexpr const char* name = "softplus";
  static constexpr ParameterInfo parameters[2] = {{"beta", 1.0}, {"threshold", 20.0}};
  static constexpr bool keeps_output = false;
  template <class M> static constexpr typename M::V value(typename M::V z, Scalars p) {
    const auto x = z * M::fill(p.a);
    const auto zero = M::fill(0);
    const auto soft = (x > zero ? x : zero) + M::log1p_of_unit(M::exp(-M::abs(x)));
    return x > M::fill(p.b) ? z : soft / M::fill(p.a);
  }
  template <class M> static constexpr typename M::V gradient(typename M::V g, typename M::V s, Scalars p) {
    const auto x = s * M::fill(p.a);
    return x > M::fill(p.b) ? g : g * M::sigmoid(x);
  }
  template <class M> static constexpr Taylor<M> expand(typename M::V z, Scalars p) {
    const auto zero = M::fill(0), x = z * M::fill(p.a), limit = M::fill(p.b), y = M::sigmoid(x);
    const auto slopes = SigmoidSlopes<M>::of(y);
    const auto second = M::fill(p.a) * slopes.first, third = M::fill(p.a * p.a) * slopes.second;
    return {value<M>(z, p), x > limit ? M::fill(1) : y, x > limit ? zero : second, x > limit ? zero : third};
  }
};

// The sine of frequency z, a product that is rounded before, as that of a program is.
struct Sin {
  static constexpr const char* name = "sin";
  static constexpr ParameterInfo parameters[2] = {{"frequency", 1.0}};
  static constexpr bool keeps_output = false;
  template <class M> static constexpr typename M::V value(typename M::V z, Scalars p) {
    return M::sin(z * M::fill(p.a));
  }
  template <class M> static constexpr typename M::V gradient(typename M::V g, typename M::V s, Scalars p) {
    const auto frequency = M::fill(p.a);
    return g * M::cos(s * frequency) * frequency;
  }
  template <class M> static constexpr Taylor<M> expand(typename M::V z, Scalars p) {
    const auto frequency = M::fill(p.a), x = z * frequency;
    const auto y = M::sin(x), slope = M::cos(x) * frequency, square = frequency * frequency;
    return {y, slope, -y * square, -slope * square};
  }
};

template <class... A> struct ActivationList {
  static constexpr int size = sizeof...(A);
};

// The order is the numbering that ActivationSpec::kind and the operators' schemas use.
using Activations = ActivationList<Identity, Relu, LeakyRelu, Elu, Selu, Sigmoid, Tanh, Gelu, GeluTanh, Silu, Mish,
                                   Hardswish, Softplus, Sin, Celu>;

}  // namespace fastmlp
