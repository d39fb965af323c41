// Threads that stay together for one call: a thread leads through many short jobs, the others take part in each and wait
// for the next. Between two jobs memory has nothing to do, so who waits asks for what the next job will read.
// Every level includes this: all of it is static, or the linker would merge code of different levels.
#pragma once
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#include <sched.h>
#endif
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace quire {

constexpr int64_t BYTES_AHEAD = 256 << 10;  // of the next job's memory, for each thread: a part of the second cache
constexpr int SPINS = 1500;                 // some ten microseconds; who waits longer sleeps, and others get the CPU

// What the next job reads front to back, in equal shares of whole units.
struct Ahead {
  const char* bytes;
  int64_t num_units, unit_bytes;
};

struct alignas(64) Team {
  int threads;  // the leader is 0
  bool is_over;
  void (*job)(void* context, int thread);
  void* context;
  Ahead ahead;
  alignas(64) uint32_t posted;     // jobs
  uint32_t sleepers;               // threads that sleep until the next is posted
  alignas(64) uint32_t announced;  // times that `ahead` was set
  alignas(64) uint32_t busy;       // threads that have not finished the job
  uint32_t is_leader_asleep;
};

// Waits a little for `word` to change from `value`; after many times, asleep, having raised `sleepers` for `wake`.
static inline void wait(uint32_t& word, uint32_t value, uint32_t& sleepers, int& spins) {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
  if (++spins < SPINS) return;
#if defined(__linux__)
  __atomic_fetch_add(&sleepers, 1, __ATOMIC_SEQ_CST);
  // The system compares once more: what changes in between is not slept through.
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
  __atomic_fetch_sub(&sleepers, 1, __ATOMIC_SEQ_CST);
#elif defined(_OPENMP)
  (void)word, (void)value, (void)sleepers;
  sched_yield();
#endif
}

// After `word` has changed.
static inline void wake(uint32_t& word, uint32_t& sleepers) {
#if defined(__linux__)
  if (__atomic_load_n(&sleepers, __ATOMIC_SEQ_CST)) syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
#else
  (void)word, (void)sleepers;
#endif
}

// The first unit of a thread's share.
static inline int64_t share_of(int64_t num_units, int threads, int thread) {
  const int64_t each = num_units / threads, rest = num_units % threads;
  return thread * each + (thread < rest ? thread : rest);
}

// The leader says what the next job will read.
static inline void announce(Team* team, const Ahead& ahead) {
  if (!team || team->threads < 2) return;
  team->ahead = ahead;
  __atomic_fetch_add(&team->announced, 1, __ATOMIC_RELEASE);
}

static inline void post(Team& team) {
  __atomic_fetch_add(&team.posted, 1, __ATOMIC_SEQ_CST);
  wake(team.posted, team.sleepers);
}

// The leader and all others run the job; returns when all are done.
static inline void run_job(Team& team, void (*job)(void*, int), void* context) {
  team.job = job, team.context = context;
  __atomic_store_n(&team.busy, uint32_t(team.threads - 1), __ATOMIC_RELAXED);
  post(team);
  job(context, 0);
  int spins = 0;
  for (uint32_t busy; (busy = __atomic_load_n(&team.busy, __ATOMIC_ACQUIRE));)
    wait(team.busy, busy, team.is_leader_asleep, spins);
}

static inline void dismiss(Team& team) {
  team.is_over = true;
  post(team);
}

// What every thread but the leader does until it is dismissed.
static inline void serve(Team& team, int thread) {
  uint32_t num_posted = 0, num_announced = 0;
  const char *next = nullptr, *end = nullptr;
  for (;;) {
    for (int spins = 0; __atomic_load_n(&team.posted, __ATOMIC_ACQUIRE) == num_posted;) {
      const uint32_t announced = __atomic_load_n(&team.announced, __ATOMIC_ACQUIRE);
      if (announced != num_announced) {
        const Ahead ahead = team.ahead;
        const int64_t first = share_of(ahead.num_units, team.threads, thread);
        const int64_t bytes = (share_of(ahead.num_units, team.threads, thread + 1) - first) * ahead.unit_bytes;
        num_announced = announced;
        next = ahead.bytes + first * ahead.unit_bytes;
        end = next + (bytes < BYTES_AHEAD ? bytes : BYTES_AHEAD);
      }
      if (next < end) {
        for (int line = 0; line < 4; ++line, next += 64) __builtin_prefetch(next, 0, 2);
      } else {
        wait(team.posted, num_posted, team.sleepers, spins);
      }
    }
    ++num_posted;
    next = end;
    if (team.is_over) return;
    team.job(team.context, thread);
    if (__atomic_sub_fetch(&team.busy, 1, __ATOMIC_SEQ_CST) == 0) wake(team.busy, team.is_leader_asleep);
  }
}

static inline int current_thread() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// `job(thread)` on `threads` threads: of the team if there is one, or else of OpenMP's pool.
template <class Job>
static inline void spread(Team* team, int threads, Job& job) {
  if (threads <= 1) {
    job(0);
  } else if (team && team->threads > 1) {
    run_job(*team, [](void* context, int thread) { (*static_cast<Job*>(context))(thread); }, &job);
  } else {
#pragma omp parallel num_threads(threads)
    job(current_thread());
  }
}

}  // namespace quire
