// The Bernoulli log probability sum_i log Ber(x_i; l_i) of each of `rows` rows of `size` logits, and, if `slopes`,
// its derivative by each logit, sign(x_i) - sigmoid(l_i). x has `period` rows: row r of the logits uses row
// r % period of x.
//
// With e = exp(-|l|), log Ber(x; l) = -max((1 - 2 x) l, 0) - log(1 + e), and sigmoid(l) = 1 / (1 + e) or e / (1 + e).
// A sum of logarithms is the logarithm of a product, so each pixel needs one exponential and one division only.

// Allow fused multiply-add.
#pragma GCC optimize("fp-contract=fast")

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr int64_t LANES = 16;
#else
constexpr int64_t LANES = 8;
#endif
typedef float Vector __attribute__((vector_size(sizeof(float) * LANES)));
typedef int32_t Integers __attribute__((vector_size(sizeof(int32_t) * LANES)));

// The product of this many factors (1 + e) <= 2 does not overflow: of one lane in float, of all lanes in double.
constexpr int64_t FACTORS = 896;

// A further thread pays off with this many pixels.
constexpr int64_t WORTH_A_THREAD = 1 << 14;

inline Vector all(float number) {
    return Vector{} + number;
}

inline Vector load(const float* from, int64_t count, float rest) {
    Vector loaded = all(rest);
    std::memcpy(&loaded, from, sizeof(float) * count);
    return loaded;
}

// exp(-a) of a >= 0: 2^n exp(r) with -a = n log 2 + r, whole n and |r| <= log(2) / 2.
inline Vector exp_minus(Vector a) {
    a = a > 87.0f ? all(87.0f) : a;  // keeps NaN; exp(-87) is about the smallest normal float
    const Vector shifted = a * -1.44269504f + 12582912.0f;  // 1.5 * 2^23: puts n into the last bits
    const Vector n = shifted - 12582912.0f;
    const Vector r = -(n * 0.693359375f + a) + n * 2.12194440e-4f;  // log 2 as a sum; the first part has few bits
    // Cephes' polynomial of float32 (Moshier, netlib.org/cephes), accurate to one or two ulp.
    Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (Vector)(((Integers)shifted + 127) << 23);
}

}  // namespace

extern "C" void kernel(const float* x, const float* logits, float* out, int64_t rows, int64_t size,
                       int64_t period, bool slopes) {
    auto sum = [=](int64_t row) {
        const float *const pixels = x + row % period * size, *const logit = logits + row * size;
        float* const slope = out + rows + row * size;
        Vector product, rest;
        auto add = [&](int64_t i, int64_t count) {
            // If the row ends inside a vector, fill up with pixels of 1 and a large logit, which add nothing.
            const Vector v = load(pixels + i, count, 1.0f), l = load(logit + i, count, 100.0f);
            const Vector e = exp_minus(l < 0.0f ? -l : l), factor = e + 1.0f, wrong = (1.0f - 2.0f * v) * l;
            product *= factor;
            rest += wrong < 0.0f ? all(0.0f) : wrong;  // keeps NaN
            if (slopes) {
                const Vector sign = v > 0.0f ? all(1.0f) : v < 0.0f ? all(-1.0f) : all(0.0f);
                const Vector by_logit = sign - (l < 0.0f ? e : all(1.0f)) / factor;
                std::memcpy(slope + i, &by_logit, sizeof(float) * count);
            }
        };
        double total = 0;
        for (int64_t from = 0; from < size; from += FACTORS) {
            const int64_t to = std::min(size, from + FACTORS);
            product = all(1.0f);
            rest = all(0.0f);
            int64_t i = from;
            for (; i + LANES <= to; i += LANES) {
                add(i, LANES);
            }
            if (i < to) {
                add(i, to - i);
            }
            double factors = 1;
            for (int64_t lane = 0; lane < LANES; lane++) {
                factors *= product[lane];
                total -= rest[lane];
            }
            total -= std::log(factors);
        }
        out[row] = total;
    };
#ifdef _OPENMP
    const int64_t threads = std::min<int64_t>(omp_get_max_threads(), 1 + rows * size / WORTH_A_THREAD);
    if (threads > 1) {
#pragma omp parallel for num_threads(threads)
        for (int64_t row = 0; row < rows; row++) {
            sum(row);
        }
        return;
    }
#endif
    for (int64_t row = 0; row < rows; row++) {
        sum(row);
    }
}
