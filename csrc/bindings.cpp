// The door to Python. Knows no torch. Arguments were checked by hf_tiered_cache/kernels/ops.py;
// here only what Python cannot see cheaply.
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "attention_worker.h"
#include "block_io.h"
#include "packed_blocks.h"
#include "paged_attention.h"
#include "python_arguments.h"
#include "xxh3.h"

namespace py = pybind11;
using hf_tiered_cache::AppendParams;
using hf_tiered_cache::AttentionJob;
using hf_tiered_cache::AttentionParams;
using hf_tiered_cache::AttentionWorker;
using hf_tiered_cache::BlockIO;
using hf_tiered_cache::FinishParams;
using hf_tiered_cache::KernelChoice;
using hf_tiered_cache::Kernels;
using hf_tiered_cache::Move;
using hf_tiered_cache::PackParams;
using hf_tiered_cache::Packing;
using hf_tiered_cache::pointer;

namespace {

const Kernels& kernels_numbered(int number) {
  const KernelChoice choice = hf_tiered_cache::kernel_choice(number);
  if (choice.reason != nullptr) throw std::invalid_argument(choice.reason);
  return *choice.kernels;
}

// A Python function of the arguments of `attention_params`; runs without the interpreter lock.
template <class Run>
auto with_params(Run run) {
  return [run](int kernel, int dtype, int64_t query, const py::tuple& query_shape,
               const py::tuple& query_stride, const py::tuple& view, int64_t kv_tokens,
               int64_t query_start, bool causal, float scale, float softcap, int64_t starts,
               const py::object& mask, const py::object& state, const py::object& out,
               int num_threads) {
    AttentionParams p = hf_tiered_cache::attention_params(
        dtype, query, query_shape, query_stride, view, kv_tokens, query_start, causal, scale,
        softcap, starts, mask, state, out);
    p.num_threads = num_threads;
    p.has_prefetch = hf_tiered_cache::wants_prefetch();
    const Kernels& chosen = kernels_numbered(kernel);
    py::gil_scoped_release unlocked;
    hf_tiered_cache::check_slots(p);
    return run(chosen, p);
  };
}

py::list kernels() {
  py::list names;
  for (int i = 0; i < hf_tiered_cache::num_kernels(); ++i) {
    const KernelChoice choice = hf_tiered_cache::kernel_choice(i);
    names.append(py::make_tuple(choice.name, choice.reason == nullptr ? "" : choice.reason));
  }
  return names;
}

// The shape of a block that is packed: (kv_heads, block_tokens, key_dim, value_dim).
PackParams pack_params(const py::tuple& shape) {
  const auto n = hf_tiered_cache::integers<4>(shape);
  const int64_t most_dim = hf_tiered_cache::kMostPackedDim;
  const int64_t dim = std::max(n[2], n[3]);
  if (std::min({n[0], n[1], n[2], n[3]}) < 1 || dim > most_dim ||
      n[1] * dim > hf_tiered_cache::kMostPackedValues) {
    throw std::invalid_argument("blocks of such a shape cannot be packed");
  }
  return {n[0], n[1], n[2], n[3]};
}

// What `record_bytes` become in the file: (kernel, shape, bytes there), or None.
Packing packing_of(const py::object& given) {
  if (given.is_none()) return {};
  const auto arguments = py::reinterpret_borrow<py::tuple>(given);
  return {&kernels_numbered(arguments[0].cast<int>()),
          pack_params(arguments[1].cast<py::tuple>()), arguments[2].cast<std::size_t>()};
}

// The move of `addresses.size()` records of `record_bytes` in memory from, or to, `offset`.
std::shared_ptr<Move> new_move(bool is_write, int fd, int64_t offset, int64_t record_bytes,
                               const std::vector<int64_t>& addresses, bool is_direct,
                               std::vector<std::shared_ptr<Move>> after,
                               const py::object& packing) {
  std::vector<iovec> records;
  for (int64_t address : addresses) {
    records.push_back({pointer<void>(address), static_cast<size_t>(record_bytes)});
  }
  auto move = std::make_shared<Move>(std::move(records), is_write, is_direct, packing_of(packing));
  move->fd = fd;
  move->offset = offset;
  move->after = std::move(after);
  return move;
}

// As `time.perf_counter` counts: both are the monotonic clock.
double seconds(std::chrono::steady_clock::time_point time) {
  return std::chrono::duration<double>(time.time_since_epoch()).count();
}

py::list checksums(const Move& move) {
  py::list list;
  if (move.error != 0) return list;
  for (const auto& checksum : move.checksums) {
    list.append(py::bytes(reinterpret_cast<const char*>(checksum.data()), checksum.size()));
  }
  return list;
}

// Called through hf_tiered_cache/tiers/disk/movers.py. The threads never need the interpreter lock.
void bind_block_io(py::module_& m) {
  m.attr("END_OF_FILE") = hf_tiered_cache::kEndOfFile;
  m.attr("CANCELLED") = hf_tiered_cache::kCancelled;
  m.attr("UNPACKABLE") = hf_tiered_cache::kUnpackable;

  py::class_<Move, std::shared_ptr<Move>>(m, "Move")
      .def(py::init(&new_move), py::kw_only(), py::arg("is_write"), py::arg("fd"),
           py::arg("offset"), py::arg("record_bytes"), py::arg("addresses"), py::arg("is_direct"),
           py::arg("after"), py::arg("packing") = py::none())
      .def_property_readonly(
          "is_done", [](const Move& move) { return move.is_done.load(std::memory_order_acquire); })
      .def_readonly("error", &Move::error)
      .def_readonly("error_offset", &Move::error_offset)
      .def_property_readonly("began", [](const Move& move) { return seconds(move.began); })
      .def_property_readonly("ended", [](const Move& move) { return seconds(move.ended); })
      .def_property_readonly("checksums", &checksums);

  using Unlocked = py::call_guard<py::gil_scoped_release>;
  py::class_<BlockIO>(m, "BlockIO")
      .def(py::init<int>())
      .def("enter", &BlockIO::enter, Unlocked())
      .def("leave", &BlockIO::leave, Unlocked())
      .def_property_readonly("num_threads", &BlockIO::num_threads)
      .def("submit", &BlockIO::submit, Unlocked())
      .def("cancel", &BlockIO::cancel, Unlocked())
      .def(
          "wait",
          [](BlockIO& io, const Move& move, double timeout_seconds) {
            return io.wait(move, std::chrono::duration<double>(timeout_seconds));
          },
          Unlocked());

  m.def(
      "xxh3_128",
      [](int64_t address, int64_t num_bytes) {
        if (num_bytes <= 240) throw std::invalid_argument("xxh3_128 of 240 bytes or fewer");
        unsigned char out[16];
        hf_tiered_cache::xxh3_128(pointer<const void>(address), static_cast<size_t>(num_bytes),
                                  out);
        return py::bytes(reinterpret_cast<const char*>(out), sizeof out);
      },
      "The checksum of a record in memory (for tests).");
}

// Called through hf_tiered_cache/tiers/codecs/bf16_12bit.py.
void bind_packing(py::module_& m) {
  m.def(
      "pack",
      [](int kernel, const py::tuple& shape, int64_t raw, int64_t packed) {
        const Kernels& chosen = kernels_numbered(kernel);
        const PackParams params = pack_params(shape);
        py::gil_scoped_release unlocked;
        return chosen.pack(params, pointer<const uint8_t>(raw), pointer<uint8_t>(packed));
      },
      "Pack a block of bfloat16; False, and what is at `packed` is undefined, if it cannot be.");

  m.def(
      "unpack",
      [](int kernel, const py::tuple& shape, int64_t packed, int64_t raw) {
        const Kernels& chosen = kernels_numbered(kernel);
        const PackParams params = pack_params(shape);
        py::gil_scoped_release unlocked;
        chosen.unpack(params, pointer<const uint8_t>(packed), pointer<uint8_t>(raw));
      },
      "Unpack what `pack` packed.");
}

// The job of attending `views` one after the other, as `attend` attends one.
std::shared_ptr<AttentionJob> new_job(int kernel, int dtype, int64_t query,
                                      const py::tuple& query_shape, const py::tuple& query_stride,
                                      const std::vector<py::tuple>& views, int64_t kv_tokens,
                                      int64_t query_start, bool causal, float scale, float softcap,
                                      const py::object& state, int num_threads, int64_t ready,
                                      int64_t done, uint32_t value) {
  auto job = std::make_shared<AttentionJob>();
  job->kernels = &kernels_numbered(kernel);
  for (const py::tuple& view : views) {
    AttentionParams p = hf_tiered_cache::attention_params(
        dtype, query, query_shape, query_stride, view, kv_tokens, query_start, causal, scale,
        softcap, 0, py::none(), state, py::none());
    p.num_threads = num_threads;
    p.has_prefetch = hf_tiered_cache::wants_prefetch();
    hf_tiered_cache::check_slots(p);
    job->calls.push_back(p);
  }
  const auto shape = hf_tiered_cache::integers<4>(query_shape);
  job->num_rows = shape[0] * shape[1] * shape[2];
  job->value_dim = views.empty() ? 0 : job->calls.front().view.value_dim;
  job->state = hf_tiered_cache::state_rows(state);
  job->ready = {pointer<uint32_t>(ready), value};
  job->done = {pointer<uint32_t>(done), value};
  return job;
}

// Called through hf_tiered_cache/kernels/worker.py. The thread never needs the interpreter lock.
void bind_attention_worker(py::module_& m) {
  py::class_<AttentionJob, std::shared_ptr<AttentionJob>>(m, "AttentionJob")
      .def(py::init(&new_job), py::kw_only(), py::arg("kernel"), py::arg("dtype"),
           py::arg("query"), py::arg("query_shape"), py::arg("query_stride"), py::arg("views"),
           py::arg("kv_tokens"), py::arg("query_start"), py::arg("causal"), py::arg("scale"),
           py::arg("softcap"), py::arg("state"), py::arg("num_threads"), py::arg("ready"),
           py::arg("done"), py::arg("value"))
      .def_property_readonly(
          "is_done",
          [](const AttentionJob& job) { return job.is_done.load(std::memory_order_acquire); })
      .def_readonly("was_cancelled", &AttentionJob::was_cancelled)
      .def_readonly("error", &AttentionJob::error)
      .def_readonly("seconds", &AttentionJob::seconds);

  using Unlocked = py::call_guard<py::gil_scoped_release>;
  py::class_<AttentionWorker>(m, "AttentionWorker")
      .def(py::init<>())
      .def("submit", &AttentionWorker::submit)
      .def("wait", &AttentionWorker::wait, Unlocked())
      .def("close", &AttentionWorker::close, Unlocked());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled core of hf_tiered_cache; call it through hf_tiered_cache.kernels.ops.";

  m.def("kernels", &kernels,
        "[(name, reason)] of every known kernel, the preferred first; reason '' if it runs here.");

  m.def("attend", with_params([](const Kernels& chosen, const AttentionParams& p) {
          chosen.attend(p);
        }),
        "Attend the blocks of a table into `state` (acc, max, sum) or into `out` (address, 4 "
        "strides, lse, sinks). Raises ValueError for a slot outside the slab, before anything is "
        "written.");

  m.def("read_probe", with_params([](const Kernels& chosen, const AttentionParams& p) {
          return chosen.read_probe(p);
        }),
        "Read the planes that `attend` would read and do nothing with them (for benchmarks).");

  m.def(
      "finish",
      [](int kernel, int dtype, const py::tuple& shape, const py::object& state,
         const py::object& out, int num_threads) {
        FinishParams p = hf_tiered_cache::finish_params(dtype, shape, state, out);
        p.num_threads = num_threads;
        const Kernels& chosen = kernels_numbered(kernel);
        py::gil_scoped_release unlocked;
        chosen.finish(p);
      },
      "Normalise a running state into `out` (address, 4 strides, lse, sinks).");

  m.def(
      "append",
      [](int64_t keys, const py::tuple& key_shape, const py::tuple& key_stride, int64_t values,
         const py::tuple& value_stride, const py::tuple& view, int64_t start_token,
         int num_threads) {
        AppendParams p = hf_tiered_cache::append_params(keys, key_shape, key_stride, values,
                                                        value_stride, view, start_token);
        p.num_threads = num_threads;
        py::gil_scoped_release unlocked;
        hf_tiered_cache::append_tokens(p);
      },
      "Write new tokens into their blocks. Raises ValueError for a slot outside the slab, before "
      "anything is written.");

  bind_attention_worker(m);
  bind_packing(m);
  bind_block_io(m);
}
