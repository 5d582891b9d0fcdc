// A step of Adam for one parameter on a CPU. Parameter, gradient, both running means and the number of steps are
// float32 and contiguous. Kingma and Ba 2014, arXiv 1412.6980, in the order given at the end of their section 2,
// which divides only once for each number.

// Torch's flags switch the C++ compiler's vectorisation off, since torch's own kernels contain vector code.
#pragma GCC optimize("tree-loop-vectorize")

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#ifdef _OPENMP
#include <omp.h>
#endif

// A further thread pays off with this many numbers.
constexpr int64_t WORTH_A_THREAD = 1 << 15;

extern "C" void kernel(float* p, const float* gradient, float* mean, float* square, float* steps,
                       const double* options, int64_t size) {
    const double lr = options[0], beta1 = options[1], beta2 = options[2], epsilon = options[3];
    const double step = *steps += 1, correction = std::sqrt(1 - std::pow(beta2, step));
    const float rate = lr * correction / (1 - std::pow(beta1, step)), least = epsilon * correction;
    const float old_mean = beta1, new_mean = 1 - beta1, old_square = beta2, new_square = 1 - beta2;
    const float decay = options[4];

    // With a branch inside the loop some compilers do not vectorise it.
    auto update_with = [=](auto decays, int64_t from, int64_t to) {
#pragma omp simd
        for (int64_t i = from; i < to; i++) {
            float g = gradient[i];
            if constexpr (decays) {  // not for decay 0: 0 times an infinite p is NaN
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
