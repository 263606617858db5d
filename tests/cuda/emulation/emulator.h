// SPDX-License-Identifier: MIT
// Runs kernels on the host, a block after another, each thread on a separate stack. A thread runs until it waits for
// others (at a barrier, or in a function of the whole warp), and then the next one does: slow and sequential, but the
// barriers are real, a missing one shows (run both orders), and so does one that not all threads reach.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <typeinfo>
#include <vector>

namespace emulation {

constexpr int kLanes = 32;
constexpr unsigned kFullWarp = 0xffffffffu;
// Bytes of static shared memory assumed for a kernel that has dynamic shared memory.
constexpr std::size_t kStaticShared = 128;
// The largest value that the threads of a warp exchange: a lane's share of three matrices.
constexpr std::size_t kExchangeBytes = 64;

struct Index {
  unsigned x, y, z;
};

// Where the lanes of a warp meet.
struct Meeting {
  int arrived = 0;
  const std::type_info* kind = nullptr;
  alignas(64) unsigned char in[kLanes * kExchangeBytes];
  alignas(64) unsigned char out[kLanes * kExchangeBytes];
};

class Device {
 public:
  Index thread{}, block{};
  int shared_limit = 0;    // dynamic shared memory that a block may have, in bytes
  bool reversed = false;   // run blocks and threads from the last to the first
  char* shared = nullptr;  // dynamic shared memory of the running block, exactly as large as was asked for

  void launch(unsigned blocks, unsigned threads, std::size_t shared_bytes, const std::function<void()>& body);
  // Waits for all threads of the block; how many brought a nonzero predicate.
  int block_barrier(int predicate);
  Meeting& meeting() { return warps_[thread.x / kLanes]; }
  void wait();                                // lets others run until this thread is woken
  void wake(unsigned first, unsigned count);  // all of them but the running thread
  [[noreturn]] static void fail(const char* what);

 private:
  struct Fiber;
  void run_block();
  void resume_next(bool finished);
  static void enter();

  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Meeting> warps_;
  std::deque<unsigned> ready_;
  std::unique_ptr<Fiber> scheduler_;
  const std::function<void()>* body_ = nullptr;
  unsigned threads_ = 0, running_ = 0, finished_ = 0, at_barrier_ = 0;
  int count_ = 0, last_count_ = 0;
};

Device& device();

// Every lane brings a value; when all have, lane l gets answer(values of all lanes, l).
template <class In, class Out, class Answer>
Out exchange(unsigned mask, const In& value, Answer answer) {
  static_assert(sizeof(In) <= kExchangeBytes && sizeof(Out) <= kExchangeBytes);
  Device& d = device();
  if (mask != kFullWarp) Device::fail("a warp function without all of the warp");
  Meeting& m = d.meeting();
  const int lane = d.thread.x % kLanes;
  if (m.arrived == 0) m.kind = &typeid(Answer);
  if (*m.kind != typeid(Answer)) Device::fail("the lanes of a warp wait in different functions");
  std::memcpy(m.in + lane * sizeof(In), &value, sizeof(In));
  if (++m.arrived < kLanes) {
    d.wait();
  } else {
    m.arrived = 0;
    for (int l = 0; l < kLanes; ++l) {
      const Out out = answer(reinterpret_cast<const In*>(m.in), l);
      std::memcpy(m.out + l * sizeof(Out), &out, sizeof(Out));
    }
    d.wake(d.thread.x - lane, kLanes);
  }
  Out out;
  std::memcpy(&out, m.out + lane * sizeof(Out), sizeof(Out));
  return out;
}

inline void warp_barrier() {
  exchange<char, char>(kFullWarp, 0, [](const char*, int) { return char{}; });
}

}  // namespace emulation
