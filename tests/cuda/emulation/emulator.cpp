// SPDX-License-Identifier: MIT
#include "emulator.h"

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {
namespace {

constexpr std::size_t kStackBytes = 256 * 1024;
// What shared memory holds before a block writes it: NaN as floats, -1 as indices.
constexpr int kStaleByte = 0xff;

}  // namespace

#ifdef __x86_64__
// Saves what a call must preserve on the stack, and leaves that stack for the other one: ten times as fast as
// swapcontext, which asks the kernel for the signal mask.
extern "C" void emulation_switch(void** leave, void* resume);
asm(R"(
.text
.globl emulation_switch
emulation_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");
constexpr int kSavedRegisters = 6;
#endif

struct Device::Fiber {
  std::unique_ptr<char[]> stack;
  std::size_t bytes = 0;
  const void* bottom = nullptr;
  void* fake_stack = nullptr;
#ifdef __x86_64__
  void* top = nullptr;
#else
  ucontext_t context;
#endif

  void prepare() {
    if (!stack) {
      bytes = kStackBytes;
      stack.reset(new char[bytes]);
      bottom = stack.get();
    }
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(stack.get(), bytes);  // the last thread here never returned from its frames
#endif
#ifdef __x86_64__
    auto* words = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack.get()) + bytes) & ~uintptr_t{15}) - 2;
    *words = reinterpret_cast<void*>(&Device::enter);
    top = words - kSavedRegisters;
    std::memset(top, 0, kSavedRegisters * sizeof(void*));
#else
    getcontext(&context);
    context.uc_stack.ss_sp = stack.get();
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, &Device::enter, 0);
#endif
  }

  void switch_to(Fiber& other, bool last) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack, other.bottom, other.bytes);
#endif
#ifdef __x86_64__
    emulation_switch(&top, other.top);
#else
    swapcontext(&context, &other.context);
#endif
    arrive();
  }

  void arrive() {
#ifdef __SANITIZE_ADDRESS__
    const void* from = nullptr;
    std::size_t size = 0;
    __sanitizer_finish_switch_fiber(fake_stack, &from, &size);
    Fiber& home = *device().scheduler_;  // its stack is the process's own; the first fiber to run receives its bounds
    if (!home.bottom) home.bottom = from, home.bytes = size;
#endif
  }
};

Device& device() {
  static Device the_device;
  return the_device;
}

void Device::fail(const char* what) {
  const Device& d = device();
  std::fprintf(stderr, "emulation: %s (block %u, thread %u)\n", what, d.block.x, d.thread.x);
  std::fflush(stderr);
  std::abort();
}

void Device::enter() {
  Device& d = device();
  d.fibers_[d.running_]->arrive();
  (*d.body_)();
  ++d.finished_;
  d.resume_next(true);
}

void Device::resume_next(bool finished) {
  Fiber& self = *fibers_[running_];
  if (ready_.empty()) {
    if (finished_ != threads_) fail("not all threads reach a barrier");
    self.switch_to(*scheduler_, finished);
    return;
  }
  const unsigned own = thread.x;
  running_ = thread.x = ready_.front();
  ready_.pop_front();
  if (running_ == own) return;
  self.switch_to(*fibers_[running_], finished);
}

void Device::wait() { resume_next(false); }

void Device::wake(unsigned first, unsigned count) {
  // To the front: a warp runs as far ahead of the others as it may, which is what a missing barrier cannot stand.
  for (unsigned k = count; k-- > 0;) {
    const unsigned t = reversed ? first + count - 1 - k : first + k;
    if (t != thread.x) ready_.push_front(t);
  }
}

int Device::block_barrier(int predicate) {
  count_ += predicate != 0;
  if (++at_barrier_ < threads_) {
    wait();
  } else {
    at_barrier_ = 0;
    last_count_ = count_;
    count_ = 0;
    wake(0, threads_);
  }
  return last_count_;
}

void Device::launch(unsigned blocks, unsigned threads, std::size_t shared_bytes, const std::function<void()>& body) {
  if (threads % kLanes != 0) fail("a block of incomplete warps");
  threads_ = threads;
  body_ = &body;
  if (!scheduler_) scheduler_.reset(new Fiber);
  while (fibers_.size() < threads) fibers_.emplace_back(new Fiber);
  for (unsigned b = 0; b < blocks; ++b) {
    block = {reversed ? blocks - 1 - b : b, 0, 0};
    void* memory = nullptr;
    if (posix_memalign(&memory, 16, shared_bytes ? shared_bytes : 1) != 0) fail("out of memory");
    std::memset(memory, kStaleByte, shared_bytes);
    shared = static_cast<char*>(memory);
    warps_.assign(threads / kLanes, Meeting{});
    run_block();
    std::free(memory);
  }
}

void Device::run_block() {
  finished_ = at_barrier_ = 0;
  count_ = 0;
  ready_.clear();
  for (unsigned t = 0; t < threads_; ++t) {
    fibers_[t]->prepare();
    ready_.push_back(reversed ? threads_ - 1 - t : t);
  }
  running_ = thread.x = ready_.front();
  ready_.pop_front();
  scheduler_->switch_to(*fibers_[running_], false);
}

}  // namespace emulation
