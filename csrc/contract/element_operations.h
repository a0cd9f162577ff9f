// The operations of elementwise programs, each once: name, how many operands and scalars it has, and its value. Those
// of activation.h and loss.h are operations too, and stand there. Included by every ISA file inside its target region,
// where M is that ISA's vector arithmetic, and by elementwise.cpp for the names; the rules of activation.h hold here
// too. A boolean is 0 or 1. Values at kinks, of NaN and of infinity are torch's.
#pragma once

#include "activation.h"

namespace fastmlp {

// An operation reads as many of a, b and c as it has operands.
template <class M> struct Operands {
  typename M::V a, b, c;
};

template <int operand_count, int scalar_count = 0> struct OperationOf {
  static constexpr int operands = operand_count, scalars = scalar_count;
};

// A boolean of what comparisons of vectors give.
template <class M, class Mask> typename M::V boolean(Mask mask) { return mask ? M::fill(1) : M::fill(0); }

struct Add : OperationOf<2> {
  static constexpr const char* name = "add";
  template <class M> static auto value(const Operands<M>& x, Scalars) { return x.a + x.b; }
};
struct AddScaled : OperationOf<2, 1> {
  static constexpr const char* name = "add_scaled";
  template <class M> static auto value(const Operands<M>& x, Scalars p) { return x.a + M::fill(p.a) * x.b; }
};
struct Subtract : OperationOf<2> {
  static constexpr const char* name = "sub";
  template <class M> static auto value(const Operands<M>& x, Scalars) { return x.a - x.b; }
};
struct Multiply : OperationOf<2> {
  static constexpr const char* name = "mul";
  template <class M> static auto value(const Operands<M>& x, Scalars) { return x.a * x.b; }
};
struct Divide : OperationOf<2> {
  static constexpr const char* name = "div";
  template <class M> static auto value(const Operands<M>& x, Scalars) { return x.a / x.b; }
};

// Of equal operands, which zeros of different signs are, the second one.
struct Maximum : OperationOf<2> {
  static constexpr const char* name = "maximum";
  template <class M> static auto value(const Operands<M>& x, Scalars) { return (x.a > x.b) | (x.a != x.a) ? x.a : x.b; }
};
struct Minimum : OperationOf<2> {
  static constexpr const char* name = "minimum";
  template <class M> static auto value(const Operands<M>& x, Scalars) { return (x.a < x.b) | (x.a != x.a) ? x.a : x.b; }
};

struct AddScalar : OperationOf<1, 1> {
  static constexpr const char* name = "add_scalar";
  template <class M> static auto value(const Operands<M>& x, Scalars p) { return x.a + M::fill(p.a); }
};
struct MultiplyScalar : OperationOf<1, 1> {
  static constexpr const char* name = "mul_scalar";
  template <class M> static auto value(const Operands<M>& x, Scalars p) { return x.a * M::fill(p.a); }
};
struct SubtractFromScalar : OperationOf<1, 1> {
  static constexpr const char* name = "rsub_scalar";
  template <class M> static auto value(const Operands<M>& x, Scalars p) { return M::fill(p.a) - x.a; }
};
struct DivideScalar : OperationOf<1, 1> {
  static constexpr const char* name = "rdiv_scalar";
  template <class M> static auto value(const Operands<M>& x, Scalars p) { return M::fill(p.a) / x.a; }
};
struct DivideByScalar : OperationOf<1, 1> {
  static constexpr const char* name = "div_scalar";
  template <class M> static auto value(const Operands<M>& x, Scalars p) { return x.a / M::fill(p.a); }
};

struct Negate : OperationOf<1> {
  static constexpr const char* name = "neg";
  template <class M> static auto value(const Operands<M>& x, Scalars) { return -x.a; }
};
struct Reciprocal : OperationOf<1> {
  static constexpr const char* name = "reciprocal";
  template <class M> static auto value(const Operands<M>& x, Scalars) { return M::fill(1) / x.a; }
};
struct Absolute : OperationOf<1> {
  static constexpr const char* name = "abs";
  template <class M> static auto value(const Operands<M>& x, Scalars) { return M::abs(x.a); }
};
// 0 of NaN.
struct Sign : OperationOf<1> {
  static constexpr const char* name = "sign";
  template <class M> static auto value(const Operands<M>& x, Scalars) {
    const auto zero = M::fill(0);
    return boolean<M>(x.a > zero) - boolean<M>(x.a < zero);
  }
};
struct SquareRoot : OperationOf<1> {
  static constexpr const char* name = "sqrt";
  template <class M> static auto value(const Operands<M>& x, Scalars) { return M::sqrt(x.a); }
};
struct InverseRoot : OperationOf<1> {
  static constexpr const char* name = "rsqrt";
  template <class M> static auto value(const Operands<M>& x, Scalars) { return M::fill(1) / M::sqrt(x.a); }
};
struct Exponential : OperationOf<1> {
  static constexpr const char* name = "exp";
  template <class M> static auto value(const Operands<M>& x, Scalars) { return M::exp(x.a); }
};
struct ExponentialLessOne : OperationOf<1> {
  static constexpr const char* name = "expm1";
  template <class M> static auto value(const Operands<M>& x, Scalars) { return M::expm1(x.a); }
};
struct Logarithm : OperationOf<1> {
  static constexpr const char* name = "log";
  template <class M> static auto value(const Operands<M>& x, Scalars) { return M::log(x.a); }
};
struct LogarithmOfOneMore : OperationOf<1> {
  static constexpr const char* name = "log1p";
  template <class M> static auto value(const Operands<M>& x, Scalars) { return M::log1p(x.a); }
};
struct Cosine : OperationOf<1> {
  static constexpr const char* name = "cos";
  template <class M> static auto value(const Operands<M>& x, Scalars) { return M::cos(x.a); }
};
struct Square : OperationOf<1> {
  static constexpr const char* name = "square";
  template <class M> static auto value(const Operands<M>& x, Scalars) { return x.a * x.a; }
};
struct Cube : OperationOf<1> {
  static constexpr const char* name = "cube";
  template <class M> static auto value(const Operands<M>& x, Scalars) { return x.a * x.a * x.a; }
};

// NaN of either stays; of zeros of different signs, the operand's.
struct ClampMin : OperationOf<1, 1> {
  static constexpr const char* name = "clamp_min";
  template <class M> static auto value(const Operands<M>& x, Scalars p) {
    const auto least = M::fill(p.a);
    return (x.a < least) | (least != least) ? least : x.a;
  }
};
struct ClampMax : OperationOf<1, 1> {
  static constexpr const char* name = "clamp_max";
  template <class M> static auto value(const Operands<M>& x, Scalars p) {
    const auto most = M::fill(p.a);
    return (x.a > most) | (most != most) ? most : x.a;
  }
};

struct Where : OperationOf<3> {
  static constexpr const char* name = "where";
  template <class M> static auto value(const Operands<M>& x, Scalars) { return x.a != M::fill(0) ? x.b : x.c; }
};
// In torch's form, which is exact at the end that is nearer.
struct Interpolate : OperationOf<2, 1> {
  static constexpr const char* name = "lerp";
  template <class M> static auto value(const Operands<M>& x, Scalars p) {
    const auto way = x.b - x.a;
    return p.a < 0.5 && p.a > -0.5 ? x.a + M::fill(p.a) * way : x.b + M::fill(p.a - 1) * way;
  }
};
struct AddProduct : OperationOf<3, 1> {
  static constexpr const char* name = "addcmul";
  template <class M> static auto value(const Operands<M>& x, Scalars p) { return x.a + M::fill(p.a) * x.b * x.c; }
};
struct AddQuotient : OperationOf<3, 1> {
  static constexpr const char* name = "addcdiv";
  template <class M> static auto value(const Operands<M>& x, Scalars p) { return x.a + M::fill(p.a) * x.b / x.c; }
};

struct Greater {
  static constexpr const char *name = "gt", *with_scalar = "gt_scalar";
  template <class M> static auto holds(typename M::V a, typename M::V b) { return a > b; }
};
struct GreaterOrEqual {
  static constexpr const char *name = "ge", *with_scalar = "ge_scalar";
  template <class M> static auto holds(typename M::V a, typename M::V b) { return a >= b; }
};
struct Less {
  static constexpr const char *name = "lt", *with_scalar = "lt_scalar";
  template <class M> static auto holds(typename M::V a, typename M::V b) { return a < b; }
};
struct LessOrEqual {
  static constexpr const char *name = "le", *with_scalar = "le_scalar";
  template <class M> static auto holds(typename M::V a, typename M::V b) { return a <= b; }
};
struct Equal {
  static constexpr const char *name = "eq", *with_scalar = "eq_scalar";
  template <class M> static auto holds(typename M::V a, typename M::V b) { return a == b; }
};
struct NotEqual {
  static constexpr const char *name = "ne", *with_scalar = "ne_scalar";
  template <class M> static auto holds(typename M::V a, typename M::V b) { return a != b; }
};

template <class Relation> struct Compare : OperationOf<2> {
  static constexpr const char* name = Relation::name;
  template <class M> static auto value(const Operands<M>& x, Scalars) {
    return boolean<M>(Relation::template holds<M>(x.a, x.b));
  }
};
template <class Relation> struct CompareScalar : OperationOf<1, 1> {
  static constexpr const char* name = Relation::with_scalar;
  template <class M> static auto value(const Operands<M>& x, Scalars p) {
    return boolean<M>(Relation::template holds<M>(x.a, M::fill(p.a)));
  }
};

struct Not : OperationOf<1> {
  static constexpr const char* name = "not";
  template <class M> static auto value(const Operands<M>& x, Scalars) { return boolean<M>(x.a == M::fill(0)); }
};
struct And : OperationOf<2> {
  static constexpr const char* name = "and";
  template <class M> static auto value(const Operands<M>& x, Scalars) {
    return boolean<M>((x.a != M::fill(0)) & (x.b != M::fill(0)));
  }
};
struct Or : OperationOf<2> {
  static constexpr const char* name = "or";
  template <class M> static auto value(const Operands<M>& x, Scalars) {
    return boolean<M>((x.a != M::fill(0)) | (x.b != M::fill(0)));
  }
};
struct Constant : OperationOf<0, 1> {
  static constexpr const char* name = "constant";
  template <class M> static auto value(const Operands<M>&, Scalars p) { return M::fill(p.a); }
};

template <class... O> struct OperationList {
  static constexpr int size = sizeof...(O);
};

// Operations are numbered in this order; the values of the activations follow, then their gradients, then the losses.
using ElementOperations =
    OperationList<Add, AddScaled, Subtract, Multiply, Divide, Maximum, Minimum, AddScalar, MultiplyScalar,
                  SubtractFromScalar, DivideScalar, DivideByScalar, Negate, Reciprocal, Absolute, Sign, SquareRoot,
                  InverseRoot, Exponential, ExponentialLessOne, Logarithm, LogarithmOfOneMore, Cosine, Square, Cube,
                  ClampMin, ClampMax, Where, Interpolate, AddProduct, AddQuotient, Compare<Greater>,
                  Compare<GreaterOrEqual>, Compare<Less>, Compare<LessOrEqual>, Compare<Equal>, Compare<NotEqual>,
                  CompareScalar<Greater>, CompareScalar<GreaterOrEqual>, CompareScalar<Less>,
                  CompareScalar<LessOrEqual>, CompareScalar<Equal>, CompareScalar<NotEqual>, Not, And, Or, Constant>;

}  // namespace fastmlp
