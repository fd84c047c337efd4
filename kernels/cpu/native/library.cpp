// What Python calls: choose a variant, open a runner, step, close. Errors come back as text.
#include <exception>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "step.h"

namespace quire {
extern const Variant kPortable, kPortableBf16;
#if defined(__x86_64__)
extern const Variant kAvx2, kAvx512, kAvx512Bf16;
extern const Variant *const kAmxBf16;  // null where it could not be built
#elif defined(__aarch64__)
extern const Variant kNeon;
#endif

namespace {

struct Choice {
    const Variant *variant;
    bool runs;  // whether this processor has what it needs
};

#if defined(__x86_64__) && !defined(QUIRE_EMULATED_AVX512)
// Whether the processor has AMX with bf16, the system saves its tiles, and lets this process use them.
bool amx_is_there() {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
    if ((d & kBf16) == 0 || (d & kTile) == 0) return false;
    constexpr unsigned kSaved = 3u << 17;  // configuration and data of tiles
    unsigned saved, high;
    asm volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    if ((saved & kSaved) != kSaved) return false;
#if defined(__linux__)
    constexpr long kAskForPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
    return syscall(SYS_arch_prctl, kAskForPermission, kTileData) == 0;
#else
    return false;
#endif
}
#endif

// All variants, the fastest first.
const Choice *choices(int *count) {
#if defined(QUIRE_EMULATED_AVX512)
    // A build for tests, in which functions stand for the instructions that these need: see tests/native.
    static const Choice all[] = {{kAmxBf16, true}, {&kAvx512Bf16, true}, {&kAvx512, true}};
#elif defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    // Intel's processors multiply bf16 in vectors at half the rate of float, AMD's at twice.
    const Choice in_float{&kAvx512, avx512}, in_bf16{&kAvx512Bf16, bf16};
    const bool float_first = __builtin_cpu_is("intel");
    static const Choice all[] = {{kAmxBf16, kAmxBf16 && bf16 && amx_is_there()},
                                 float_first ? in_float : in_bf16,
                                 float_first ? in_bf16 : in_float,
                                 {&kAvx2, avx2},
                                 {&kPortable, true},
                                 {&kPortableBf16, true}};
#elif defined(__aarch64__)
    static const Choice all[] = {{&kNeon, true}, {&kPortable, true}, {&kPortableBf16, true}};
#else
    static const Choice all[] = {{&kPortable, true}, {&kPortableBf16, true}};
#endif
    const int unbuilt = all[0].variant ? 0 : 1;
    *count = static_cast<int>(sizeof all / sizeof *all) - unbuilt;
    return all + unbuilt;
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
