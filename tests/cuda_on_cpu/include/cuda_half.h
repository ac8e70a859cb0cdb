// __half and __nv_bfloat16: 16 bits, every operation in float and rounded once to nearest, ties to even.
#pragma once

namespace emulation {

inline uint16_t half_bits(float value) {
    uint32_t x = emulated_bits<uint32_t>(value), sign = x >> 16 & 0x8000;
    x &= 0x7fffffff;
    if (x > 0x7f800000) return 0x7fff;                     // NaN, the one that a GPU makes
    if (x >= 0x47800000) return uint16_t(sign | 0x7c00);   // 65536 and more
    if (x < 0x38800000) {                                  // below 2^-14 steps are 2^-24: float addition rounds so
        float rounded = emulated_bits<float>(x) + 0.5f;    // in [0.5, 1) a float's step is 2^-24
        return uint16_t(sign | (emulated_bits<uint32_t>(rounded) - 0x3f000000));
    }
    x += 0xfff + (x >> 13 & 1);  // may carry into the exponent, up to infinity
    return uint16_t(sign | ((x - 0x38000000) >> 13));
}

inline float half_value(uint16_t bits) {
    uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
    if (exponent == 31) return emulated_bits<float>(sign | 0x7f800000 | fraction << 13);
    if (exponent == 0) {
        float value = float(fraction) * 0x1p-24f;
        return sign ? -value : value;
    }
    return emulated_bits<float>(sign | (exponent + 112) << 23 | fraction << 13);
}

inline uint16_t bfloat_bits(float value) {
    uint32_t x = emulated_bits<uint32_t>(value);
    if ((x & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return uint16_t((x + 0x7fff + (x >> 16 & 1)) >> 16);
}

inline float bfloat_value(uint16_t bits) { return emulated_bits<float>(uint32_t(bits) << 16); }

// `value` as a float rounded to odd, so that rounding once more to 16 bits gives what rounding at once would.
inline float narrowed(double value) {
    float nearest = float(value);
    if (double(nearest) == value || nearest != nearest) return nearest;
    uint32_t bits = emulated_bits<uint32_t>(nearest);
    if (bits & 1) return nearest;
    bool too_far = fabs(double(nearest)) > fabs(value);
    return emulated_bits<float>(too_far ? bits - 1 : bits + 1);
}

}  // namespace emulation

// A 16-bit float converts to and from float by itself, so that, as in CUDA, `half + half` is half and mixing half and
// float without saying which is meant is an error.
#define FLOAT16_TYPE(name, raw, bits_of, value_of, kind)                        \
    struct raw {                                                                \
        unsigned short x;                                                       \
    };                                                                          \
    struct alignas(2) name {                                                    \
        unsigned short bits;                                                    \
        static constexpr char emulated_kind = kind;                             \
        name() = default;                                                       \
        name(float f) : bits(emulation::bits_of(f)) {}                          \
        name(double f) : bits(emulation::bits_of(emulation::narrowed(f))) {}    \
        name(int i) : bits(emulation::bits_of(emulation::narrowed(i))) {}       \
        name(unsigned i) : bits(emulation::bits_of(emulation::narrowed(i))) {}  \
        name(long long i) : bits(emulation::bits_of(emulation::narrowed(double(i)))) {} \
        name(const raw& r) : bits(r.x) {}                                       \
        operator float() const { return emulation::value_of(bits); }            \
        operator raw() const { return {bits}; }                                 \
    };                                                                          \
    inline name operator+(const name& a, const name& b) { return float(a) + float(b); }   \
    inline name operator-(const name& a, const name& b) { return float(a) - float(b); }   \
    inline name operator*(const name& a, const name& b) { return float(a) * float(b); }   \
    inline name operator/(const name& a, const name& b) { return float(a) / float(b); }   \
    inline name operator-(const name& a) { return name(raw{(unsigned short)(a.bits ^ 0x8000)}); } \
    inline name& operator+=(name& a, const name& b) { return a = a + b; }       \
    inline name& operator-=(name& a, const name& b) { return a = a - b; }       \
    inline name& operator*=(name& a, const name& b) { return a = a * b; }       \
    inline name& operator/=(name& a, const name& b) { return a = a / b; }       \
    inline bool operator==(const name& a, const name& b) { return float(a) == float(b); } \
    inline bool operator!=(const name& a, const name& b) { return float(a) != float(b); } \
    inline bool operator<(const name& a, const name& b) { return float(a) < float(b); }   \
    inline bool operator>(const name& a, const name& b) { return float(a) > float(b); }   \
    inline bool operator<=(const name& a, const name& b) { return float(a) <= float(b); } \
    inline bool operator>=(const name& a, const name& b) { return float(a) >= float(b); } \
    inline name __hadd(name a, name b) { return a + b; }                        \
    inline name __hsub(name a, name b) { return a - b; }                        \
    inline name __hmul(name a, name b) { return a * b; }                        \
    inline name __hdiv(name a, name b) { return a / b; }                        \
    inline name __hfma(name a, name b, name c) { return emulation::narrowed(double(a) * double(b) + double(c)); } \
    inline name __hneg(name a) { return -a; }                                   \
    inline name __hmax(name a, name b) { return fmaxf(a, b); }                  \
    inline name __hmin(name a, name b) { return fminf(a, b); }                  \
    inline bool __hisnan(name a) { return float(a) != float(a); }

FLOAT16_TYPE(__half, __half_raw, half_bits, half_value, 'h')
FLOAT16_TYPE(__nv_bfloat16, __nv_bfloat16_raw, bfloat_bits, bfloat_value, 'B')
typedef __half half;
typedef __nv_bfloat16 nv_bfloat16;

inline __half __float2half(float x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline __half __double2half(double x) { return x; }
inline float __half2float(__half x) { return x; }
inline __half __int2half_rn(int x) { return x; }
inline __half __ushort_as_half(unsigned short x) { return __half_raw{x}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __nv_bfloat16 __float2bfloat16(float x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline __nv_bfloat16 __double2bfloat16(double x) { return x; }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short x) { return __nv_bfloat16_raw{x}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }

#define FLOAT16_PAIR(pair, one)                                                   \
    struct alignas(4) pair {                                                      \
        one x, y;                                                                 \
        static constexpr char emulated_kind = 's';                                \
        pair() = default;                                                         \
        pair(const one& a, const one& b) : x(a), y(b) {}                          \
    };                                                                            \
    inline pair operator+(const pair& a, const pair& b) { return {a.x + b.x, a.y + b.y}; } \
    inline pair operator-(const pair& a, const pair& b) { return {a.x - b.x, a.y - b.y}; } \
    inline pair operator*(const pair& a, const pair& b) { return {a.x * b.x, a.y * b.y}; } \
    inline pair __hadd2(pair a, pair b) { return a + b; }                         \
    inline pair __hsub2(pair a, pair b) { return a - b; }                         \
    inline pair __hmul2(pair a, pair b) { return a * b; }                         \
    inline pair __hfma2(pair a, pair b, pair c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; } \
    inline float __low2float(pair a) { return a.x; }                              \
    inline float __high2float(pair a) { return a.y; }

FLOAT16_PAIR(__half2, __half)
FLOAT16_PAIR(__nv_bfloat162, __nv_bfloat16)
typedef __half2 half2;
typedef __nv_bfloat162 nv_bfloat162;
inline __half2 __floats2half2_rn(float a, float b) { return {a, b}; }
inline __half2 __float22half2_rn(float2 a) { return {a.x, a.y}; }
inline __half2 __float2half2_rn(float a) { return {a, a}; }
inline __half2 __halves2half2(__half a, __half b) { return {a, b}; }
inline __half2 make_half2(__half a, __half b) { return {a, b}; }
inline float2 __half22float2(__half2 a) { return {a.x, a.y}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {a, b}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 a) { return {a.x, a.y}; }
inline __nv_bfloat162 __float2bfloat162_rn(float a) { return {a, a}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 a, __nv_bfloat16 b) { return {a, b}; }
inline __nv_bfloat162 make_bfloat162(__nv_bfloat16 a, __nv_bfloat16 b) { return {a, b}; }
inline float2 __bfloat1622float2(__nv_bfloat162 a) { return {a.x, a.y}; }
