// c = a b on a CPU, tile by tile: a is m x k, b is k x n and c is m x n, each row by row.
//
// oneDNN generates a microkernel for each size of a tile, and torch keeps it, so that a product costs little
// besides its multiplications. That of bfloat16 is summed in float32 and stays so.

// Torch's compiler has vectors of its own, and tells the C++ compiler to make none.
#pragma GCC optimize("tree-loop-vectorize")

#include <algorithm>
#include <cstdint>
#include <exception>
#include <type_traits>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

// What torch's library holds. Its own header brings along what would take seconds to compile.
namespace c10 {
struct BFloat16;
}
namespace at::native::cpublas {
void brgemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add,
            const float* a, const float* b, float* c, bool in_pairs);
void brgemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add,
            const c10::BFloat16* a, const c10::BFloat16* b, float* c, bool in_pairs);
void brgemm_release(bool in_pairs);
}  // namespace at::native::cpublas

namespace {

// A tile of c, and how deep a product goes at a time: what b gives to it stays in the second cache.
constexpr int64_t ROWS = 256, COLUMNS = 64, DEPTH = 1024;

// So many multiplications are worth another thread.
constexpr int64_t WORTH_A_THREAD = 1 << 19;

// Columns of b, one next to the other.
const float* dense(const float* b, int64_t n, int64_t depth, int64_t columns) {
    thread_local std::vector<float> panel(DEPTH * COLUMNS);
    for (int64_t i = 0; i < depth; i++) {
        std::copy(b + i * n, b + i * n + columns, panel.data() + i * COLUMNS);
    }
    return panel.data();
}

// The microkernel takes the rows of a bfloat16 b in pairs: 2i and 2i + 1 interleaved.
const uint16_t* dense(const uint16_t* b, int64_t n, int64_t depth, int64_t columns) {
    thread_local std::vector<uint32_t> panel(DEPTH / 2 * COLUMNS);
    for (int64_t i = 0; i < depth / 2; i++) {
        const uint16_t *even = b + 2 * i * n, *odd = even + n;
        uint32_t* pair = panel.data() + i * COLUMNS;
#pragma omp simd
        for (int64_t j = 0; j < columns; j++) {
            pair[j] = even[j] | uint32_t(odd[j]) << 16;
        }
    }
    return reinterpret_cast<const uint16_t*>(panel.data());
}

// The rows top..bottom and columns left..right of c; T is float, or the bits of a bfloat16.
template <typename T>
void part(const T* a, const T* b, float* c, int64_t n, int64_t k, int64_t top, int64_t bottom, int64_t left,
          int64_t right) {
    constexpr bool reduced = std::is_same_v<T, uint16_t>;
    using Number = std::conditional_t<reduced, c10::BFloat16, float>;
    // Worth it for float if used often, or where rows so far apart would push each other out of the first cache.
    const bool moved = reduced || bottom - top > 2 * ROWS || n % 512 == 0;
    for (int64_t j = left; j < right; j += COLUMNS) {
        const int64_t columns = std::min(COLUMNS, right - j);
        for (int64_t d = 0; d < k; d += DEPTH) {
            const int64_t depth = std::min(DEPTH, k - d);
            const T* panel = moved ? dense(b + d * n + j, n, depth, columns) : b + d * n + j;
            for (int64_t i = top; i < bottom; i += ROWS) {
                at::native::cpublas::brgemm(
                    std::min(ROWS, bottom - i), columns, depth, k, moved ? COLUMNS : n, n, d > 0,
                    reinterpret_cast<const Number*>(a + i * k + d), reinterpret_cast<const Number*>(panel),
                    c + i * n + j, reduced);
            }
        }
    }
    at::native::cpublas::brgemm_release(reduced);
}

template <typename T>
void product(const T* a, const T* b, float* c, int64_t m, int64_t n, int64_t k) {
    // The threads share the longer side of c: its rows, or its columns by sixteen, a vector of them.
    auto share = [&](int64_t thread, int64_t threads) {
        if (m >= n) {
            part(a, b, c, n, k, m * thread / threads, m * (thread + 1) / threads, 0, n);
        } else {
            const int64_t vectors = (n + 15) / 16;
            const int64_t left = vectors * thread / threads * 16, right = vectors * (thread + 1) / threads * 16;
            part(a, b, c, n, k, 0, m, left, std::min(n, right));
        }
    };
#ifdef _OPENMP
    const int64_t threads = std::min<int64_t>(omp_get_max_threads(), 1 + m * n * k / WORTH_A_THREAD);
    if (threads > 1) {
        std::exception_ptr failure;  // an exception must not leave a thread
#pragma omp parallel num_threads(threads)
        try {
            share(omp_get_thread_num(), omp_get_num_threads());
        } catch (...) {
#pragma omp critical
            failure = std::current_exception();
        }
        if (failure) {
            std::rethrow_exception(failure);
        }
        return;
    }
#endif
    share(0, 1);
}

}  // namespace

extern "C" void kernel(const void* a, const void* b, float* c, int64_t m, int64_t n, int64_t k, int64_t reduced) {
    if (reduced) {
        product(static_cast<const uint16_t*>(a), static_cast<const uint16_t*>(b), c, m, n, k);
    } else {
        product(static_cast<const float*>(a), static_cast<const float*>(b), c, m, n, k);
    }
}
