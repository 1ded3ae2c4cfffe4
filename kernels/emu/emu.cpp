// The emulated CUDA device: runs a launch block by block, each thread of a block a fibre, in the order of a schedule. Barriers and
// warp operations park a fibre until those it waits for are there; who never comes is told by kernel, block and thread.

#include "fibre.h"
#include "machine.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

namespace emu {

__thread Place *here;
thread_local Machine machine;

std::string where() {
    char text[200];
    const Place &p = machine.current->place;
    snprintf(text, sizeof text, "block (%u, %u, %u), thread %u", p.block.x, p.block.y, p.block.z, p.thread.x);
    return text;
}

namespace {

// Stands between and behind shared arrays; no kernel writes it.
constexpr unsigned char FENCE = 0xA5;
constexpr size_t FENCE_BYTES = 64;

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
        if (t.what == Warp::Together) {
            void *brought[32];
            for (unsigned j = 0; j < 32; j++) brought[j] = reinterpret_cast<void *>(values[j]);
            t.work(brought);
        }
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
        t.groups.clear();
        t.open.clear();
        t.place = Place{{i, 0, 0}, block, {l.block, 1, 1}, {l.grid[0], l.grid[1], l.grid[2]}};
        t.sp = emu_prepare(m.stacks.base + i * (STACK + page()) + page(), STACK, body);
    }
    do {
        arrange(m.warps, (l.block + 31) / 32);
        for (unsigned warp : m.warps) run_warp(warp * 32);
    } while (open_barrier());
    check_fences();
}

} // namespace

void run_grid() {
    const emu_launch &l = *machine.launch;
    uint64_t blocks = uint64_t(l.grid[0]) * l.grid[1] * l.grid[2];
    arrange(machine.blocks, static_cast<unsigned>(blocks));
    for (unsigned i : machine.blocks) {
        run_block({i % l.grid[0], i / l.grid[0] % l.grid[1], i / l.grid[0] / l.grid[1]});
    }
}

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

void together(Site site, void (*work)(void **lanes), void *mine) {
    machine.current->work = work;
    meet(Warp::Together, site, 0xffffffffu, reinterpret_cast<uint64_t>(mine), 0);
}

void copy_later(Site site, void *to, const void *from) {
    if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) {
        fail("copies 16 bytes from or to an address that is no multiple of 16 at %s:%d", site.file, site.line);
    }
    Copy copy = {static_cast<unsigned char *>(to), {}};
    if (from) memcpy(copy.bytes, from, 16);
    // Whoever reads it too early gets what differs from schedule to schedule.
    fill(copy.to, 16, poison(machine.schedule));
    machine.current->open.push_back(copy);
}

void close_copies() {
    Thread &t = *machine.current;
    t.groups.push_back(std::move(t.open));
    t.open.clear();
}

void finish_copies(unsigned but_last) {
    std::vector<std::vector<Copy>> &groups = machine.current->groups;
    while (groups.size() > but_last) {
        for (const Copy &copy : groups.front()) memcpy(copy.to, copy.bytes, 16);
        groups.erase(groups.begin());
    }
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
