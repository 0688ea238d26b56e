#pragma once
// exp and tanh on vectors: e^x = 2^n * e^r with |r| <= ln(2) / 2 and a degree-6 polynomial (Cephes expf coefficients), error
// about 1 ulp; tanh(x) = E / (E + 2) with E = e^(2x) - 1 = 2^n * (e^r - 1) + (2^n - 1), which loses nothing near zero.

#include <cmath>

namespace nomoat {
namespace {

// x = n ln(2) + r; returns p with e^r = 1 + r + r^2 p.
template <class V>
inline typename V::F reduce_exponent(typename V::F x, typename V::F& n, typename V::F& r) {
  n = V::round(V::mul(x, V::set1(1.44269504f)));
  r = V::fma(n, V::set1(-0.693359375f), x);
  r = V::fma(n, V::set1(2.12194440e-4f), r);
  typename V::F p = V::set1(1.9875691500e-4f);
  p = V::fma(p, r, V::set1(1.3981999507e-3f));
  p = V::fma(p, r, V::set1(8.3334519073e-3f));
  p = V::fma(p, r, V::set1(4.1665795894e-2f));
  p = V::fma(p, r, V::set1(1.6666665459e-1f));
  return V::fma(p, r, V::set1(5.0000001201e-1f));
}

template <class V>
inline typename V::F vexp(typename V::F x) {
  typename V::F n, r;
  const typename V::F p = reduce_exponent<V>(V::max(V::set1(-87.3f), V::min(V::set1(88.3f), x)), n, r);
  return V::scale_by_power(V::fma(V::mul(r, r), p, V::add(r, V::set1(1.0f))), n);
}

template <class V>
inline typename V::F vtanh(typename V::F x) {
  x = V::max(V::set1(-10.0f), V::min(V::set1(10.0f), x));  // beyond 9.02 it is 1 in float32
  typename V::F n, r;
  const typename V::F p = reduce_exponent<V>(V::add(x, x), n, r), one = V::set1(1.0f), power = V::scale_by_power(one, n);
  const typename V::F e = V::fma(power, V::fma(V::mul(r, r), p, r), V::sub(power, one));
  return V::div(e, V::add(e, V::set1(2.0f)));
}

// cap * tanh(x / cap), and its derivative given that value y: 1 - (y / cap)^2
template <class V>
inline typename V::F capped(typename V::F x, float cap) {
  return V::mul(V::set1(cap), vtanh<V>(V::mul(x, V::set1(1.0f / cap))));
}
template <class V>
inline typename V::F cap_slope(typename V::F y, float cap) {
  const typename V::F t = V::mul(y, V::set1(1.0f / cap));
  return V::fma(V::sub(V::zero(), t), t, V::set1(1.0f));
}

}  // namespace
}  // namespace nomoat
