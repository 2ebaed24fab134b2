// The thread pool. Owns: the threads, their barrier and their sleep, and the C functions of a pool and a run.
//
// Threads wait for each other some hundred times in a step of one millisecond, so they spin; after `spin_us` they sleep
// (futex), so that an idle engine costs nothing and an oversubscribed machine gets its core back.
#include "pool.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <climits>
#include <cstdlib>
#include <new>

#include "levels.h"

namespace qr {

namespace {

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

double seconds() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

// How many looks at a word take `us` microseconds.
int spins_for(int us) {
    std::atomic<uint32_t> word{0};
    double best = 1.0;
    for (int attempt = 0; attempt < 3; attempt++) {  // the least of three: a preempted try says nothing
        double begin = seconds();
        for (int i = 0; i < 1000; i++) {
            if (word.load(std::memory_order_acquire)) break;
            relax();
        }
        double took = seconds() - begin;
        if (took < best) best = took;
    }
    double each = best / 1000 > 1e-9 ? best / 1000 : 1e-9;
    return int(us * 1e-6 / each) + 1;
}

// A child process has none of its parent's threads; pools notice by this number.
std::atomic<int> forks{0};
void in_child() { forks.fetch_add(1); }

}  // namespace

Arena::~Arena() { std::free(data); }

void* Arena::get(size_t bytes) {
    if (bytes > size) {
        std::free(data);
        size = (bytes + (bytes >> 2) + 4095) & ~size_t(4095);
        data = std::aligned_alloc(4096, size);
        if (!data) std::abort();  // some megabytes: there is no going on without them
    }
    return data;
}

void Team::wait(std::atomic<uint32_t>& word, uint32_t old) {
    for (int i = 0; i < spins; i++) {
        if (word.load(std::memory_order_acquire) != old) return;
        relax();
    }
    sleepers.value.fetch_add(1, std::memory_order_seq_cst);
    while (word.load(std::memory_order_seq_cst) == old)
        syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);
    sleepers.value.fetch_sub(1, std::memory_order_seq_cst);
}

void Team::post(std::atomic<uint32_t>& word, uint32_t value) {
    // Either the sleeper's look at the word comes after this store, or its count is seen below.
    word.store(value, std::memory_order_seq_cst);
    if (sleepers.value.load(std::memory_order_seq_cst))
        syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

void Team::barrier() {
    uint32_t old = epoch.value.load(std::memory_order_relaxed);
    if (arrived.value.fetch_add(1, std::memory_order_acq_rel) == uint32_t(count - 1)) {
        arrived.value.store(0, std::memory_order_relaxed);
        reset();
        post(epoch.value, old + 1);
    } else {
        wait(epoch.value, old);
    }
}

void* Context::shared(size_t bytes) {
    if (team.shared.size < bytes) {
        barrier();  // all have looked at the size before it changes
        if (thread == 0) team.shared.get(bytes);
        barrier();
    }
    return team.shared.data;
}

}  // namespace qr

using namespace qr;

struct qr_pool {
    Team team;
    int threads = 1, level = 0, born = 0;
    const Kernel* kernels = nullptr;
    pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    pthread_t* handles = nullptr;
    int* cpus = nullptr;  // where the threads may run, `places` of them; none: where the system likes
    int places = 0, caller = -1;
    int started = 0;  // threads that run, the caller not counted
    Word job;
    bool stop = false;
    const qr_op* ops = nullptr;
    int64_t count = 0;
    const qr_dims* dims = nullptr;

    void work(int thread, int of) {
        // Copies: after the last barrier the caller may already be writing the next program here.
        const qr_op* program = ops;
        int64_t length = count;
        Context context{team, thread, of, dims};
        for (int64_t i = 0; i < length; i++) {
            kernels[program[i].op](program[i], context);
            context.barrier();
        }
    }
    bool start();
    void end();
    void place(int cpu);
};

namespace {

struct Birth {
    qr_pool* pool;
    int thread;
    uint32_t job;
};

void* live(void* argument) {
    Birth birth = *static_cast<Birth*>(argument);
    delete static_cast<Birth*>(argument);
    qr_pool* pool = birth.pool;
    for (uint32_t seen = birth.job;;) {
        pool->team.wait(pool->job.value, seen);
        seen = pool->job.value.load(std::memory_order_acquire);
        if (pool->stop) return nullptr;
        pool->work(birth.thread, pool->threads);
    }
}

}  // namespace

bool qr_pool::start() {
    born = forks.load();
    caller = -1;
    started = 0;
    stop = false;
    team.arrived.value = team.sleepers.value = 0;
    team.next = 0;
    for (int t = 0; t < threads; t++) team.near[t].value = 0;
    for (int t = 1; t < threads; t++) {
        Birth* birth = new (std::nothrow) Birth{this, t, job.value.load()};
        if (!birth) return false;
        if (pthread_create(&handles[t], nullptr, live, birth)) {
            delete birth;
            return false;
        }
        started++;
    }
    return true;
}

// Pins the other threads to the processors that are not the caller's. Left to itself the system wakes a thread on the
// caller's processor and moves it only at the next tick: the first four milliseconds of a step run on one core.
void qr_pool::place(int cpu) {
    caller = cpu;
    int skip = places - 1;  // where the caller is on none of ours
    for (int i = 0; i < places; i++)
        if (cpus[i] == cpu) skip = i;
    for (int t = 1; t < threads; t++) {
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET(cpus[(skip + t) % places], &set);
        pthread_setaffinity_np(handles[t], sizeof set, &set);  // a processor that is no longer ours: stay where it is
    }
}

void qr_pool::end() {
    if (born == forks.load() && started) {
        stop = true;
        team.post(job.value, job.value.load() + 1);
        for (int t = 1; t <= started; t++) pthread_join(handles[t], nullptr);
    }
    started = 0;
}

extern "C" {

int qr_abi(void) { return QR_ABI; }

int qr_has_level(int level) {
    if (level == QR_PORTABLE) return 1;
    if (!kernels_of(level)) return 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (level == QR_AVX2)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (level == QR_AVX512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
#endif
    return 0;
}

qr_pool* qr_pool_new(int threads, const int* cpus, int level, int spin_us) {
    static const int registered = pthread_atfork(nullptr, nullptr, in_child);
    (void)registered;
    if (level < 0)
        for (level = QR_LEVELS - 1; !qr_has_level(level);) level--;
    if (level >= QR_LEVELS || !qr_has_level(level) || threads < 1 || threads > 1024) return nullptr;
    qr_pool* pool = new (std::nothrow) qr_pool;
    if (!pool) return nullptr;
    pool->threads = pool->team.count = threads;
    pool->level = level;
    pool->kernels = kernels_of(level);
    pool->team.spins = spins_for(spin_us);
    pool->team.scratch = new Arena[size_t(threads)];
    pool->team.near = new Word[size_t(threads)];
    pool->handles = new pthread_t[size_t(threads)];
    cpu_set_t allowed;
    CPU_ZERO(&allowed);
    if (!cpus) sched_getaffinity(0, sizeof allowed, &allowed);
    pool->places = cpus ? threads : CPU_COUNT(&allowed);
    pool->cpus = new int[size_t(pool->places) + 1];
    for (int cpu = 0, at = 0; at < pool->places; cpu++)
        if (cpus) pool->cpus[at] = cpus[at], at++;
        else if (CPU_ISSET(cpu, &allowed)) pool->cpus[at++] = cpu;
    if (pool->places < threads) pool->places = 0;  // oversubscribed: nobody is pinned
    if (!pool->start()) {
        qr_pool_free(pool);
        return nullptr;
    }
    return pool;
}

void qr_pool_free(qr_pool* pool) {
    if (!pool) return;
    pool->end();
    delete[] pool->team.scratch;
    delete[] pool->team.near;
    delete[] pool->handles;
    delete[] pool->cpus;
    pthread_mutex_destroy(&pool->lock);
    delete pool;
}

int qr_pool_threads(const qr_pool* pool) { return pool->threads; }
int qr_pool_level(const qr_pool* pool) { return pool->level; }

int qr_run(qr_pool* pool, const qr_op* ops, int64_t count, const qr_dims* dims) {
    for (int64_t i = 0; i < count; i++)
        if (ops[i].op < 0 || ops[i].op >= QR_OPS || !pool->kernels[ops[i].op]) return -1;
    if (!count) return 0;
    if (pool->born != forks.load()) {
        pthread_mutex_init(&pool->lock, nullptr);  // whoever held it is not in this process
        if (!pool->start()) return -2;
    }
    pthread_mutex_lock(&pool->lock);
    pool->ops = ops;
    pool->count = count;
    pool->dims = dims;
    if (pool->threads == 1 || (count == 1 && (ops[0].flags & QR_SOLO))) {
        pool->work(0, 1);
    } else {
        if (int cpu = sched_getcpu(); pool->places && cpu != pool->caller) pool->place(cpu);
        pool->team.post(pool->job.value, pool->job.value.load(std::memory_order_relaxed) + 1);
        pool->work(0, pool->threads);
    }
    pthread_mutex_unlock(&pool->lock);
    return 0;
}

}  // extern "C"
