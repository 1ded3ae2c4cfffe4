// The machine that emu.cpp runs and launch.cpp feeds: one for each thread of the host.

#pragma once
#include "emu.h"

#include <csetjmp>
#include <string>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

// Here blockDim and so on are names of fields and nothing else.
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

extern "C" {
struct emu_slot {
    const char *name;
    unsigned char *data;
    size_t bytes;
    // Bytes of an element.
    uint32_t element;
    // 0 read, 1 written, 2 read and written
    uint32_t access;
};
struct emu_launch {
    const char *kernel;
    uint32_t grid[3];
    uint32_t block, shared;
    const void *params;
    size_t param_bytes;
    emu_slot *slots;
    size_t slot_count;
    const uint64_t *schedules;
    size_t schedule_count;
};
}

namespace emu {

constexpr size_t STACK = 128 * 1024;
constexpr unsigned MAX_THREADS = 1024;
constexpr size_t MAX_STATIC = 48 * 1024;

enum class State { Ready, Barrier, Warp, Done };

// A copy that was asked for; its bytes were read then.
struct Copy { unsigned char *to; unsigned char bytes[16]; };

struct Thread {
    void *sp;
    State state;
    Place place;
    Site site;
    Warp what;
    unsigned mask, from;
    uint64_t value;
    void (*work)(void **lanes);
    // Copies not yet waited for: those of closed groups, oldest first, and of the open one.
    std::vector<std::vector<Copy>> groups;
    std::vector<Copy> open;
};

static inline size_t page() {
    static const size_t size = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    return size;
}

// Memory of whole pages between two that may not be touched.
struct Pages {
    unsigned char *base = nullptr;
    size_t bytes = 0;

    void map(size_t wanted) {
        bytes = (wanted + page() - 1) / page() * page();
        void *all = mmap(nullptr, bytes + 2 * page(), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (all == MAP_FAILED) { bytes = 0; return; }
        base = static_cast<unsigned char *>(all) + page();
        protect(PROT_READ | PROT_WRITE);
    }
    void protect(int how) const { mprotect(base, bytes, how); }
    void unmap() {
        if (base) munmap(base - page(), bytes + 2 * page());
        base = nullptr;
    }
    bool holds(const unsigned char *p) const { return base && p >= base - page() && p < base + bytes + page(); }
};

struct Binding {
    Pages pages;
    unsigned char *data = nullptr;
    void *pointer = nullptr;
};

struct SharedArray { const char *site; size_t at, bytes; };

// Everything about the launch that this OS thread runs.
struct Machine {
    const emu_launch *launch = nullptr;
    const Kernel *kernel = nullptr;
    std::vector<Binding> bindings;
    std::vector<void *> arguments;
    std::vector<Thread> threads;
    std::vector<unsigned> blocks, warps, lanes;
    Pages stacks, dynamic, fixed;
    size_t stacks_for = 0;
    std::vector<SharedArray> arrays;
    size_t fixed_used = 0;
    Thread *current = nullptr;
    void *scheduler = nullptr;
    uint64_t schedule = 0, random = 0;
    sigjmp_buf out;
    bool running = false;
    std::string error;

    ~Machine() { stacks.unmap(); dynamic.unmap(); fixed.unmap(); }
};

extern thread_local Machine machine;

// What a 4-byte word is before anyone writes it: a NaN first, then large numbers of either sign.
static inline uint32_t poison(uint64_t schedule) {
    switch (schedule % 3) {
    case 0: return 0x7fc0deadu;
    case 1: return 0x7149f2cau;
    default: return 0xf149f2cau;
    }
}

static inline void fill(unsigned char *p, size_t bytes, uint32_t word) {
    for (size_t i = 0; i < bytes; i++) p[i] = static_cast<unsigned char>(word >> (8 * (i % 4)));
}

// The running thread, in words.
std::string where();
// Runs every block of the launch, in the schedule's order.
void run_grid();

} // namespace emu
