/* The vector type of the programs, its functions, access to rows in memory, exact sums, reductions
 * over a work-group. A program's build options or first lines define:
 *
 *   REAL         float or double: the type of the arithmetic
 *   WIDTH        1, 2, 4, 8 or 16: elements of the vector type V
 *   FP64         defined if the device has doubles
 *   GROUP        work-items of a work-group, a power of two
 *   BLOCK        vectors that a work-item takes at a time
 *   INDEX        int or long: positions within a row
 *   POLYNOMIALS  defined if the driver's exponentials are slow (REAL is float)
 *   ALIGNED      defined if every row begins at a multiple of a vector
 *   UNROLLED     defined if the vectors of a block should stay in registers
 *
 * Stored elements are f32, f64, f16 or bf16. vload_half and shifts read the narrow ones, so that no
 * extension is needed.
 */
#ifndef PYLOSS_CL_TYPES
#define PYLOSS_CL_TYPES

#define CAT_(a, b) a##b
#define CAT(a, b) CAT_(a, b)

#ifdef FP64
#pragma OPENCL EXTENSION cl_khr_fp64 : enable
#define SCALAR double /* the widest float type of the device */
#else
#define SCALAR float
#endif

#if WIDTH > 1
#define V CAT(REAL, WIDTH)
#define VF CAT(float, WIDTH)
#define VI CAT(int, WIDTH)
#define VU CAT(uint, WIDTH)
#else
#define V REAL
#define VF float
#define VI int
#define VU uint
#endif
#define INLINE static inline
#define TO_V(x) CAT(convert_, V)(x)
#define TO_VF(x) CAT(convert_, VF)(x)
#define FORMULA(name) name
#define v_set(a) ((V)((REAL)(a)))
#define v_abs(x) fabs(x)
#define v_less(a, b) ((a) < (b))
#define v_equal(a, b) ((a) == (b))
#define v_select(mask, a, b) ((mask) ? (a) : (b))
#define v_max(a, b) v_select(v_less(b, a), a, b) /* b where either is NaN */
#define v_min(a, b) v_select(v_less(a, b), a, b)
#define v_log_grown(x, d) v_log1p((d) / (x))
#define v_decay(x) v_exp(x)
#define v_reciprocal(x) (v_set(1) / (x))
#ifndef POLYNOMIALS
#define v_exp(x) exp(x)
#define v_expm1(x) expm1(x)
#define v_log1p(x) log1p(x)
#else
/* The functions of kernels/simd/vec.h. Drivers of processors compute exponentials to the last bit,
 * at several times the cost. */
#define AS_VI CAT(as_, VI)
#define AS_V CAT(as_, V)
#define ROUNDER 12582912.0f /* 1.5 * 2^23: adding it rounds to an integer in the low bits */

#define POLYNOMIAL(name) name
#include "../../polynomials.h"

/* x log2(e) rounded to the nearest whole number; *n is that number as an integer. */
INLINE V powers_of_two(V x, VI *n) {
    V shifted = x * 1.44269504088896341f + ROUNDER;
    *n = AS_VI(shifted) - as_int(ROUNDER);
    return shifted - ROUNDER;
}
INLINE V v_exp(V x) {
    V c = x < -104.0f ? v_set(-104.0f) : x; /* in this order a NaN stays NaN */
    c = c > 89.0f ? v_set(89.0f) : c;
    VI n;
    V p = expm1_rest(c, powers_of_two(c, &n)) + 1.0f;
    VI low = n >> 1;
    return p * AS_V((low + 127) << 23) * AS_V((n - low + 127) << 23);
}
/* For x <= 80. */
INLINE V v_expm1(V x) {
    V c = x < -80.0f ? v_set(-80.0f) : x;
    VI n;
    V rest = expm1_rest(c, powers_of_two(c, &n));
    V two_k = AS_V((n + 127) << 23);
    return two_k * rest + (two_k - 1.0f);
}
INLINE V v_log1p(V x) {
    V u = x + 1.0f;
    VI bits = AS_VI(u) + (0x3f800000 - 0x3f3504f3), k = (bits >> 23) - 127;
    V f = k == 0 ? x : AS_V((bits & 0x7fffff) + 0x3f3504f3) - 1.0f;
    V s = f / (f + 2.0f), z = s * s;
    V y = s * (z * atanh_rest(z)) + (s + s) + TO_V(k) * 0.69314718f;
    return u - u == 0.0f ? y : u;
}
#endif

#if WIDTH > 1
#define VLOAD CAT(vload, WIDTH)
#define VSTORE CAT(vstore, WIDTH)
#else
#define VLOAD(i, p) ((p)[i])
#define VSTORE(v, i, p) ((p)[i] = (v))
#endif

/* The sum of a vector's elements, in a fixed order. */
INLINE REAL sum_of(V v) {
    REAL a[WIDTH];
    VSTORE(v, 0, a);
    for (int h = WIDTH / 2; h; h /= 2)
        for (int i = 0; i < h; i++) a[i] += a[i + h];
    return a[0];
}
/* The largest of a vector's elements. */
INLINE REAL max_of(V v) {
    REAL a[WIDTH];
    VSTORE(v, 0, a);
    for (int h = WIDTH / 2; h; h /= 2)
        for (int i = 0; i < h; i++) a[i] = a[i + h] > a[i] ? a[i + h] : a[i];
    return a[0];
}

/* ---- stored elements of type T: stored_T; load_T and store_T of a vector; load1_T, store1_T of
 * one */

typedef float stored_f32;
typedef ushort stored_f16;
typedef ushort stored_bf16;

#ifdef ALIGNED
#define VECTOR_AT(type, p) (*(const global CAT(type, WIDTH) *)(p))
#define VECTOR_TO(type, v, p) (*(global CAT(type, WIDTH) *)(p) = (v))
#else
#define VECTOR_AT(type, p) VLOAD(0, p)
#define VECTOR_TO(type, v, p) VSTORE(v, 0, p)
#endif

INLINE V load_f32(const global float *p) { return TO_V(VECTOR_AT(float, p)); }
INLINE void store_f32(V v, global float *p) { VECTOR_TO(float, TO_VF(v), p); }
INLINE REAL load1_f32(const global float *p) { return *p; }
INLINE void store1_f32(REAL x, global float *p) { *p = (float)x; }

#if WIDTH > 1
#ifdef FP64
typedef double stored_f64;
INLINE V load_f64(const global double *p) { return TO_V(VECTOR_AT(double, p)); }
INLINE void store_f64(V v, global double *p) {
    VECTOR_TO(double, CAT(CAT(convert_, CAT(double, WIDTH)), )(v), p);
}
INLINE REAL load1_f64(const global double *p) { return (REAL)*p; }
INLINE void store1_f64(REAL x, global double *p) { *p = x; }
#endif

INLINE V load_f16(const global ushort *p) {
    return TO_V(CAT(vload_half, WIDTH)(0, (const global half *)p));
}
INLINE void store_f16(V v, global ushort *p) {
    CAT(CAT(vstore_half, WIDTH), _rte)(TO_VF(v), 0, (global half *)p);
}
INLINE REAL load1_f16(const global ushort *p) { return vload_half(0, (const global half *)p); }
INLINE void store1_f16(REAL x, global ushort *p) { vstore_half_rte((float)x, 0, (global half *)p); }

INLINE VU bf16_bits(VF x) {
    VU bits = CAT(as_, VU)(x);
    VU rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    return x != x ? (bits >> 16 | 0x40u) : rounded;
}
INLINE V load_bf16(const global ushort *p) {
    return TO_V(CAT(as_, VF)(CAT(convert_, VU)(VECTOR_AT(ushort, p)) << 16));
}
INLINE void store_bf16(V v, global ushort *p) {
    VECTOR_TO(ushort, CAT(convert_, CAT(ushort, WIDTH))(bf16_bits(TO_VF(v))), p);
}
INLINE REAL load1_bf16(const global ushort *p) { return as_float((uint)*p << 16); }
INLINE void store1_bf16(REAL x, global ushort *p) { *p = (ushort)bf16_bits((VF)((float)x)).s0; }
#endif

/* fetch_T: elements [i, i + WIDTH) of a row of n, `fill` past its end. put_T: stores those within
 * it. */
#define ROW_ACCESS(type) \
    INLINE V fetch_##type(const global stored_##type *row, INDEX i, INDEX n, REAL fill) { \
        if (n - i >= WIDTH) return load_##type(row + i); \
        REAL a[WIDTH]; \
        for (int j = 0; j < WIDTH; j++) a[j] = fill; \
        for (int j = 0; j < n - i; j++) a[j] = load1_##type(row + i + j); \
        return VLOAD(0, a); \
    } \
    INLINE void put_##type(V v, global stored_##type *row, INDEX i, INDEX n) { \
        if (n - i >= WIDTH) { \
            store_##type(v, row + i); \
            return; \
        } \
        REAL a[WIDTH]; \
        VSTORE(v, 0, a); \
        for (int j = 0; j < n - i; j++) store1_##type(a[j], row + i + j); \
    }
ROW_ACCESS(f32)
#if WIDTH > 1
ROW_ACCESS(f16)
ROW_ACCESS(bf16)
#ifdef FP64
ROW_ACCESS(f64)
#endif
#endif

#ifdef REAL_F64
#define fetch_real fetch_f64
#define put_real put_f64
#else
#define fetch_real fetch_f32
#define put_real put_f32
#endif

/* ---- exact sums: a double, or a float and the rounding error of its additions (Neumaier) */

typedef struct {
    SCALAR sum, rest;
} exact;

INLINE void add_to(exact *to, SCALAR x) {
#ifdef FP64
    to->sum += x;
#else
    SCALAR sum = to->sum + x;
    to->rest += fabs(to->sum) >= fabs(x) ? (to->sum - sum) + x : (x - sum) + to->sum;
    to->sum = sum;
#endif
}
/* Adds a b, and the rounding error of the product. */
INLINE void add_product(exact *to, SCALAR a, SCALAR b) {
#ifdef FP64
    to->sum += a * b;
#else
    const SCALAR product = a * b;
    add_to(to, product);
    to->rest += fma(a, b, -product);
#endif
}
INLINE void add_exact(exact *to, exact x) {
    add_to(to, x.sum);
    to->rest += x.rest;
}
INLINE void rescale(exact *to, SCALAR by) {
    to->sum *= by;
    to->rest *= by;
}
INLINE SCALAR value_of(exact x) {
    /* An infinite or NaN sum has a NaN rest. */
    return x.rest == x.rest ? x.sum + x.rest : x.sum;
}

/* float64 sums in memory. A device without doubles converts between their bits and two floats. */
#ifdef FP64
typedef double stored_wide;
INLINE void put_wide(exact x, global stored_wide *p) { *p = value_of(x); }
INLINE exact take_wide(const global stored_wide *p) {
    exact x = {*p, 0};
    return x;
}
#else
typedef ulong stored_wide;
INLINE void put_wide(exact x, global stored_wide *p) {
    const float high = value_of(x), low = x.rest == x.rest ? (x.sum - high) + x.rest : 0;
    if (high == 0 || high - high != 0) { /* 0, infinite or NaN */
        const uint bits = as_uint(high);
        *p = (ulong)(bits & 0x80000000u) << 32 |
             (high == 0 ? 0 : (ulong)0x7ff << 52 | (ulong)(bits & 0x7fffffu) << 29);
        return;
    }
    const float size = fabs(high);
    int exponent = ilogb(size);
    long digits = ((long)ldexp(size, 30 - exponent) << 22) +
                  (long)ldexp(high < 0 ? -low : low, 52 - exponent);
    if (digits < 1L << 52) {
        digits <<= 1;
        exponent--;
    }
    *p =
        (ulong)(high < 0) << 63 | (((ulong)(exponent + 1023) << 52) + (ulong)(digits - (1L << 52)));
}
INLINE exact take_wide(const global stored_wide *p) {
    const ulong bits = *p, digits = bits & (((ulong)1 << 52) - 1);
    const int exponent = (int)(bits >> 52 & 0x7ff) - 1023;
    const float sign = bits >> 63 ? -1 : 1;
    exact x = {0, 0};
    if (exponent == 1024) {
        x.sum = digits ? NAN : sign * INFINITY;
    } else if (exponent > -1023) {
        x.sum = sign * ldexp((float)((digits | (ulong)1 << 52) >> 29), exponent - 23);
        x.rest = sign * ldexp((float)(digits & 0x1fffffffu), exponent - 52);
    }
    return x;
}
#endif

/* An array argument: a buffer and an offset in elements. */
#define ARRAY(type, name) global type *name##_data, long name##_offset
#define ROW(name, i) (name##_data + (name##_offset + (i)))
#define KERNEL kernel __attribute__((reqd_work_group_size(GROUP, 1, 1))) void

/* a b + c; in one instruction if the device has it. */
#if defined(FP_FAST_FMAF) || defined(POLYNOMIALS)
#define FMA(a, b, c) fma(a, b, c)
#else
#define FMA(a, b, c) mad(a, b, c)
#endif

/* ---- reductions: all work-items of a group call them, and all get the result */

#if GROUP == 1
#define GROUP_MEMORY
#define GROUP_POINTER 0
#define group_exact(x) (x)
#define group_sum(x) (x)
#define group_max(x) (x)
#define LANE 0
#else
#define GROUP_MEMORY local SCALAR group_memory[2 * GROUP];
#define GROUP_POINTER group_memory
#define group_exact(x) reduce_exact(x, group_memory)
#define LANE ((int)get_local_id(0))
#define group_sum(x) reduce_sum(x, group_memory)
#define group_max(x) reduce_max(x, group_memory)
INLINE SCALAR reduce_sum(SCALAR x, local SCALAR *memory) {
    memory[LANE] = x;
    barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
    for (int h = GROUP / 2; h; h /= 2) {
        if (LANE < h) memory[LANE] += memory[LANE + h];
        barrier(CLK_LOCAL_MEM_FENCE);
    }
    x = memory[0];
    barrier(CLK_LOCAL_MEM_FENCE);
    return x;
}
INLINE exact reduce_exact(exact x, local SCALAR *memory) {
    memory[LANE] = x.sum;
    memory[GROUP + LANE] = x.rest;
    barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
    for (int h = GROUP / 2; h; h /= 2) {
        if (LANE < h) {
            exact other = {memory[LANE + h], memory[GROUP + LANE + h]};
            add_exact(&x, other);
            memory[LANE] = x.sum;
            memory[GROUP + LANE] = x.rest;
        }
        barrier(CLK_LOCAL_MEM_FENCE);
    }
    x.sum = memory[0];
    x.rest = memory[GROUP];
    barrier(CLK_LOCAL_MEM_FENCE);
    return x;
}
INLINE SCALAR reduce_max(SCALAR x, local SCALAR *memory) {
    memory[LANE] = x;
    barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
    for (int h = GROUP / 2; h; h /= 2) {
        if (LANE < h && memory[LANE + h] > memory[LANE]) memory[LANE] = memory[LANE + h];
        barrier(CLK_LOCAL_MEM_FENCE);
    }
    x = memory[0];
    barrier(CLK_LOCAL_MEM_FENCE);
    return x;
}
#endif

/* A work-item takes BLOCK vectors at a time, GROUP * WIDTH elements apart: the vectors that a group
 * reads together are contiguous. EACH_VECTOR counts a block's vectors with b; vector b begins at
 * i. */
#define STEP (GROUP * WIDTH)
#ifdef UNROLLED
#define UNROLL _Pragma("unroll")
#else
#define UNROLL
#endif
#define EACH_BLOCK(begin, n) for (INDEX begin = 0; begin < (n); begin += STEP * BLOCK)
#define EACH_OF_BLOCK(b) UNROLL for (int b = 0; b < BLOCK; b++)
#define EACH_VECTOR(b, i, begin, n) \
    EACH_OF_BLOCK(b) \
        for (INDEX i = begin + b * STEP + LANE * WIDTH, once = 1; once && i < (n); once = 0)

#endif
