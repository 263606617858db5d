// SPDX-License-Identifier: MIT
// Runs ops on request: reads calls from standard input, writes results to standard output, until the input ends.
//
//   call    op, number of integers, the integers, number of buffers, and for each: bytes (-1: a null pointer),
//           bytes that its address is past a multiple of 16, and its contents
//   result  0, number of integers, the integers, and the contents of the buffers that were not null;
//           or 1, the length of a message, and the message
// All numbers are int64.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../../csrc/common/match_config.h"
#include "../../../csrc/common/order.h"
#include "../../../csrc/common/row_config.h"
#include "../../../csrc/common/slots.h"
#include "../../../csrc/cuda/ops.h"

namespace {

using namespace tokred;

void read(void* to, std::size_t bytes) {
  if (bytes && std::fread(to, 1, bytes, stdin) != bytes) std::exit(0);
}

void write(const void* from, std::size_t bytes) { std::fwrite(from, 1, bytes, stdout); }

int64_t read_number() {
  int64_t number;
  read(&number, sizeof number);
  return number;
}

void write_number(int64_t number) { write(&number, sizeof number); }

// Memory that ends where the buffer does, so that the address sanitizer sees the first byte beyond.
struct Buffer {
  std::unique_ptr<char, void (*)(void*)> memory{nullptr, std::free};
  char* data = nullptr;
  int64_t bytes = -1;
};

Buffer read_buffer() {
  Buffer b;
  b.bytes = read_number();
  const int64_t offset = read_number();
  if (b.bytes < 0) return b;
  void* memory = nullptr;
  if (posix_memalign(&memory, 16, b.bytes + offset > 0 ? b.bytes + offset : 1) != 0) std::abort();
  b.memory.reset(static_cast<char*>(memory));
  b.data = b.memory.get() + offset;
  read(b.data, b.bytes);
  return b;
}

struct Call {
  std::vector<int64_t> integers;
  std::vector<Buffer> buffers;
  std::size_t next_integer = 0, next_buffer = 0;

  int64_t integer() { return integers.at(next_integer++); }
  int32_t small() { return static_cast<int32_t>(integer()); }
  template <class T = void>
  T* buffer() {
    return reinterpret_cast<T*>(buffers.at(next_buffer++).data);
  }
};

Partition partition(Call& c) {
  Partition p{};
  p.sources = c.buffer<int32_t>(), p.destinations = c.buffer<int32_t>();
  p.first = c.small(), p.stride = c.small(), p.num_src = c.small(), p.num_dst = c.small();
  p.protected_src = c.small(), p.protected_dst = c.small(), p.sources_by_index = c.small(), p.r = c.small();
  return p;
}

Windows windows(Call& c) {
  Windows w{};
  w.first = c.small(), w.grid_height = c.small(), w.grid_width = c.small();
  w.height = c.small(), w.width = c.small();
  return w;
}

template <class Args>
Args match_args(Call& c) {
  Args a{};
  a.metric = c.buffer(), a.starts = c.buffer<int32_t>();
  a.stride_b = c.integer(), a.stride_h = c.integer(), a.stride_n = c.integer();
  a.images = c.integer(), a.heads = c.integer(), a.tokens = c.integer(), a.channels = c.integer();
  a.dtype = static_cast<DType>(c.integer());
  a.partition = partition(c);
  return a;
}

// The four outputs of every map.
template <class Args>
void map_outputs(Call& c, Args& a) {
  a.dest = c.buffer<int32_t>(), a.members = c.buffer<int32_t>();
  a.begin = c.buffer<int32_t>(), a.count = c.buffer<int32_t>();
}

using Result = std::vector<int64_t>;

// Device memory that a launch must fill before it reads it, exactly as large as it was asked for.
std::unique_ptr<char[]> workspace(std::size_t bytes) {
  if (bytes == 0) return nullptr;
  std::unique_ptr<char[]> memory(new char[bytes]);
  std::memset(memory.get(), 0xff, bytes);
  return memory;
}

Result bipartite_match(Call& c) {
  auto a = match_args<MatchArgs>(c);
  map_outputs(c, a);
  const auto memory = workspace(cuda::match_workspace_bytes(a));
  a.workspace = memory.get();
  cuda::bipartite_match(a, nullptr);
  return {};
}

Result rank_candidates(Call& c) {
  auto a = match_args<BestMatchArgs>(c);
  a.score = c.buffer<float>(), a.partner = c.buffer<int32_t>(), a.rank = c.buffer<int32_t>();
  const auto memory = workspace(cuda::rank_candidates_workspace_bytes(a));
  a.workspace = memory.get();
  cuda::rank_candidates(a, nullptr);
  return {};
}

Result build_match_map(Call& c) {
  MatchMapArgs a{};
  a.partner = c.buffer<int32_t>(), a.rank = c.buffer<int32_t>();
  a.images = c.integer(), a.tokens = c.integer(), a.num_out = c.integer();
  a.partition = partition(c);
  a.counts = c.buffer<int32_t>();
  a.starts_in = c.buffer<int32_t>(), a.starts_out = c.buffer<int32_t>();
  map_outputs(c, a);
  cuda::build_match_map(a, nullptr);
  return {};
}

// The threshold and the divisor come as doubles in a buffer.
Result count_above_threshold(Call& c) {
  SimilarCountArgs a{};
  a.score = c.buffer<float>();
  const auto* numbers = c.buffer<double>();
  a.threshold = numbers[0], a.divisor = numbers[1];
  a.moments = c.buffer<double>(), a.counts = c.buffer<int32_t>();
  a.images = c.integer(), a.sources = c.integer(), a.own = c.small();
  cuda::count_above_threshold(a, nullptr);
  return {};
}

// The threshold comes as a float in a buffer.
Result window_similarity(Call& c) {
  WindowSimilarityArgs a{};
  a.x = c.buffer(), a.threshold = *c.buffer<float>();
  a.score = c.buffer<float>(), a.counts = c.buffer<int32_t>();
  a.stride_b = c.integer(), a.stride_n = c.integer();
  a.images = c.integer(), a.channels = c.integer();
  a.dtype = static_cast<DType>(c.integer());
  a.windows = windows(c);
  cuda::window_similarity(a, nullptr);
  return {};
}

Result window_map(Call& c) {
  WindowMapArgs a{};
  a.score = c.buffer<float>();
  a.counts = c.buffer<int32_t>(), a.starts_out = c.buffer<int32_t>();
  map_outputs(c, a);
  a.images = c.integer(), a.r = c.small();
  a.windows = windows(c);
  cuda::window_map(a, nullptr);
  return {};
}

Result keep_topk(Call& c) {
  KeepTopkArgs a{};
  a.score = c.buffer<float>();
  map_outputs(c, a);
  a.stride = c.integer(), a.images = c.integer(), a.tokens = c.integer();
  a.first = c.small(), a.k = c.small(), a.fuse = c.small();
  cuda::keep_topk(a, nullptr);
  return {};
}

Result match_config_of(Call& c) {
  const auto a = match_args<MatchArgs>(c);
  const MatchConfig config = match_config(a, c.integer());
  return {config.fused, static_cast<int64_t>(config.resident), config.shared_bytes, config.splits,
          static_cast<int64_t>(candidate_bytes(config, a.images, a.partition.num_src))};
}

Result to_csr(Call& c) {
  cuda::to_csr({c.buffer<int32_t>(), c.integers[0], c.integers[1], c.integers[2], c.buffer<int32_t>(),
                c.buffer<int32_t>(), c.buffer<int32_t>()},
               nullptr);
  return {};
}

Result compose(Call& c) {
  cuda::compose(
      {c.buffer<int32_t>(), c.buffer<int32_t>(), c.integers[0], c.integers[1], c.integers[2], c.buffer<int32_t>()},
      nullptr);
  return {};
}

Result merge(Call& c) {
  MergeArgs a{};
  a.x = c.buffer(), a.weight = c.buffer();
  a.members = c.buffer<int32_t>(), a.begin = c.buffer<int32_t>(), a.count = c.buffer<int32_t>();
  a.y = c.buffer(), a.weight_sum = c.buffer();
  a.x_stride = c.integer(), a.rows_out = c.integer(), a.channels = c.integer();
  a.dtype = static_cast<DType>(c.integer()), a.reduce = static_cast<Reduce>(c.integer());
  cuda::merge(a, nullptr);
  return {};
}

Result merge_backward(Call& c) {
  MergeBackwardArgs a{};
  a.grad_y = c.buffer(), a.grad_weight_sum = c.buffer(), a.x = c.buffer(), a.y = c.buffer();
  a.weight = c.buffer(), a.weight_sum = c.buffer();
  a.dest = c.buffer<int32_t>(), a.members = c.buffer<int32_t>();
  a.begin = c.buffer<int32_t>(), a.count = c.buffer<int32_t>();
  a.grad_x = c.buffer(), a.grad_weight = c.buffer();
  a.x_stride = c.integer(), a.images = c.integer(), a.tokens = c.integer(), a.num_out = c.integer();
  a.channels = c.integer();
  a.dtype = static_cast<DType>(c.integer()), a.reduce = static_cast<Reduce>(c.integer());
  cuda::merge_backward(a, nullptr);
  return {};
}

Result unmerge(Call& c) {
  UnmergeArgs a{};
  a.y = c.buffer(), a.dest = c.buffer<int32_t>(), a.x = c.buffer();
  a.y_stride = c.integer(), a.images = c.integer(), a.tokens = c.integer(), a.num_out = c.integer();
  a.channels = c.integer();
  a.dtype = static_cast<DType>(c.integer());
  cuda::unmerge(a, nullptr);
  return {};
}

void strides(Call& c, int64_t (&to)[3]) {
  for (int64_t& stride : to) stride = c.integer();
}

// The scale comes as a double in a buffer.
template <class Args>
Args lookup_args(Call& c) {
  Args a{};
  a.scale = *c.buffer<double>();
  a.q = c.buffer(), a.k = c.buffer(), a.v = c.buffer();
  a.images = c.integer(), a.heads = c.integer(), a.compressed = c.integer(), a.tokens = c.integer();
  a.channels = c.integer(), a.dtype = static_cast<DType>(c.integer());
  strides(c, a.q_strides), strides(c, a.k_strides), strides(c, a.v_strides);
  return a;
}

Result lookup_gather(Call& c) {
  auto a = lookup_args<LookupGatherArgs>(c);
  a.out = c.buffer(), a.lse = c.buffer();
  cuda::lookup_gather(a, nullptr);
  return {};
}

Result lookup_gather_backward(Call& c) {
  auto a = lookup_args<LookupGatherBackwardArgs>(c);
  strides(c, a.grad_out_strides);
  a.grad_out = c.buffer(), a.grad_lse = c.buffer(), a.out = c.buffer(), a.lse = c.buffer();
  a.grad_q = c.buffer(), a.grad_k = c.buffer(), a.grad_v = c.buffer();
  cuda::lookup_gather_backward(a, nullptr);
  return {};
}

Result lookup_scatter(Call& c) {
  auto a = lookup_args<LookupScatterArgs>(c);
  a.lse = c.buffer(), a.out = c.buffer();
  cuda::lookup_scatter(a, nullptr);
  return {};
}

Result lookup_scatter_backward(Call& c) {
  auto a = lookup_args<LookupScatterBackwardArgs>(c);
  strides(c, a.grad_out_strides);
  a.grad_out = c.buffer(), a.lse = c.buffer();
  a.grad_q = c.buffer(), a.grad_k = c.buffer(), a.grad_v = c.buffer(), a.grad_lse = c.buffer();
  cuda::lookup_scatter_backward(a, nullptr);
  return {};
}

// Key, then packed and unpacked index, of each float.
Result order(Call& c) {
  const auto* values = c.buffer<float>();
  Result result;
  for (int32_t i = 0; i < c.integers[0]; ++i) {
    const uint64_t candidate = pack_candidate(values[i], i);
    if (candidate_key(candidate) != ordered_key(values[i])) throw std::logic_error("the key was not packed");
    if (key_score(ordered_key(values[i])) != values[i]) throw std::logic_error("the key has lost its score");
    result.push_back(ordered_key(values[i]));
    result.push_back(candidate_index(candidate));
  }
  return result;
}

Result row_config_of(Call& c) {
  const RowConfig config =
      row_config(c.integers[0], static_cast<int>(c.integers[1]), static_cast<uintptr_t>(c.integers[2]));
  return {config.vector_bytes, config.vectors, config.lanes_log2, config.rows_per_block};
}

Result window_config_of(Call& c) {
  const Windows w = windows(c);
  const int64_t channels = c.integer();
  const int element_bytes = c.small();
  const WindowConfig config = window_config(w, channels, element_bytes, static_cast<uintptr_t>(c.integer()));
  return {config.units, 1 << config.lanes_log2, config.windows_per_block, config.blocks_per_image, config.whole};
}

constexpr Result (*kOps[])(Call&) = {
    bipartite_match,   rank_candidates,
    build_match_map,   count_above_threshold,
    window_similarity, window_map,
    keep_topk,         to_csr,
    compose,           merge,
    merge_backward,    unmerge,
    lookup_gather,     lookup_gather_backward,
    lookup_scatter,    lookup_scatter_backward,
    match_config_of,   order,
    row_config_of,     window_config_of,
};

// What comes first in every call: the op, the shared memory of a block, and whether threads run in reverse.
void serve() {
  const int64_t op = read_number();
  emulation::device().shared_limit = static_cast<int>(read_number());
  emulation::device().reversed = read_number() != 0;
  Call call;
  call.integers.resize(read_number());
  for (int64_t& number : call.integers) number = read_number();
  call.buffers.resize(read_number());
  for (Buffer& buffer : call.buffers) buffer = read_buffer();
  try {
    const Result result = kOps[op](call);
    write_number(0);
    write_number(static_cast<int64_t>(result.size()));
    for (int64_t number : result) write_number(number);
    for (const Buffer& b : call.buffers) {
      if (b.bytes > 0) write(b.data, b.bytes);
    }
  } catch (const std::exception& error) {
    const std::string message = error.what();
    write_number(1);
    write_number(static_cast<int64_t>(message.size()));
    write(message.data(), message.size());
  }
  std::fflush(stdout);
}

}  // namespace

int main() {
  for (;;) serve();
}
