// Calls of operators without Python. What a launcher decided for one call is kept, by all that it could look at: dtypes,
// sizes and strides of tensors, which of them are there, every other argument, the number of threads, and the launchers.
// An equal call gets new results, puts the addresses of its tensors into the packed arguments, and goes to the kernel.
// Every other call is Python's, and so are those that a kernel refuses, and everything that is an error.
#pragma once
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

namespace ec {

using Words = c10::SmallVector<int64_t, 192>;
using Entry = int64_t (*)(const void*);

// More plans than a program has calls of few rows; then all of them are made again.
inline constexpr size_t PLANS = 4096;

// What Python says of all operators: whether none may be served by a plan now, and which launchers there are.
struct State {
  int64_t held, launchers;
};

// All that a launcher may look at. False if there is something among the arguments that is not known here.
inline bool describe(const State& state, const c10::IValue* args, size_t count, Words& words) {
  words.append({state.launchers, at::get_num_threads()});
  for (size_t i = 0; i < count; ++i) {
    const c10::IValue& arg = args[i];
    if (arg.isTensor()) {
      const at::Tensor& t = arg.toTensor();
      if (!t.defined() || !t.device().is_cpu() || t.layout() != at::kStrided) return false;
      words.push_back(1);
      words.push_back(static_cast<int64_t>(t.scalar_type()));
      words.push_back(t.dim());
      words.append(t.sizes().begin(), t.sizes().end());
      words.append(t.strides().begin(), t.strides().end());
    } else if (arg.isNone()) {
      words.push_back(0);
    } else if (arg.isInt()) {
      words.append({2, arg.toInt()});
    } else if (arg.isBool()) {
      words.append({3, arg.toBool()});
    } else if (arg.isDouble()) {
      const double given = arg.toDouble();
      int64_t bits;
      std::memcpy(&bits, &given, sizeof bits);
      words.append({4, bits});
    } else if (arg.isString()) {
      const std::string_view text = arg.toStringView();
      const size_t begin = words.size() + 2, room = (text.size() + 7) / 8;
      words.append({5, static_cast<int64_t>(text.size())});
      words.resize(begin + room, 0);
      std::memcpy(words.data() + begin, text.data(), text.size());
    } else {
      return false;
    }
  }
  return true;
}

inline uint64_t hash_of(const Words& words) {
  uint64_t hash = words.size();
  for (const int64_t word : words) {
    hash = (hash ^ static_cast<uint64_t>(word)) * 0x9E3779B97F4A7C15u;
    hash ^= hash >> 32;
  }
  return hash;
}

// Where an address goes: word `word` of the packed arguments is that of argument `from`, or of result -1 - `from`.
struct Pointer {
  int64_t word, from;
};

struct Result {
  at::ScalarType dtype;
  std::vector<int64_t> sizes;
};

struct Plan {
  Words facts;
  Entry entry = nullptr;
  std::vector<int64_t> packed;
  std::vector<Pointer> pointers;
  std::vector<Result> results;
};

inline int64_t address_of(const c10::IValue& value) {
  return value.isTensor() ? reinterpret_cast<int64_t>(value.toTensor().data_ptr()) : 0;
}

// A call that Python is making, and what its launcher has offered.
struct Call {
  std::string_view op;
  std::vector<int64_t> addresses;
  std::unique_ptr<Plan> plan;
};

inline thread_local Call* current = nullptr;

class Replay final : public c10::OperatorKernel {
 public:
  Replay(std::string name, c10::SafeKernelFunction python, const State* state)
      : name_(std::move(name)), python_(std::move(python)), state_(state) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
    const size_t count = op.schema().arguments().size();
    Words facts;
    if (state_->held || !describe(*state_, stack->data() + stack->size() - count, count, facts))
      return python_.callBoxed(op, keys, stack);
    const uint64_t hash = hash_of(facts);
    const std::shared_ptr<const Plan> plan = find(hash, facts);
    if (plan && run(*plan, count, stack)) {
      ++replayed_;
      return;
    }

    Call call{name_, {}, nullptr};
    for (size_t i = stack->size() - count; i < stack->size(); ++i) call.addresses.push_back(address_of((*stack)[i]));
    {
      struct Within {
        Call* before;
        explicit Within(Call* now) : before(std::exchange(current, now)) {}
        ~Within() { current = before; }
      } within(&call);
      python_.callBoxed(op, keys, stack);
    }
    if (call.plan && finish(*call.plan, op.schema().returns().size(), *stack)) {
      call.plan->facts = std::move(facts);
      keep(hash, std::move(call.plan));
    }
  }

  // Calls that went to a kernel without Python.
  int64_t replayed() const { return replayed_; }

 private:
  std::shared_ptr<const Plan> find(uint64_t hash, const Words& facts) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = plans_.find(hash);
    if (found == plans_.end() || found->second->facts != facts) return nullptr;
    return found->second;
  }

  void keep(uint64_t hash, std::shared_ptr<const Plan> plan) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (plans_.size() >= PLANS) plans_.clear();
    plans_[hash] = std::move(plan);
  }

  // False, with the stack as it was, if the kernel refuses.
  static bool run(const Plan& plan, size_t count, torch::jit::Stack* stack) {
    const c10::IValue* args = stack->data() + stack->size() - count;
    c10::SmallVector<int64_t, 64> packed(plan.packed.begin(), plan.packed.end());
    c10::SmallVector<at::Tensor, 2> results;
    for (const Result& result : plan.results) results.emplace_back(at::detail::empty_cpu(result.sizes, result.dtype));
    for (const auto [word, from] : plan.pointers)
      packed[word] = from >= 0 ? address_of(args[from]) : reinterpret_cast<int64_t>(results[-1 - from].data_ptr());
    if (plan.entry(packed.data())) return false;
    torch::jit::drop(*stack, count);
    for (at::Tensor& result : results) stack->emplace_back(std::move(result));
    return true;
  }

  // What the results are, from those of the call. False if they are not where the arguments say.
  static bool finish(Plan& plan, size_t returns, const torch::jit::Stack& stack) {
    std::vector<int64_t> addresses;
    for (size_t i = stack.size() - returns; i < stack.size(); ++i) {
      if (!stack[i].isTensor() || !stack[i].toTensor().is_contiguous()) return false;
      const at::Tensor& result = stack[i].toTensor();
      plan.results.push_back({result.scalar_type(), result.sizes().vec()});
      addresses.push_back(address_of(stack[i]));
    }
    size_t found = 0;
    for (const auto [word, from] : plan.pointers) {
      if (from >= 0) continue;
      if (static_cast<size_t>(-from) > returns || plan.packed[word] != addresses[-1 - from]) return false;
      ++found;
    }
    return found == returns;
  }

  const std::string name_;
  const c10::SafeKernelFunction python_;
  const State* const state_;
  std::mutex mutex_;
  std::unordered_map<uint64_t, std::shared_ptr<const Plan>> plans_;
  std::atomic<int64_t> replayed_ = 0;
};

// Of the call that this thread is making for `op`: the kernel, and the arguments that it was given. A word that is not the
// address of its argument is that of a copy, which another call would have to make again: nothing is kept then.
inline void offer(const char* op, Entry entry, const int64_t* packed, int64_t words, const Pointer* pointers,
                  int64_t count) {
  if (!current || current->op != op) return;
  auto plan = std::make_unique<Plan>();
  plan->entry = entry;
  plan->packed.assign(packed, packed + words);
  for (int64_t i = 0; i < count; ++i) {
    const auto [word, from] = pointers[i];
    if (word >= words || from >= static_cast<int64_t>(current->addresses.size())) return;
    if (from >= 0 && packed[word] != current->addresses[from]) return;
    plan->pointers.push_back(pointers[i]);
  }
  current->plan = std::move(plan);
}

// Puts itself in front of what serves `op` on CPUs until now. Lives as long as the process, as the operators do.
inline Replay* install(const char* op, const State* state) {
  static auto* library = new torch::Library(torch::Library::IMPL, "effcompile", c10::DispatchKey::CPU, __FILE__, __LINE__);
  const auto handle = c10::Dispatcher::singleton().findSchemaOrThrow((std::string("effcompile::") + op).c_str(), "");
  auto python = handle.getComputedKernelForDispatchKey(c10::DispatchKey::CPU);
  auto replay = std::make_unique<Replay>(op, std::move(python), state);
  Replay* const kept = replay.get();
  library->impl(op, torch::CppFunction::makeFromBoxedFunctor(std::move(replay)));
  return kept;
}

}  // namespace ec
