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

// Products of small matrices, spread over a warp as the instructions mma.m16n8k16 and ldmatrix want them: of lane
// 4 g + t, `a` holds rows g and g + 8, columns 2 t and 2 t + 8 and those beside them; `b` the same rows of column g.
template <class S>
void mma_m16n8k16(float* c, const unsigned* a, unsigned b0, unsigned b1, int line = __builtin_LINE()) {
    struct Left {
        unsigned v[4];
    } mine = {{a[0], a[1], a[2], a[3]}};
    struct Right {
        unsigned v[2];
    } own = {{b0, b1}};
    const int group = emulation::lane() / 4, quad = emulation::lane() % 4;
    float rows[2][16], columns[2][16];
    auto unpack = [](unsigned pair, float* to) {
        S halves[2];
        memcpy(halves, &pair, sizeof pair);
        to[0] = float(halves[0]);
        to[1] = float(halves[1]);
    };
    for (int t = 0; t < 4; ++t) {
        const Left x = emulation::shuffle(0xffffffffu, mine, 4 * group + t, "mma", line);
        for (int i = 0; i < 4; ++i) unpack(x.v[i], rows[i % 2] + i / 2 * 8 + 2 * t);
        for (int e = 0; e < 2; ++e) {
            const Right y = emulation::shuffle(0xffffffffu, own, 4 * (2 * quad + e) + t, "mma", line);
            for (int i = 0; i < 2; ++i) unpack(y.v[i], columns[e] + i * 8 + 2 * t);
        }
    }
    for (int i = 0; i < 4; ++i)
        for (int k = 0; k < 16; ++k) c[i] += rows[i / 2][k] * columns[i % 2][k];
}

template <bool TRANSPOSED>
void ldmatrix_x4(unsigned* r, const unsigned short* row, int line = __builtin_LINE()) {
    if (uintptr_t(row) % 16) emulation::fail("ldmatrix: a row does not begin at a multiple of 16 bytes", line);
    const int group = emulation::lane() / 4, quad = emulation::lane() % 4;
    for (int i = 0; i < 4; ++i)
        for (int e = 0; e < 2; ++e) {
            const int number = TRANSPOSED ? 2 * quad + e : group, column = TRANSPOSED ? group : 2 * quad + e;
            const unsigned short* from = emulation::shuffle(0xffffffffu, row, 8 * i + number, "ldmatrix", line);
            r[i] = e ? r[i] | unsigned(from[column]) << 16 : from[column];
        }
}

// Copies that a GPU makes in the background are made at once; what reads too early is not found here.
inline void copy_async(void* to, const void* from, bool there) {
    if (uintptr_t(to) % 16 || uintptr_t(from) % 16) emulation::fail("cp.async: an address is no multiple of 16", 0);
    if (there)
        memcpy(to, from, 16);
    else
        memset(to, 0, 16);
}
inline void commit_copies() {}
inline void wait_for_all_groups_but_one() {}
