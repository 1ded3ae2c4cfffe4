// A launch on the emulated device: its memory, its schedules, and what is found wrong on the way.
//
// Each binding lives in a mapping of its own that ends where the next page may not be touched, and inputs may not be written.
// Shared memory is filled with numbers that differ from schedule to schedule, and so are outputs before the launch: a kernel
// that reads what nobody wrote, or whose threads race, gives other bits under another schedule, and that is an error.

#include "machine.h"

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <dlfcn.h>
#include <mutex>

extern "C" const emu::Kernel *const attn2d_emu_kernels[];

namespace emu {
namespace {

// ------------------------------------------------------------------------------------------------ faults

// Which memory a fault address belongs to, in words.
std::string describe(const unsigned char *address) {
    char text[300];
    for (size_t i = 0; i < machine.bindings.size(); i++) {
        const Binding &b = machine.bindings[i];
        const emu_slot &slot = machine.launch->slots[i];
        if (!b.pages.holds(address)) continue;
        long at = static_cast<long>(address - b.data), size = slot.element;
        if (at >= 0 && at < static_cast<long>(slot.bytes)) {
            snprintf(text, sizeof text, "writes element %ld of '%s', which it only reads", at / size, slot.name);
        } else {
            snprintf(text, sizeof text, "touches element %ld of '%s', which has %zu", at < 0 ? (at - size + 1) / size : at / size,
                slot.name, slot.bytes / slot.element);
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
                long at = p - b.data, size = slot.element;
                machine.error = std::string("a thread writes ") + side + " the memory of '" + slot.name + "', element "
                    + std::to_string((at < 0 ? at - size + 1 : at) / size) + " of " + std::to_string(slot.bytes / slot.element);
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

// The half of a word that lies at byte `at` of an array of such words.
uint32_t half_of(uint32_t word, size_t at) { return at % 4 ? word >> 16 : word & 0xffff; }

// The first schedule's outputs are the result; those of every other one must be equal to the bit.
void collect(size_t run) {
    for (size_t i = 0; i < machine.bindings.size() && machine.error.empty(); i++) {
        const Binding &b = machine.bindings[i];
        const emu_slot &slot = machine.launch->slots[i];
        check_margins(b, slot);
        if (slot.access == 0 || !machine.error.empty()) continue;
        static thread_local std::vector<std::vector<unsigned char>> first;
        if (first.size() < machine.bindings.size()) first.resize(machine.bindings.size());
        if (run == 0) first[i].assign(b.data, b.data + slot.bytes);
        for (size_t e = 0; e < slot.bytes; e += slot.element) {
            uint32_t was = 0, is = 0, before = poison(machine.launch->schedules[0]), now = poison(machine.schedule);
            memcpy(&was, &first[i][e], slot.element);
            memcpy(&is, b.data + e, slot.element);
            if (slot.element == 2) before = half_of(before, e), now = half_of(now, e);
            // Left unwritten in both.
            if (was == is || (was == before && is == now)) continue;
            float x, y;
            memcpy(&x, &was, 4);
            memcpy(&y, &is, 4);
            // Of the 16-bit types only the bits are known here.
            if (slot.element == 2) x = static_cast<float>(was), y = static_cast<float>(is);
            char text[300];
            snprintf(text, sizeof text,
                "'%s' element %zu is %.9g under the schedule %s and %.9g under %s: threads race, or memory is read that "
                "nobody wrote", slot.name, e / slot.element, x, schedule_name(machine.launch->schedules[0]).c_str(), y,
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

#ifndef ATTN2D_EMU_REPLACEMENT
// A test of the tests: ATTN2D_EMU_LIBRARY names a shared object with an emulator and kernels of its own, which are taken before
// ours (tests/cuda_mutations.rs plants faults in them).
using Launch = int (*)(const emu_launch *, char *, size_t);

Launch replacement(const char *kernel) {
    static void *const library = [] {
        const char *path = getenv("ATTN2D_EMU_LIBRARY");
        return path ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : nullptr;
    }();
    if (!library || !dlsym(library, (std::string("attn2d_emu_") + kernel).c_str())) return nullptr;
    return reinterpret_cast<Launch>(dlsym(library, "attn2d_emu_launch"));
}
#endif

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
} // namespace emu

// Runs a launch under each schedule. 0: the written slots have the results. 1: `error` says what went wrong.
extern "C" int attn2d_emu_launch(const emu_launch *launch, char *error, size_t error_bytes) {
    using namespace emu;
#ifndef ATTN2D_EMU_REPLACEMENT
    if (Launch other = replacement(launch->kernel)) return other(launch, error, error_bytes);
#endif
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
