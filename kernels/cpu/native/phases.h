// Threads that work through a list of phases, each cut into chunks.
//
// A phase is over when its chunks are done, not when every thread has arrived: a thread that the system has taken off
// its core keeps nobody waiting unless it holds a chunk. The caller works as well, so a step never waits for a thread to
// wake up.
#pragma once
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace quire {

class Phases {
   public:
    // Computes one chunk. `thread` is below the number of threads; no two run with the same one at once.
    using Work = void (*)(void *context, int phase, int chunk, int thread);

    explicit Phases(int thread_count);
    ~Phases();
    Phases(const Phases &) = delete;
    Phases &operator=(const Phases &) = delete;

    int thread_count() const { return static_cast<int>(workers_.size()) + 1; }

    // Runs the chunks of phase 0, then those of phase 1, and so on. One caller at a time.
    void run(const std::vector<int> &chunk_counts, Work work, void *context);

   private:
    struct alignas(64) Counter {
        std::atomic<int> next{0};
        std::atomic<int> done{0};
    };

    // One call of run(). A thread that comes late may still hold it after the call has returned.
    struct Run {
        Run(const std::vector<int> &chunks, Work function, void *argument)
            : chunk_counts(chunks), counters(chunks.size()), work(function), context(argument) {}
        const std::vector<int> chunk_counts;
        std::vector<Counter> counters;
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
