// The thread pool: who runs, barriers, scratch memory. Owns: threads and their sleep. Knows no kernels.
#pragma once
#include <pthread.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "quire.h"

// What all levels see is inlined always: each level compiles its own copy, with its own instructions (see levels.h).
#define QR_ALWAYS inline __attribute__((always_inline))

namespace qr {

struct Context;
using Kernel = void (*)(const qr_op&, Context&);

// Memory that only grows, aligned to cache lines.
struct Arena {
    void* data = nullptr;
    size_t size = 0;
    ~Arena();
    void* get(size_t bytes);
};

struct alignas(64) Word {
    std::atomic<uint32_t> value{0};
};

// What the threads of one run share.
struct Team {
    int count = 1;
    int spins = 0;                        // how often a waiting thread looks before it sleeps
    Word arrived, epoch, sleepers;        // the barrier
    alignas(64) std::atomic<int64_t> next{0};  // the next piece of the op's work; 0 after each barrier
    std::atomic<bool> near_used{false};        // whether `near` must go back to 0 at the next barrier
    Word* near = nullptr;                      // as `next`, of each thread's own share
    Arena shared;
    Arena* scratch = nullptr;             // one for each thread

    // Waits until `word` is no longer `old`.
    void wait(std::atomic<uint32_t>& word, uint32_t old);
    // Publishes a new value and wakes who sleeps.
    void post(std::atomic<uint32_t>& word, uint32_t value);
    void barrier();
    QR_ALWAYS void reset() {
        next.store(0, std::memory_order_relaxed);
        if (!near_used.load(std::memory_order_relaxed)) return;
        near_used.store(false, std::memory_order_relaxed);
        for (int i = 0; i < count; i++) near[i].value.store(0, std::memory_order_relaxed);
    }
};

// One thread's view of a run.
struct Context {
    Team& team;
    int thread;
    int threads;
    const qr_dims* dims;

    QR_ALWAYS int64_t count(int64_t field) const { return field >= 0 ? field : dims->n[-1 - field]; }
    QR_ALWAYS void barrier() {
        if (threads > 1) team.barrier();
        else team.reset();
    }
    // The next of `total` pieces of work, -1 when all are taken.
    QR_ALWAYS int64_t take(int64_t total) {
        int64_t at = team.next.fetch_add(1, std::memory_order_relaxed);
        return at < total ? at : -1;
    }
    // As `take`, in order from this thread's own share of the pieces, so that what it reads lies in a row; then from
    // the shares of those who are behind.
    QR_ALWAYS int64_t take_near(int64_t total) {
        team.near_used.store(true, std::memory_order_relaxed);
        for (int i = 0; i < threads; i++) {
            int64_t of = (thread + i) % threads;
            int64_t first = total * of / threads, end = total * (of + 1) / threads;
            if (first == end) continue;
            int64_t at = first + team.near[of].value.fetch_add(1, std::memory_order_relaxed);
            if (at < end) return at;
        }
        return -1;
    }
    // This thread's own memory; a later call may move it.
    QR_ALWAYS void* scratch(size_t bytes) { return team.scratch[thread].get(bytes); }
    // Memory that all threads of the op share. Every thread must ask for the same size at the same place.
    void* shared(size_t bytes);
};

}  // namespace qr
