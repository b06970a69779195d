/* The float32 polynomials of exponentials and logarithms, once for C and OpenCL C. The including
 * file defines V, a vector of floats, and POLYNOMIAL(name), the name of a function. */

/* e^r - 1 for r = x - k ln 2 in [-ln2/2, ln2/2], ln 2 in two parts: minimax to degree 7. */
INLINE V POLYNOMIAL(expm1_rest)(V x, V k) {
    V r = x - k * 0.693359375f;
    r = r + k * 2.12194440e-4f;
    V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return p * (r * r) + r;
}

/* p in 2 atanh(s) = 2 s + s z p for z = s^2, s in the range of log1p. */
INLINE V POLYNOMIAL(atanh_rest)(V z) {
    V p = z * 0.29581011f + 0.39987992f;
    return p * z + 0.66666696f;
}
