// The matrix product c = a b on a CPU, tile by tile: a is m x k, b is k x n and c is m x n, all contiguous.
//
// oneDNN generates a microkernel for each tile size, and torch caches it, so a product costs little more than its
// multiplications. A bfloat16 product is summed in float32, and c is float32.

// Torch's flags switch the C++ compiler's vectorisation off, since torch's own kernels contain vector code.
#pragma GCC optimize("tree-loop-vectorize")

#include <algorithm>
#include <cstdint>
#include <exception>
#include <type_traits>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

// Functions of torch's library, declared here because torch's own header takes seconds to compile.
namespace c10 {
struct BFloat16;
}
namespace at::native::cpublas {
void brgemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add,
            const float* a, const float* b, float* c, bool row_pairs);
void brgemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add,
            const c10::BFloat16* a, const c10::BFloat16* b, float* c, bool row_pairs);
void brgemm_release(bool row_pairs);
}  // namespace at::native::cpublas

namespace {

// A tile of c is ROWS x COLUMNS. It is summed in steps of DEPTH, so that the panel of b fits into the L2 cache.
constexpr int64_t ROWS = 256, COLUMNS = 64, DEPTH = 1024;

// A further thread pays off with this many multiplications.
constexpr int64_t WORTH_A_THREAD = 1 << 19;

// Copy some columns of b into a contiguous panel.
const float* copy_panel(const float* b, int64_t n, int64_t depth, int64_t columns) {
    thread_local std::vector<float> panel(DEPTH * COLUMNS);
    for (int64_t i = 0; i < depth; i++) {
        std::copy(b + i * n, b + i * n + columns, panel.data() + i * COLUMNS);
    }
    return panel.data();
}

// For bfloat16 the microkernel expects the rows of the panel in pairs: rows 2i and 2i + 1 interleaved.
const uint16_t* copy_panel(const uint16_t* b, int64_t n, int64_t depth, int64_t columns) {
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

// Compute rows top..bottom and columns left..right of c. T is float, or uint16_t for the bits of a bfloat16.
template <typename T>
void multiply_block(const T* a, const T* b, float* c, int64_t n, int64_t k, int64_t top, int64_t bottom,
                    int64_t left, int64_t right) {
    constexpr bool is_bfloat16 = std::is_same_v<T, uint16_t>;
    using Number = std::conditional_t<is_bfloat16, c10::BFloat16, float>;
    // For float a copy pays off if it is used often, or if the rows of b are a multiple of 2048 bytes apart and would
    // evict each other from the L1 cache.
    const bool copied = is_bfloat16 || bottom - top > 2 * ROWS || n % 512 == 0;
    for (int64_t j = left; j < right; j += COLUMNS) {
        const int64_t columns = std::min(COLUMNS, right - j);
        for (int64_t d = 0; d < k; d += DEPTH) {
            const int64_t depth = std::min(DEPTH, k - d);
            const T* panel = copied ? copy_panel(b + d * n + j, n, depth, columns) : b + d * n + j;
            for (int64_t i = top; i < bottom; i += ROWS) {
                at::native::cpublas::brgemm(
                    std::min(ROWS, bottom - i), columns, depth, k, copied ? COLUMNS : n, n, d > 0,
                    reinterpret_cast<const Number*>(a + i * k + d), reinterpret_cast<const Number*>(panel),
                    c + i * n + j, is_bfloat16);
            }
        }
    }
    at::native::cpublas::brgemm_release(is_bfloat16);
}

template <typename T>
void product(const T* a, const T* b, float* c, int64_t m, int64_t n, int64_t k) {
    // Divide the longer side of c among the threads: its rows, or its columns in groups of 16 (one vector).
    auto multiply_share = [&](int64_t thread, int64_t threads) {
        if (m >= n) {
            multiply_block(a, b, c, n, k, m * thread / threads, m * (thread + 1) / threads, 0, n);
        } else {
            const int64_t vectors = (n + 15) / 16;
            const int64_t left = vectors * thread / threads * 16, right = vectors * (thread + 1) / threads * 16;
            multiply_block(a, b, c, n, k, 0, m, left, std::min(n, right));
        }
    };
#ifdef _OPENMP
    const int64_t threads = std::min<int64_t>(omp_get_max_threads(), 1 + m * n * k / WORTH_A_THREAD);
    if (threads > 1) {
        std::exception_ptr failure;  // an exception must not leave a thread
#pragma omp parallel num_threads(threads)
        try {
            multiply_share(omp_get_thread_num(), omp_get_num_threads());
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
    multiply_share(0, 1);
}

}  // namespace

extern "C" void kernel(const void* a, const void* b, float* c, int64_t m, int64_t n, int64_t k, int64_t is_bfloat16) {
    if (is_bfloat16) {
        product(static_cast<const uint16_t*>(a), static_cast<const uint16_t*>(b), c, m, n, k);
    } else {
        product(static_cast<const float*>(a), static_cast<const float*>(b), c, m, n, k);
    }
}
