// Threads that work through a list of phases, each cut into chunks.
//
// A phase is over when its chunks are done, not when every thread has arrived: a thread that the system has taken off
// its core keeps nobody waiting unless it holds a chunk. The caller works as well, so a step never waits for a thread to
// wake up.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace quire {

class Phases {
   public:
    // Computes one chunk. `thread` is below the number of threads; no two run with the same one at once.
    using Work = void (*)(void *context, int phase, int chunk, int thread);

    // Memory that a phase reads: chunk c from `start` + c * `chunk_bytes` on.
    struct Reads {
        const char *start = nullptr;
        size_t chunk_bytes = 0;
    };

    struct Phase {
        int chunk_count;
        // What a thread asks memory for while it waits for the end of this phase: reads of a later one.
        Reads ahead;
    };

    explicit Phases(int thread_count);
    ~Phases();
    Phases(const Phases &) = delete;
    Phases &operator=(const Phases &) = delete;

    int thread_count() const { return static_cast<int>(workers_.size()) + 1; }

    // Runs the chunks of phase 0, then those of phase 1, and so on. One caller at a time.
    //
    // A thread begins a phase with the chunk of its own number, if it is there in time. So what it needs first is known
    // beforehand, and is asked for while it waits.
    void run(const std::vector<Phase> &phases, Work work, void *context);

   private:
    static constexpr int kOwners = 64;  // threads that have a chunk of their own

    struct alignas(64) Counter {
        std::atomic<int> next{0};  // chunks that belong to nobody, given out
        std::atomic<int> done{0};
        std::atomic<uint64_t> owned{0};  // which chunks that belong to a thread are given out
    };

    // One call of run(). A thread that comes late may still hold it after the call has returned.
    struct Run {
        Run(const std::vector<Phase> &all, int threads, Work function, void *argument)
            : phases(all),
              counters(all.size()),
              owners(threads < kOwners ? threads : kOwners),
              work(function),
              context(argument) {}

        // A chunk of the phase that nobody has been given, or -1.
        int take(int phase, int thread);

        const std::vector<Phase> phases;
        std::vector<Counter> counters;
        const int owners;
        const Work work;
        void *const context;
    };

    static void work_through(Run &run, int thread);
    void serve(int thread);

    std::mutex mutex_;
    std::condition_variable wake_;
    std::shared_ptr<Run> current_;
    long generation_ = 0;
    bool closing_ = false;
    std::vector<std::thread> workers_;
};

}  // namespace quire
