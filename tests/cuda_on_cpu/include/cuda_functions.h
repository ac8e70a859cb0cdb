// Built-in functions and vector types of CUDA C++.
#pragma once

#include <math.h>

#define VECTOR2(name, T)                                    \
    struct alignas(2 * sizeof(T)) name {                    \
        T x, y;                                             \
        static constexpr char emulated_kind = 's';          \
    };                                                      \
    inline name make_##name(T x, T y) { return {x, y}; }
#define VECTOR3(name, T)                                    \
    struct name {                                           \
        T x, y, z;                                          \
        static constexpr char emulated_kind = 's';          \
    };                                                      \
    inline name make_##name(T x, T y, T z) { return {x, y, z}; }
#define VECTOR4(name, T)                                    \
    struct alignas(sizeof(T) < 4 ? 4 * sizeof(T) : 16) name { \
        T x, y, z, w;                                       \
        static constexpr char emulated_kind = 's';          \
    };                                                      \
    inline name make_##name(T x, T y, T z, T w) { return {x, y, z, w}; }
#define VECTORS(T, word)  \
    VECTOR2(word##2, T)   \
    VECTOR4(word##4, T)
VECTORS(char, char)
VECTORS(unsigned char, uchar)
VECTORS(short, short)
VECTORS(unsigned short, ushort)
VECTORS(int, int)
VECTORS(unsigned, uint)
VECTORS(float, float)
VECTORS(double, double)
VECTORS(long long, longlong)
VECTOR3(float3, float)
VECTOR3(int3, int)

// Meetings of threads.  The line of the call tells one meeting from another.
inline void __syncthreads(int line = __builtin_LINE()) { emulation::meet_block(line); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, int line = __builtin_LINE()) {
    int lane = emulation::lane();
    return emulation::shuffle(mask, value, (lane & ~(width - 1)) + (source & (width - 1)), "__shfl_sync", line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, int line = __builtin_LINE()) {
    int lane = emulation::lane(), source = lane ^ bits;
    if (source / width > lane / width) source = lane;
    return emulation::shuffle(mask, value, source, "__shfl_xor_sync", line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
    int lane = emulation::lane(), source = lane + int(delta);
    if (source / width != lane / width) source = lane;
    return emulation::shuffle(mask, value, source, "__shfl_down_sync", line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
    int lane = emulation::lane(), source = lane - int(delta);
    if (source < lane / width * width) source = lane;
    return emulation::shuffle(mask, value, source, "__shfl_up_sync", line);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
    emulation::shuffle(mask, 0, emulation::lane(), "__syncwarp", line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    emulation::shuffle(mask, predicate != 0, emulation::lane(), "__ballot_sync", line);
    return emulation::self->ballot;
}
inline int __any_sync(unsigned mask, int p, int line = __builtin_LINE()) { return __ballot_sync(mask, p, line) != 0; }
inline int __all_sync(unsigned mask, int p, int line = __builtin_LINE()) { return __ballot_sync(mask, !p, line) == 0; }

// Memory
template <class T>
T __ldg(const T* p) { return *p; }
template <class T>
T __ldcs(const T* p) { return *p; }
template <class T>
T __ldcg(const T* p) { return *p; }
template <class T>
void __stcs(T* p, T value) { *p = value; }
template <class T>
void __stcg(T* p, T value) { *p = value; }
inline void __threadfence() {}
inline void __threadfence_block() {}
template <class T>
T atomicAdd(T* p, T value) {
    T old = *p;
    *p = old + value;
    return old;
}
template <class T>
T atomicMax(T* p, T value) {
    T old = *p;
    if (old < value) *p = value;
    return old;
}
template <class T>
T atomicMin(T* p, T value) {
    T old = *p;
    if (value < old) *p = value;
    return old;
}
template <class T>
T atomicExch(T* p, T value) {
    T old = *p;
    *p = value;
    return old;
}
template <class T>
T atomicOr(T* p, T value) {
    T old = *p;
    *p = old | value;
    return old;
}
template <class T>
T atomicCAS(T* p, T expected, T value) {
    T old = *p;
    if (old == expected) *p = value;
    return old;
}

// Numbers.  The fast functions are as exact here as the slow ones; a GPU's are not.
template <class A, class B>
std::common_type_t<A, B> min(A a, B b) {
    if constexpr (std::is_floating_point_v<std::common_type_t<A, B>>) return fmin(a, b);
    return b < a ? b : a;
}
template <class A, class B>
std::common_type_t<A, B> max(A a, B b) {
    if constexpr (std::is_floating_point_v<std::common_type_t<A, B>>) return fmax(a, b);
    return a < b ? b : a;
}
inline float __expf(float x) { return expf(x); }
inline float __exp10f(float x) { return powf(10.0f, x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __tanhf(float x) { return tanhf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frsqrt_rn(float x) { return float(1.0 / sqrt(double(x))); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline double __dadd_rn(double x, double y) { return x + y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline double __fma_rn(double x, double y, double z) { return fma(x, y, z); }
inline float rsqrtf(float x) { return float(1.0 / sqrt(double(x))); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float normcdff(float x) { return float(0.5 * erfc(-double(x) * 0.70710678118654752440)); }
inline double normcdf(double x) { return 0.5 * erfc(-x * 0.70710678118654752440); }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1) : 0; }
template <class To, class From>
To emulated_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
inline int __float_as_int(float x) { return emulated_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return emulated_bits<unsigned>(x); }
inline float __int_as_float(int x) { return emulated_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return emulated_bits<float>(x); }
inline long long __double_as_longlong(double x) { return emulated_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return emulated_bits<double>(x); }
inline int __float2int_rn(float x) { return int(nearbyintf(x)); }
inline int __float2int_rd(float x) { return int(floorf(x)); }
inline int __float2int_rz(float x) { return int(x); }
inline float __int2float_rn(int x) { return float(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned x, unsigned y) { return unsigned((uint64_t(x) * y) >> 32); }
inline int __mulhi(int x, int y) { return int((int64_t(x) * y) >> 32); }
