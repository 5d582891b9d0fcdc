// A step of Adam for one parameter on a CPU: parameter, gradient, both running means and the number of steps are
// float32, each one number after the other. Kingma and Ba 2014, arXiv 1412.6980, in the order of the end of their
// section 2, which divides once for each number.

// Torch's compiler has vectors of its own, and tells the C++ compiler to make none.
#pragma GCC optimize("tree-loop-vectorize")

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#ifdef _OPENMP
#include <omp.h>
#endif

// So many numbers are worth another thread.
constexpr int64_t WORTH_A_THREAD = 1 << 15;

extern "C" void kernel(float* p, const float* gradient, float* mean, float* square, float* steps,
                       const double* options, int64_t size) {
    const double lr = options[0], beta1 = options[1], beta2 = options[2], epsilon = options[3];
    const double step = *steps += 1, correction = std::sqrt(1 - std::pow(beta2, step));
    const float rate = lr * correction / (1 - std::pow(beta1, step)), least = epsilon * correction;
    const float old_mean = beta1, new_mean = 1 - beta1, old_square = beta2, new_square = 1 - beta2;
    const float decay = options[4];

    // A choice within the loop would keep some compilers from making it one of vectors.
    auto update_with = [=](auto decays, int64_t from, int64_t to) {
#pragma omp simd
        for (int64_t i = from; i < to; i++) {
            float g = gradient[i];
            if constexpr (decays) {  // p may be infinite
                g += decay * p[i];
            }
            const float m = old_mean * mean[i] + new_mean * g;
            const float v = old_square * square[i] + new_square * g * g;
            mean[i] = m;
            square[i] = v;
            p[i] -= rate * m / (std::sqrt(v) + least);
        }
    };
    auto update = [=](int64_t from, int64_t to) {
        decay == 0 ? update_with(std::false_type{}, from, to) : update_with(std::true_type{}, from, to);
    };
#ifdef _OPENMP
    const int64_t threads = std::min<int64_t>(omp_get_max_threads(), 1 + size / WORTH_A_THREAD);
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        {
            const int64_t thread = omp_get_thread_num(), all = omp_get_num_threads();
            update(size * thread / all, size * (thread + 1) / all);
        }
        return;
    }
#endif
    update(0, size);
}
