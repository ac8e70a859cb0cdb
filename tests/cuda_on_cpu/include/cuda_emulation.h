// CUDA C++ for g++: what a kernel source needs so that it compiles unchanged and its threads run as fibers.
// See the docstring of the Python package around it for what this shows and what it cannot show.
#pragma once

#include <csetjmp>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <sys/mman.h>
#include <type_traits>
#include <ucontext.h>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__
#define __noinline__ __attribute__((noinline))
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __grid_constant__
#define __constant__ static
#define __align__(n) alignas(n)
// One block runs at a time, so its shared memory is static memory; a section of its own lets it be spoiled before use.
#define __shared__ static __attribute__((section("cuda_shared")))

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
};

static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// The sections' first and last byte, named by the linker; this variable makes sure that there is one.
namespace {
[[maybe_unused]] __attribute__((section("cuda_shared"), used)) char first_shared[16] = {};
}
extern "C" char __start_cuda_shared[] __attribute__((visibility("hidden")));
extern "C" char __stop_cuda_shared[] __attribute__((visibility("hidden")));

namespace emulation {

constexpr size_t STACK = 256 * 1024, MOST_THREADS = 1024, MOST_SHARED = 227 * 1024;

enum State { UNUSED, READY, AT_BLOCK_BARRIER, AT_WARP, FINISHED };

struct Thread {
    State state;
    uint3 index;
    struct Fiber* fiber;
    int line;                // of the barrier or shuffle at which it waits
    const char* what;        // which kind of meeting it waits for
    unsigned mask;           // of the lanes that meet
    int source;              // lane whose value it wants
    unsigned char give[16];  // what it brings to the meeting
    unsigned char take[16];  // what it gets there
    size_t size;
    unsigned ballot;         // lanes that brought something other than 0
};

struct Fiber {
    jmp_buf context;
    bool started;
    char* stack;
    Fiber* next;  // in the list of free fibers
    ucontext_t first;
};

struct Launch {
    void (*body)(void*);
    void* closure;
    bool backwards;
    int threads, unstarted, startable, alive;
};

static Thread threads[MOST_THREADS];
static Fiber* free_fibers;
static Fiber* current_fiber;
static Thread* self;
static Launch run;
static jmp_buf scheduler;
static char problem[512];
static uintptr_t bad_address;
alignas(1024) static char dynamic_shared[MOST_SHARED];
static size_t dynamic_bytes;
static int at_barrier, at_warp[MOST_THREADS / 32];  // how many threads wait there

[[noreturn]] inline void fail(const char* text, int line) {
    int used = snprintf(problem, sizeof problem, "%s", text);
    if (line > 0 && used > 0 && size_t(used) < sizeof problem)
        used += snprintf(problem + used, sizeof problem - used, " (line %d)", line);
    if (used > 0 && size_t(used) < sizeof problem)
        snprintf(problem + used, sizeof problem - used, ", block (%u, %u, %u), thread (%u, %u, %u)", blockIdx.x,
                 blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
    _longjmp(scheduler, 2);
}

// Fibers ----------------------------------------------------------------------------------------------------------------

inline int order(int i) { return run.backwards ? run.threads - 1 - i : i; }

inline void fiber_main() {  // runs threads one after another; one that waits keeps this fiber
    for (;;) {
        while (run.unstarted < run.startable) {
            self = &threads[order(run.unstarted++)];
            self->fiber = current_fiber;
            self->state = READY;
            threadIdx = self->index;
            run.body(run.closure);
            self->state = FINISHED;
            --run.alive;
        }
        Fiber* mine = current_fiber;
        mine->next = free_fibers;
        free_fibers = mine;
        if (!_setjmp(mine->context)) _longjmp(scheduler, 1);
    }
}

inline Fiber* new_fiber() {
    Fiber* fiber = free_fibers;
    if (fiber) {
        free_fibers = fiber->next;
        return fiber;
    }
    fiber = new Fiber();
    void* stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) fail("no memory for a thread's stack", 0);
    fiber->stack = static_cast<char*>(stack);
    return fiber;
}

__attribute__((noinline)) inline void resume(Fiber* fiber) {
    current_fiber = fiber;
    int came_back = _setjmp(scheduler);
    if (came_back) return;
    if (fiber->started) _longjmp(fiber->context, 1);
    fiber->started = true;
    getcontext(&fiber->first);
    fiber->first.uc_stack.ss_sp = fiber->stack;
    fiber->first.uc_stack.ss_size = STACK;
    fiber->first.uc_link = nullptr;
    makecontext(&fiber->first, fiber_main, 0);
    setcontext(&fiber->first);
}

__attribute__((noinline)) inline void wait() {
    Thread* me = self;
    while (me->state != READY)
        if (!_setjmp(me->fiber->context)) _longjmp(scheduler, 1);
    asm volatile("" ::: "memory");
}

// Meetings --------------------------------------------------------------------------------------------------------------

inline void release_block() {  // when every thread stands at the same barrier
    if (++at_barrier < run.threads) return;
    for (int i = 0; i < run.threads; ++i)
        if (threads[i].line != self->line) return;
    for (int i = 0; i < run.threads; ++i) threads[i].state = READY;
    at_barrier = 0;
}

inline void meet_block(int line) {
    self->state = AT_BLOCK_BARRIER;
    self->line = line;
    self->what = "__syncthreads";
    release_block();
    wait();
}

inline int lane() { return int(self - threads) % warpSize; }

inline int members() {  // lanes that this warp has at all
    int first = int(self - threads) / warpSize * warpSize;
    return run.threads - first < warpSize ? run.threads - first : warpSize;
}

inline void release_warp(unsigned mask) {  // when every lane of the mask is at the same shuffle: values change hands
    Thread* warp = self - lane();
    int count = members(), taking_part = __builtin_popcount(count < 32 ? mask & ((1u << count) - 1) : mask);
    int& waiting = at_warp[(self - threads) / warpSize];
    if (++waiting < taking_part) return;
    unsigned ballot = 0;
    for (int i = 0; i < count; ++i) {
        if (!(mask >> i & 1)) continue;
        Thread& other = warp[i];
        if (other.state != AT_WARP || other.line != self->line || other.what != self->what || other.mask != mask) return;
        ballot |= unsigned(other.give[0] != 0) << i;
    }
    for (int i = 0; i < count; ++i) {
        if (!(mask >> i & 1)) continue;
        int from = warp[i].source;
        if (from >= count || !(mask >> from & 1))
            fail("a shuffle reads a lane that does not take part: its value is undefined", self->line);
        memcpy(warp[i].take, warp[from].give, warp[from].size);
        warp[i].ballot = ballot;
    }
    for (int i = 0; i < count; ++i)
        if (mask >> i & 1) warp[i].state = READY;
    waiting -= taking_part;
}

inline void meet_warp(unsigned mask, int source, const void* value, size_t size, const char* what, int line) {
    if (!(mask >> lane() & 1)) fail("a warp function is called by a lane outside its mask", line);
    self->mask = mask;
    self->source = source;
    self->what = what;
    self->line = line;
    self->size = size;
    memcpy(self->give, value, size);
    self->state = AT_WARP;
    release_warp(mask);
    wait();
}

template <class T>
T shuffle(unsigned mask, T value, int source, const char* what, int line) {
    static_assert(sizeof(T) <= 16, "a shuffle moves 16 bytes at most");
    meet_warp(mask, source, &value, sizeof(T), what, line);
    T result;
    memcpy(&result, self->take, sizeof(T));
    return result;
}

[[noreturn]] inline void deadlock() {
    for (int i = 0; i < run.threads; ++i) {
        if (threads[i].state != AT_BLOCK_BARRIER && threads[i].state != AT_WARP) continue;
        char text[160];
        snprintf(text, sizeof text, "%s is not reached by all threads that must meet there; %d of %d have exited",
                 threads[i].what, run.threads - run.alive, run.threads);
        threadIdx = threads[i].index;
        fail(text, threads[i].line);
    }
    fail("no thread can go on", 0);
}

// A launch --------------------------------------------------------------------------------------------------------------

// Runs the threads of a warp for as long as any of them can go on, so that warps are as far apart as barriers allow.
inline bool run_warp(int warp) {
    int first = warp * warpSize, end = first + warpSize < run.threads ? first + warpSize : run.threads;
    bool any = false, again = true;
    run.startable = run.backwards ? run.threads - first : end;
    while (run.unstarted < run.startable && !problem[0]) {
        resume(new_fiber());
        any = true;
    }
    while (again && !problem[0]) {
        again = false;
        for (int i = first; i < end && !problem[0]; ++i) {
            Thread& thread = threads[run.backwards ? first + end - 1 - i : i];
            if (thread.state != READY) continue;
            any = again = true;
            self = &thread;
            threadIdx = thread.index;
            resume(thread.fiber);
        }
    }
    return any;
}

inline void run_block() {
    run.unstarted = 0;
    run.alive = run.threads;
    at_barrier = 0;
    memset(at_warp, 0, sizeof at_warp);
    for (int i = 0; i < run.threads; ++i) {
        threads[i].state = UNUSED;
        threads[i].index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    }
    memset(__start_cuda_shared, 0xff, __stop_cuda_shared - __start_cuda_shared);  // 0xff...: NaN in every float type
    memset(dynamic_shared, 0xff, dynamic_bytes);
    while (run.alive && !problem[0]) {
        bool any = false;
        int warps = (run.threads + warpSize - 1) / warpSize;
        for (int w = 0; w < warps && !problem[0]; ++w) any |= run_warp(run.backwards ? warps - 1 - w : w);
        if (!any && !problem[0] && !_setjmp(scheduler)) deadlock();
    }
}

inline void on_signal(int number, siginfo_t* info, void*) {
    bad_address = reinterpret_cast<uintptr_t>(info->si_addr);
    fail(number == SIGFPE ? "integer division by zero" : "memory outside every array is read or written", 0);
}

struct SignalHandlers {  // only while a kernel runs
    static constexpr int numbers[3] = {SIGSEGV, SIGBUS, SIGFPE};
    struct sigaction old[3];
    SignalHandlers() {
        struct sigaction action = {};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_NODEFER;
        for (int i = 0; i < 3; ++i) sigaction(numbers[i], &action, &old[i]);
    }
    ~SignalHandlers() {
        for (int i = 0; i < 3; ++i) sigaction(numbers[i], &old[i], nullptr);
    }
};

struct Report {  // as the Python side declares it
    char text[512];
    uintptr_t address;
};

template <class... P, size_t... I>
void call(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_cv_t<P>*>(arguments[I])...);
}

template <class... P>
int launch(void (*kernel)(P...), void** arguments, const unsigned* sizes, unsigned shared, int backwards, Report* out) {
    struct Closure {
        void (*kernel)(P...);
        void** arguments;
    } closure{kernel, arguments};
    gridDim = {sizes[0], sizes[1], sizes[2]};
    blockDim = {sizes[3], sizes[4], sizes[5]};
    dynamic_bytes = shared;
    run.body = [](void* p) {
        auto* c = static_cast<Closure*>(p);
        call(c->kernel, c->arguments, std::index_sequence_for<P...>());
    };
    run.closure = &closure;
    run.backwards = backwards;
    run.threads = int(sizes[3] * sizes[4] * sizes[5]);
    problem[0] = 0;
    bad_address = 0;
    size_t blocks = size_t(sizes[0]) * sizes[1] * sizes[2];
    SignalHandlers handlers;
    for (size_t i = 0; i < blocks && !problem[0]; ++i) {
        size_t b = backwards ? blocks - 1 - i : i;
        blockIdx = {unsigned(b % sizes[0]), unsigned(b / sizes[0] % sizes[1]), unsigned(b / sizes[0] / sizes[1])};
        run_block();
    }
    if (!problem[0]) return 0;
    free_fibers = nullptr;  // the fibers of a failed launch stopped anywhere; their stacks are given up
    memcpy(out->text, problem, sizeof problem);
    out->address = bad_address;
    return 1;
}

// What a kernel's parameters are, for the check of the arguments: one word each, "*f4c" for const float*, "i4" for int.
template <class T>
constexpr auto kind_of(int) -> decltype(T::emulated_kind) { return T::emulated_kind; }
template <class T>
constexpr char kind_of(long) { return 's'; }  // any other struct

template <class T>
void describe(char*& p) {
    if constexpr (std::is_pointer_v<T>) {
        using Element = std::remove_pointer_t<T>;
        *p++ = '*';
        if constexpr (std::is_void_v<Element>) {
            *p++ = 'v', *p++ = '1';
        } else {
            describe<std::remove_cv_t<Element>>(p);
        }
        *p++ = std::is_const_v<Element> ? 'c' : 'm';
    } else {
        char kind = std::is_same_v<T, bool> ? 'b' : std::is_floating_point_v<T> ? 'f' : std::is_signed_v<T> ? 'i' : 'u';
        if constexpr (std::is_class_v<T>) kind = kind_of<T>(0);
        *p++ = kind;
        p += snprintf(p, 8, "%d", int(sizeof(T)));
    }
}

template <class... P>
const char* signature(void (*)(P...)) {
    static char text[16 * (sizeof...(P) + 1)];
    char* p = text;
    ((describe<std::remove_cv_t<P>>(p), *p++ = ' '), ...);
    *p = 0;
    return text;
}

}  // namespace emulation

// Called by the checks that -fsanitize=alignment,bounds compiles in, with the place in the source.
struct SanitizerPlace {
    const char* file;
    uint32_t line, column;
};
#define SANITIZER_HANDLER(name, text)                                                  \
    extern "C" __attribute__((visibility("hidden"))) void __ubsan_handle_##name(SanitizerPlace* place, uintptr_t) { \
        emulation::fail(text, int(place->line));                                       \
    }
SANITIZER_HANDLER(type_mismatch_v1, "a misaligned or null address is read or written")
SANITIZER_HANDLER(out_of_bounds, "an index outside a fixed-size array")

#include "cuda_functions.h"
#include "cuda_half.h"
