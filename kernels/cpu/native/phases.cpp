#include "phases.h"

#include <sched.h>

namespace quire {
namespace {

constexpr int kSpins = 2000;  // about as long as a chunk takes
constexpr size_t kAheadBytes = 32 * 1024;

void ask_for(const Phases::Reads &reads, int chunk) {
    if (!reads.start) return;
    const char *at = reads.start + chunk * reads.chunk_bytes;
    const size_t bytes = reads.chunk_bytes < kAheadBytes ? reads.chunk_bytes : kAheadBytes;
    for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, 0, 2);
}

void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

Phases::Phases(int thread_count) {
    for (int thread = 1; thread < thread_count; ++thread) workers_.emplace_back([this, thread] { serve(thread); });
}

Phases::~Phases() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        closing_ = true;
    }
    wake_.notify_all();
    for (auto &worker : workers_) worker.join();
}

int Phases::Run::take(int phase, int thread) {
    Counter &counter = counters[phase];
    const int chunk_count = phases[phase].chunk_count, owned_count = chunk_count < owners ? chunk_count : owners;
    const auto claim = [&counter](int chunk) {
        const uint64_t bit = uint64_t{1} << chunk;
        return (counter.owned.fetch_or(bit, std::memory_order_relaxed) & bit) == 0;
    };
    if (thread < owned_count && claim(thread)) return thread;
    const int unowned = owned_count + counter.next.fetch_add(1, std::memory_order_relaxed);
    if (unowned < chunk_count) return unowned;
    // Whose owners have not come yet.
    for (int chunk = 0; chunk < owned_count; ++chunk)
        if (claim(chunk)) return chunk;
    return -1;
}

void Phases::run(const std::vector<Phase> &phases, Work work, void *context) {
    if (workers_.empty()) {
        for (int phase = 0; phase < static_cast<int>(phases.size()); ++phase)
            for (int chunk = 0; chunk < phases[phase].chunk_count; ++chunk) work(context, phase, chunk, 0);
        return;
    }
    auto run = std::make_shared<Run>(phases, thread_count(), work, context);
    {
        std::lock_guard<std::mutex> lock(mutex_);
        current_ = run;
        ++generation_;
    }
    wake_.notify_all();
    work_through(*run, 0);
}

void Phases::work_through(Run &run, int thread) {
    for (size_t phase = 0; phase < run.counters.size(); ++phase) {
        Counter &counter = run.counters[phase];
        const int chunk_count = run.phases[phase].chunk_count;
        for (int chunk; (chunk = run.take(static_cast<int>(phase), thread)) >= 0;) {
            run.work(run.context, static_cast<int>(phase), chunk, thread);
            counter.done.fetch_add(1, std::memory_order_release);
        }
        if (counter.done.load(std::memory_order_acquire) < chunk_count) ask_for(run.phases[phase].ahead, thread);
        // Whoever holds the last chunk may have lost its core: after a moment the waiting core is offered instead.
        for (int spin = 0; counter.done.load(std::memory_order_acquire) < chunk_count; ++spin)
            if (spin < kSpins)
                relax();
            else
                sched_yield();
    }
}

void Phases::serve(int thread) {
    long seen = 0;
    while (true) {
        std::shared_ptr<Run> run;
        {
            std::unique_lock<std::mutex> lock(mutex_);
            wake_.wait(lock, [&] { return closing_ || generation_ != seen; });
            if (closing_) return;
            seen = generation_;
            run = current_;
        }
        work_through(*run, thread);
    }
}

}  // namespace quire
