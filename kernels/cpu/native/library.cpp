// What Python calls: choose a variant, open a runner, step, close. Errors come back as text.
#include <cstring>
#include <exception>

#include "step.h"

namespace quire {
extern const Variant kPortable, kPortableBf16;
#if defined(__x86_64__)
extern const Variant kAvx2, kAvx512, kAvx512Bf16;
#elif defined(__aarch64__)
extern const Variant kNeon;
#endif

namespace {

struct Choice {
    const Variant *variant;
    bool runs;  // whether this processor has what it needs
};

// All variants, the fastest first.
const Choice *choices(int *count) {
#if defined(QUIRE_EMULATED_AVX512)
    // A build for tests, in which functions stand for the instructions that these two need: see tests/native.
    static const Choice all[] = {{&kAvx512Bf16, true}, {&kAvx512, true}};
#elif defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    static const Choice all[] = {{&kAvx512Bf16, bf16},
                                 {&kAvx512, avx512},
                                 {&kAvx2, avx2},
                                 {&kPortable, true},
                                 {&kPortableBf16, true}};
#elif defined(__aarch64__)
    static const Choice all[] = {{&kNeon, true}, {&kPortable, true}, {&kPortableBf16, true}};
#else
    static const Choice all[] = {{&kPortable, true}, {&kPortableBf16, true}};
#endif
    *count = sizeof all / sizeof *all;
    return all;
}

}  // namespace
}  // namespace quire

extern "C" {

// Name of variant `index`, the fastest first; null past the last. `runs` is set to whether this processor can run it.
__attribute__((visibility("default"))) const char *quire_cpu_variant(int index, int *runs) {
    int count;
    const quire::Choice *all = quire::choices(&count);
    if (index < 0 || index >= count) return nullptr;
    *runs = all[index].runs;
    return all[index].variant->name;
}

// A runner of `model` on variant `index`, or null if there is no memory or no thread to be had.
__attribute__((visibility("default"))) void *quire_cpu_open(const QuireModel *model, int index, int thread_count) {
    int count;
    const quire::Choice *all = quire::choices(&count);
    if (index < 0 || index >= count || !all[index].runs) return nullptr;
    try {
        return new quire::Runner(*model, *all[index].variant, thread_count);
    } catch (const std::exception &) {
        return nullptr;
    }
}

// Runs one step. 0, or -1 if there is no memory; then nothing that was written counts.
__attribute__((visibility("default"))) int quire_cpu_step(void *runner, const QuireBatch *batch) {
    try {
        static_cast<quire::Runner *>(runner)->step(*batch);
        return 0;
    } catch (const std::exception &) {
        return -1;
    }
}

__attribute__((visibility("default"))) void quire_cpu_close(void *runner) {
    delete static_cast<quire::Runner *>(runner);
}
}
