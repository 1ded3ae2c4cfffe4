// The emulated CUDA device: runs a launch block by block, each thread of a block a fibre, under several schedules, and tells
// what went wrong by kernel, block and thread.
//
// Each binding lives in a mapping of its own that ends where the next page may not be touched, and inputs may not be written.
// Shared memory is filled with numbers that differ from schedule to schedule, and so are outputs before the launch: a kernel
// that reads what nobody wrote, or whose threads race, gives other bits under another schedule, and that is an error.

#include "fibre.h"

#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <mutex>
#include <string>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

extern "C" {
struct emu_slot {
    const char *name;
    unsigned char *data;
    size_t bytes;
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
extern const emu::Kernel *const attn2d_emu_kernels[];
}

namespace emu {

__thread Place *here;

namespace {

constexpr size_t STACK = 128 * 1024;
constexpr unsigned MAX_THREADS = 1024;
constexpr size_t MAX_STATIC = 48 * 1024;
// Stands between and behind shared arrays; no kernel writes it.
constexpr unsigned char FENCE = 0xA5;
constexpr size_t FENCE_BYTES = 64;

enum class State { Ready, Barrier, Warp, Done };

struct Thread {
    void *sp;
    State state;
    Place place;
    Site site;
    Warp what;
    unsigned mask, from;
    uint64_t value;
};

size_t page() {
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

thread_local Machine machine;

// What a 4-byte word is before anyone writes it: a NaN first, then large numbers of either sign.
uint32_t poison(uint64_t schedule) {
    switch (schedule % 3) {
    case 0: return 0x7fc0deadu;
    case 1: return 0x7149f2cau;
    default: return 0xf149f2cau;
    }
}

void fill(unsigned char *p, size_t bytes, uint32_t word) {
    for (size_t i = 0; i < bytes; i++) p[i] = static_cast<unsigned char>(word >> (8 * (i % 4)));
}

std::string where() {
    char text[200];
    const Place &p = machine.current->place;
    snprintf(text, sizeof text, "block (%u, %u, %u), thread %u", p.block.x, p.block.y, p.block.z, p.thread.x);
    return text;
}

void yield(State state, Site site) {
    Thread *me = machine.current;
    me->state = state;
    me->site = site;
    emu_switch(&me->sp, machine.scheduler);
}

// What runs at the bottom of each fibre.
void body() {
    machine.kernel->call(machine.arguments.data());
    yield(State::Done, Site{"", 0});
    abort();
}

void run(Thread &t) {
    machine.current = &t;
    here = &t.place;
    emu_switch(&machine.scheduler, t.sp);
}

uint64_t next_random() {
    // splitmix64
    uint64_t z = (machine.random += 0x9E3779B97F4A7C15ull);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

// Puts 0..n in the schedule's order: 0 forward, 1 reverse, anything else seeds a shuffle.
void arrange(std::vector<unsigned> &order, unsigned n) {
    order.resize(n);
    for (unsigned i = 0; i < n; i++) order[i] = machine.schedule == 1 ? n - 1 - i : i;
    if (machine.schedule > 1) {
        for (unsigned i = n; i > 1; i--) std::swap(order[i - 1], order[next_random() % i]);
    }
}

// Completes what lanes of a warp wait for, where all lanes named are there. Returns whether any can go on.
bool resolve(Thread *warp, unsigned lanes) {
    bool progress = false;
    for (unsigned i = 0; i < lanes; i++) {
        Thread &t = warp[i];
        if (t.state != State::Warp) continue;
        bool complete = true;
        for (unsigned j = 0; j < 32 && complete; j++) {
            if (!(t.mask >> j & 1)) continue;
            complete = j < lanes && warp[j].state == State::Warp && warp[j].site.line == t.site.line
                && warp[j].site.file == t.site.file && warp[j].what == t.what && warp[j].mask == t.mask;
        }
        if (!complete) continue;
        uint64_t values[32], ballot = 0;
        for (unsigned j = 0; j < lanes; j++) {
            values[j] = warp[j].value;
            if ((t.mask >> j & 1) && warp[j].value) ballot |= 1ull << j;
        }
        unsigned mask = t.mask;
        for (unsigned j = 0; j < lanes; j++) {
            if (!(mask >> j & 1)) continue;
            Thread &u = warp[j];
            if (u.what == Warp::Shuffle && !(mask >> u.from & 1)) {
                machine.current = &u;
                fail("a shuffle at %s:%d reads lane %u, which is not in its mask", u.site.file, u.site.line, u.from);
            }
            u.value = u.what == Warp::Ballot ? ballot : values[u.from % 32];
            u.state = State::Ready;
        }
        progress = true;
    }
    return progress;
}

void run_warp(unsigned first) {
    unsigned lanes = std::min<unsigned>(32, static_cast<unsigned>(machine.threads.size()) - first);
    arrange(machine.lanes, lanes);
    do {
        for (unsigned i : machine.lanes) {
            Thread &t = machine.threads[first + i];
            if (t.state == State::Ready) run(t);
        }
    } while (resolve(&machine.threads[first], lanes));
}

// All threads wait or are done: opens the barrier, or says who is missing.
bool open_barrier() {
    Thread *waiting = nullptr, *done = nullptr;
    for (Thread &t : machine.threads) {
        if (t.state == State::Done) done = &t;
        if (t.state == State::Warp) {
            machine.current = &t;
            fail("a warp operation at %s:%d (mask %08x) waits for lanes that do not come", t.site.file, t.site.line, t.mask);
        }
        if (t.state != State::Barrier) continue;
        if (waiting && (waiting->site.line != t.site.line || strcmp(waiting->site.file, t.site.file) != 0)) {
            machine.current = &t;
            fail("waits at the barrier %s:%d while thread %u waits at %s:%d", t.site.file, t.site.line,
                waiting->place.thread.x, waiting->site.file, waiting->site.line);
        }
        waiting = &t;
    }
    if (!waiting) return false;
    if (done) {
        machine.current = done;
        fail("has returned while thread %u waits at the barrier %s:%d", waiting->place.thread.x, waiting->site.file,
            waiting->site.line);
    }
    for (Thread &t : machine.threads) t.state = State::Ready;
    return true;
}

void check_fences() {
    for (const SharedArray &a : machine.arrays) {
        const unsigned char *fence = machine.fixed.base + a.at + a.bytes;
        for (size_t i = 0; i < FENCE_BYTES; i++) {
            if (fence[i] != FENCE) {
                machine.current = &machine.threads[0];
                fail("something wrote %zu bytes past a shared array of %zu bytes", i + 1, a.bytes);
            }
        }
    }
}

void run_block(dim3 block) {
    Machine &m = machine;
    const emu_launch &l = *m.launch;
    m.arrays.clear();
    m.fixed_used = 0;
    fill(m.dynamic.base, m.dynamic.bytes, poison(m.schedule));
    for (unsigned i = 0; i < l.block; i++) {
        Thread &t = m.threads[i];
        t.state = State::Ready;
        t.place = Place{{i, 0, 0}, block, {l.block, 1, 1}, {l.grid[0], l.grid[1], l.grid[2]}};
        t.sp = emu_prepare(m.stacks.base + i * (STACK + page()) + page(), STACK, body);
    }
    do {
        arrange(m.warps, (l.block + 31) / 32);
        for (unsigned warp : m.warps) run_warp(warp * 32);
    } while (open_barrier());
    check_fences();
}

void run_grid() {
    const emu_launch &l = *machine.launch;
    uint64_t blocks = uint64_t(l.grid[0]) * l.grid[1] * l.grid[2];
    arrange(machine.blocks, static_cast<unsigned>(blocks));
    for (unsigned i : machine.blocks) {
        run_block({i % l.grid[0], i / l.grid[0] % l.grid[1], i / l.grid[0] / l.grid[1]});
    }
}

// ------------------------------------------------------------------------------------------------ faults

// Which memory a fault address belongs to, in words.
std::string describe(const unsigned char *address) {
    char text[300];
    for (size_t i = 0; i < machine.bindings.size(); i++) {
        const Binding &b = machine.bindings[i];
        const emu_slot &slot = machine.launch->slots[i];
        if (!b.pages.holds(address)) continue;
        long at = static_cast<long>(address - b.data);
        if (at >= 0 && at < static_cast<long>(slot.bytes)) {
            snprintf(text, sizeof text, "writes element %ld of '%s', which it only reads", at / 4, slot.name);
        } else {
            snprintf(text, sizeof text, "touches element %ld of '%s', which has %zu", at < 0 ? (at - 3) / 4 : at / 4,
                slot.name, slot.bytes / 4);
        }
        return text;
    }
    if (machine.dynamic.holds(address)) {
        snprintf(text, sizeof text, "touches byte %ld of its %u bytes of dynamic shared memory",
            static_cast<long>(address - (machine.dynamic.base + machine.dynamic.bytes - machine.launch->shared)),
            machine.launch->shared);
        return text;
    }
    if (machine.stacks.holds(address)) return "overruns its stack (of local arrays or calls)";
    snprintf(text, sizeof text, "touches address %p, which belongs to no binding", static_cast<const void *>(address));
    return text;
}

// A fault comes from the kernel's own instruction, never from inside the allocator, so strings may be made here.
void note_fault(int signal, const unsigned char *address) {
    std::string what = signal == SIGFPE ? "divides an integer by zero"
        : signal == SIGILL              ? "stops at a trap"
                                        : describe(address);
    machine.error = where() + " " + what;
}

struct sigaction previous[NSIG];

void on_signal(int signal, siginfo_t *info, void *context) {
    Machine &m = machine;
    if (m.running && m.current) {
        m.running = false;
        note_fault(signal, static_cast<const unsigned char *>(info->si_addr));
        siglongjmp(m.out, 1);
    }
    const struct sigaction &old = previous[signal];
    if (old.sa_flags & SA_SIGINFO) {
        old.sa_sigaction(signal, info, context);
    } else if (old.sa_handler != SIG_DFL && old.sa_handler != SIG_IGN) {
        old.sa_handler(signal);
    } else {
        // Runs into the default action when the instruction is tried again.
        sigaction(signal, &old, nullptr);
    }
}

void watch_faults() {
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction action = {};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        sigemptyset(&action.sa_mask);
        for (int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigaction(signal, &action, &previous[signal]);
    });
}

// ------------------------------------------------------------------------------------------------ a launch

// The binding ends within 16 bytes of the page that may not be touched, and starts at a multiple of 16 as tensors do.
bool bind(Binding &b, const emu_slot &slot) {
    b.pages.map(slot.bytes + 16);
    if (!b.pages.base) return false;
    b.data = b.pages.base + (b.pages.bytes - slot.bytes) / 16 * 16;
    b.pointer = b.data;
    return true;
}

void prepare(Binding &b, const emu_slot &slot) {
    uint32_t word = poison(machine.schedule);
    b.pages.protect(PROT_READ | PROT_WRITE);
    unsigned char *end = b.pages.base + b.pages.bytes;
    fill(b.pages.base, static_cast<size_t>(b.data - b.pages.base), word);
    fill(b.data + slot.bytes, static_cast<size_t>(end - b.data) - slot.bytes, word);
    if (slot.access == 1) fill(b.data, slot.bytes, word);
    else memcpy(b.data, slot.data, slot.bytes);
    if (slot.access == 0) b.pages.protect(PROT_READ);
}

// Whether the bytes around a binding are as they were.
void check_margins(const Binding &b, const emu_slot &slot) {
    uint32_t word = poison(machine.schedule);
    auto intact = [&](const unsigned char *from, const unsigned char *to, const char *side) {
        for (const unsigned char *p = from; p < to; p++) {
            if (*p != static_cast<unsigned char>(word >> (8 * ((p - from) % 4)))) {
                machine.error = std::string("a thread writes ") + side + " the memory of '" + slot.name + "', element "
                    + std::to_string((p - b.data) / 4 - (p < b.data ? 1 : 0)) + " of " + std::to_string(slot.bytes / 4);
                return;
            }
        }
    };
    intact(b.pages.base, b.data, "before");
    intact(b.data + slot.bytes, b.pages.base + b.pages.bytes, "past");
}

std::string schedule_name(uint64_t schedule) {
    if (schedule == 0) return "forward";
    if (schedule == 1) return "reverse";
    return "random " + std::to_string(schedule);
}

// The first schedule's outputs are the result; those of every other one must be equal to the bit.
void collect(size_t run) {
    for (size_t i = 0; i < machine.bindings.size() && machine.error.empty(); i++) {
        const Binding &b = machine.bindings[i];
        const emu_slot &slot = machine.launch->slots[i];
        check_margins(b, slot);
        if (slot.access == 0 || !machine.error.empty()) continue;
        static thread_local std::vector<std::vector<unsigned char>> first;
        if (first.size() < machine.bindings.size()) first.resize(machine.bindings.size());
        if (run == 0) {
            first[i].assign(b.data, b.data + slot.bytes);
            continue;
        }
        for (size_t e = 0; e + 4 <= slot.bytes; e += 4) {
            uint32_t was, is, before = poison(machine.launch->schedules[0]), now = poison(machine.schedule);
            memcpy(&was, &first[i][e], 4);
            memcpy(&is, b.data + e, 4);
            // Left unwritten in both.
            if (was == is || (was == before && is == now)) continue;
            float x, y;
            memcpy(&x, &was, 4);
            memcpy(&y, &is, 4);
            char text[300];
            snprintf(text, sizeof text,
                "'%s' element %zu is %.9g under the schedule %s and %.9g under %s: threads race, or memory is read that "
                "nobody wrote", slot.name, e / 4, x, schedule_name(machine.launch->schedules[0]).c_str(), y,
                schedule_name(machine.schedule).c_str());
            machine.error = text;
            break;
        }
        if (run + 1 == machine.launch->schedule_count) memcpy(slot.data, first[i].data(), slot.bytes);
    }
}

// Outside any frame with a destructor, because a fault leaves by siglongjmp.
void run_guarded() {
    if (sigsetjmp(machine.out, 1) == 0) {
        machine.running = true;
        run_grid();
    }
    machine.running = false;
}

bool allocate(Machine &m, const emu_launch &l) {
    if (m.stacks_for < l.block) {
        m.stacks.unmap();
        m.stacks.map(l.block * (STACK + page()));
        if (!m.stacks.base) return false;
        for (unsigned i = 0; i < l.block; i++) mprotect(m.stacks.base + i * (STACK + page()), page(), PROT_NONE);
        m.stacks_for = l.block;
    }
    if (!m.fixed.base) m.fixed.map(2 * MAX_STATIC);
    m.dynamic.unmap();
    m.dynamic.map(std::max<size_t>(l.shared, 1));
    return m.fixed.base && m.dynamic.base;
}

const Kernel *find(const char *name) {
    for (size_t i = 0; attn2d_emu_kernels[i]; i++) {
        if (strcmp(attn2d_emu_kernels[i]->name, name) == 0) return attn2d_emu_kernels[i];
    }
    return nullptr;
}

// What the driver would refuse, or silently take for something else.
std::string refuse(const emu_launch &l, const Kernel *kernel) {
    if (!kernel) return "is not among the emulated kernels";
    if (kernel->arguments != l.slot_count + 1) {
        return "takes " + std::to_string(kernel->arguments) + " arguments, the launch gives the parameter block and "
            + std::to_string(l.slot_count) + " bindings";
    }
    if (kernel->param_bytes != l.param_bytes) {
        return "has a parameter block of " + std::to_string(kernel->param_bytes) + " bytes, the launch gives "
            + std::to_string(l.param_bytes);
    }
    if (l.block == 0 || l.block > kernel->max_threads || l.block > MAX_THREADS) {
        return "is built for at most " + std::to_string(kernel->max_threads) + " threads a block, the plan says "
            + std::to_string(l.block);
    }
    return "";
}

} // namespace

void fail(const char *format, ...) {
    char text[400];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    machine.error = where() + " " + text;
    machine.running = false;
    siglongjmp(machine.out, 1);
}

void barrier(Site site) { yield(State::Barrier, site); }

uint64_t meet(Warp what, Site site, unsigned mask, uint64_t value, unsigned from) {
    Thread *me = machine.current;
    if (!(mask >> (me->place.thread.x % 32) & 1)) fail("is not in the mask %08x of its warp operation at %s:%d", mask, site.file, site.line);
    me->what = what;
    me->mask = mask;
    me->value = value;
    me->from = from;
    yield(State::Warp, site);
    return me->value;
}

void *shared(const char *site, size_t bytes) {
    Machine &m = machine;
    for (const SharedArray &a : m.arrays) {
        if (a.site == site) return m.fixed.base + a.at;
    }
    size_t at = m.fixed_used, room = (bytes + 15) / 16 * 16;
    if (at + room + FENCE_BYTES > 2 * MAX_STATIC || bytes > MAX_STATIC) fail("wants more than %zu bytes of static shared memory", MAX_STATIC);
    fill(m.fixed.base + at, bytes, poison(m.schedule));
    memset(m.fixed.base + at + bytes, FENCE, FENCE_BYTES + room - bytes);
    m.fixed_used = at + room + FENCE_BYTES;
    m.arrays.push_back({site, at, bytes});
    return m.fixed.base + at;
}

void *dynamic_shared() { return machine.dynamic.base + machine.dynamic.bytes - (machine.launch->shared + 15) / 16 * 16; }

} // namespace emu

// Runs a launch under each schedule. 0: the written slots have the results. 1: `error` says what went wrong.
extern "C" int attn2d_emu_launch(const emu_launch *launch, char *error, size_t error_bytes) {
    using namespace emu;
    Machine &m = machine;
    m.launch = launch;
    m.kernel = find(launch->kernel);
    m.error = refuse(*launch, m.kernel);
    if (m.error.empty() && !allocate(m, *launch)) m.error = "no memory for its threads";
    m.bindings.assign(launch->slot_count, Binding());
    m.threads.resize(launch->block);
    m.arguments.assign(1, const_cast<void *>(launch->params));
    for (size_t i = 0; i < launch->slot_count && m.error.empty(); i++) {
        if (!bind(m.bindings[i], launch->slots[i])) m.error = "no memory for its bindings";
        m.arguments.push_back(&m.bindings[i].pointer);
    }
    watch_faults();
    std::vector<unsigned char> signal_stack(64 * 1024);
    stack_t stack = {}, before = {};
    stack.ss_sp = signal_stack.data();
    stack.ss_size = signal_stack.size();
    sigaltstack(&stack, &before);
    for (size_t run = 0; run < launch->schedule_count && m.error.empty(); run++) {
        m.schedule = m.random = launch->schedules[run];
        for (size_t i = 0; i < launch->slot_count; i++) prepare(m.bindings[i], launch->slots[i]);
        run_guarded();
        if (m.error.empty()) collect(run);
    }
    sigaltstack(&before, nullptr);
    for (Binding &b : m.bindings) b.pages.unmap();
    m.current = nullptr;
    here = nullptr;
    if (m.error.empty()) return 0;
    snprintf(error, error_bytes, "%s", m.error.c_str());
    return 1;
}
