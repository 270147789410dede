// Work shared by the threads that are free. A call of OpenMP ends when all of its threads have come, and on a busy machine
// the last one comes late, when the work is long done. A call here ends when its pieces are done: it waits for the threads
// that took some, and for no others.
#pragma once
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tqdit {

// The helpers of one calling thread. Calls of different threads do not wait for each other.
class Team {
 public:
  Team() = default;
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;
  ~Team() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      ending_ = true;
    }
    posted_.notify_all();
    for (std::thread& helper : helpers_) helper.join();
  }

  // Returns the team of this thread. A forked process has none of the threads of its parent, and begins a new team.
  static Team& here() {
    struct Owned {
      Team* team = nullptr;
      pid_t process = 0;
      ~Owned() {
        if (process == getpid()) delete team;
      }
    };
    static thread_local Owned owned;
    if (owned.process != getpid()) owned.team = new Team, owned.process = getpid();
    return *owned.team;
  }

  // Calls work() on this thread, and on at most `threads` - 1 helpers that are free while it runs.
  template <typename Work>
  void run(int64_t threads, const Work& work) {
    places_ = hire(threads - 1);
    call_ = [](const void* given) { (*static_cast<const Work*>(given))(); };
    work_ = &work;
    state_ += CALL + OPEN;
    if (sleeping_) {
      { const std::lock_guard<std::mutex> lock(mutex_); }  // one that is about to sleep is asleep after this
      posted_.notify_all();
    }
    work();
    state_ -= OPEN;
    for (int64_t tries = 0; state_ % OPEN; ++tries) tries < 1000 ? pause() : std::this_thread::yield();
  }

 private:
  // The parts of a state: helpers at the door or inside, whether they may come in, and the number of the call.
  static constexpr uint64_t OPEN = 1 << 12, CALL = 1 << 13, MOST = OPEN - 1;

  // Returns the number of helpers, at most `wished`, and begins those that are missing.
  uint64_t hire(int64_t wished) {
    const uint64_t number = static_cast<uint64_t>(wished) < MOST ? wished : MOST;
    try {
      while (helpers_.size() < number) helpers_.emplace_back([this, seen = state_ / CALL] { help(seen); });
    } catch (const std::system_error&) {  // the system has no more threads for us
    }
    return number < helpers_.size() ? number : helpers_.size();
  }

  // Waits for calls after number `seen`, and takes part in them while there are places.
  void help(uint64_t seen) {
    while (!ending_) {
      uint64_t state = state_;
      if (state / CALL == seen) {
        wait(seen);
        continue;
      }
      if (state & OPEN) {
        state = state_.fetch_add(1);  // one write each, however many come at once
        if (state & OPEN && state % OPEN < places_) call_(work_);
        --state_;
      }
      seen = state / CALL;
    }
  }

  // Returns when there is another call, or soon after. The verbs of a model follow each other in less time than it takes
  // to wake up: so a helper looks for a while before it sleeps, and lets others have its core meanwhile.
  void wait(uint64_t seen) {
    typedef std::chrono::steady_clock Clock;
    const Clock::time_point begin = Clock::now();
    for (int64_t tries = 0; tries % 64 || Clock::now() - begin < std::chrono::microseconds(AWAKE); ++tries) {
      if (state_ / CALL != seen || ending_) return;
      tries < 256 ? pause() : std::this_thread::yield();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    ++sleeping_;
    posted_.wait(lock, [&] { return state_ / CALL != seen || ending_; });
    --sleeping_;
  }

  static constexpr int64_t AWAKE = 500;

  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  std::atomic<uint64_t> state_{0}, places_{0};
  std::atomic<int64_t> sleeping_{0};
  std::atomic<bool> ending_{false};
  void (*call_)(const void*) = nullptr;  // written while nobody is inside
  const void* work_ = nullptr;
  std::mutex mutex_;
  std::condition_variable posted_;
  std::vector<std::thread> helpers_;
};

// Deals the pieces 0 to count - 1 to at most `threads` threads, one after the other to whoever is free. Each of them calls
// body(next) once, and next(i) says whether there is another piece, i.
template <typename Body>
void deal(int64_t threads, int64_t count, const Body& body) {
  std::atomic<int64_t> given{0};
  const auto next = [&](int64_t& i) { return (i = given.fetch_add(1, std::memory_order_relaxed)) < count; };
  const auto work = [&] {
    if (given < count) body(next);
  };
  if (threads > count) threads = count;
  if (threads < 2) return work();
#if defined(_OPENMP)  // compiled with -fopenmp, for comparisons
#pragma omp parallel num_threads(threads)
  work();
#else
  Team::here().run(threads, work);
#endif
}

// Deals the pieces of `rows`, `step` at a time, in which each(begin, end) of any thread does the same.
template <typename Each>
void deal_rows(int64_t threads, int64_t rows, int64_t step, const Each& each) {
  deal(threads, (rows + step - 1) / step, [&](const auto& next) {
    for (int64_t i; next(i);) each(i * step, rows - i * step < step ? rows : (i + 1) * step);
  });
}

}  // namespace tqdit
