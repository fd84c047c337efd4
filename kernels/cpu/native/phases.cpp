#include "phases.h"

#include <sched.h>

namespace quire {
namespace {

constexpr int kSpins = 2000;  // about as long as a chunk takes

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

void Phases::run(const std::vector<int> &chunk_counts, Work work, void *context) {
    if (workers_.empty()) {
        for (int phase = 0; phase < static_cast<int>(chunk_counts.size()); ++phase)
            for (int chunk = 0; chunk < chunk_counts[phase]; ++chunk) work(context, phase, chunk, 0);
        return;
    }
    auto run = std::make_shared<Run>(chunk_counts, work, context);
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
        const int chunk_count = run.chunk_counts[phase];
        int chunk;
        while ((chunk = counter.next.fetch_add(1, std::memory_order_relaxed)) < chunk_count) {
            run.work(run.context, static_cast<int>(phase), chunk, thread);
            counter.done.fetch_add(1, std::memory_order_release);
        }
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
