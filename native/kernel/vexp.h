#pragma once
// exp on vectors: 2^n * e^r with |r| <= ln(2) / 2 and a degree-6 polynomial (Cephes expf coefficients), error about 1 ulp.

#include <cmath>

namespace nomoat {
namespace {

template <class V>
inline typename V::F vexp(typename V::F x) {
  x = V::max(V::set1(-87.3f), V::min(V::set1(88.3f), x));
  const typename V::F n = V::round(V::mul(x, V::set1(1.44269504f)));
  typename V::F r = V::fma(n, V::set1(-0.693359375f), x);
  r = V::fma(n, V::set1(2.12194440e-4f), r);
  typename V::F p = V::set1(1.9875691500e-4f);
  p = V::fma(p, r, V::set1(1.3981999507e-3f));
  p = V::fma(p, r, V::set1(8.3334519073e-3f));
  p = V::fma(p, r, V::set1(4.1665795894e-2f));
  p = V::fma(p, r, V::set1(1.6666665459e-1f));
  p = V::fma(p, r, V::set1(5.0000001201e-1f));
  p = V::fma(V::mul(r, r), p, V::add(r, V::set1(1.0f)));
  return V::scale_by_power(p, n);
}

}  // namespace
}  // namespace nomoat
