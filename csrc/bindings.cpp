// The door to Python: integers to pointers, tuples to structs. Knows no torch. Arguments were
// checked by hf_tiered_cache/kernels/ops.py; here only what Python cannot see cheaply.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <chrono>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "attention_worker.h"
#include "block_io.h"
#include "paged_attention.h"
#include "xxh3.h"

namespace py = pybind11;
using hf_tiered_cache::AppendParams;
using hf_tiered_cache::AttentionJob;
using hf_tiered_cache::AttentionParams;
using hf_tiered_cache::AttentionWorker;
using hf_tiered_cache::BlockIO;
using hf_tiered_cache::BlockView;
using hf_tiered_cache::DType;
using hf_tiered_cache::FinishParams;
using hf_tiered_cache::KernelChoice;
using hf_tiered_cache::Kernels;
using hf_tiered_cache::Move;
using hf_tiered_cache::OutputRows;
using hf_tiered_cache::RunningStateRows;

namespace {

template <size_t kCount>
std::array<int64_t, kCount> integers(const py::tuple& tuple) {
  if (tuple.size() != kCount) throw py::index_error("a tuple has the wrong length");
  std::array<int64_t, kCount> values;
  for (size_t i = 0; i < kCount; ++i) values[i] = PyLong_AsLongLong(tuple[i].ptr());
  if (PyErr_Occurred() != nullptr) throw py::error_already_set();
  return values;
}

template <class Pointer>
Pointer* pointer(int64_t address) {
  return reinterpret_cast<Pointer*>(static_cast<intptr_t>(address));
}

const Kernels& kernels_numbered(int number) {
  const KernelChoice choice = hf_tiered_cache::kernel_choice(number);
  if (choice.reason != nullptr) throw std::invalid_argument(choice.reason);
  return *choice.kernels;
}

RunningStateRows state_rows(const py::object& state) {
  if (state.is_none()) return {nullptr, nullptr, nullptr};
  const auto addresses = integers<3>(py::reinterpret_borrow<py::tuple>(state));
  return {pointer<float>(addresses[0]), pointer<float>(addresses[1]),
          pointer<float>(addresses[2])};
}

OutputRows output_rows(const py::object& out) {
  OutputRows rows = {};
  if (out.is_none()) return rows;
  const auto numbers = integers<7>(py::reinterpret_borrow<py::tuple>(out));
  rows.out = pointer<void>(numbers[0]);
  for (int i = 0; i < 4; ++i) rows.stride[i] = numbers[1 + i];
  rows.lse = pointer<float>(numbers[5]);
  rows.sinks = pointer<const float>(numbers[6]);
  return rows;
}

// A view of blocks as hf_tiered_cache/kernels/view.py hands it over, and what else it says.
struct View {
  BlockView blocks;
  int64_t element_bytes;
  int64_t first_token;
};

View block_view(const py::tuple& arguments) {
  const auto n = integers<12>(arguments);
  return {{pointer<const uint8_t>(n[0]), n[1], n[2], n[3], n[4], n[5], n[6],
           pointer<const int32_t>(n[8]), n[9], n[10]},
          n[7],
          n[11]};
}

AttentionParams attention_params(int dtype, int64_t query, const py::tuple& query_shape,
                                 const py::tuple& query_stride, const py::tuple& view,
                                 int64_t kv_tokens, int64_t query_start, bool causal, float scale,
                                 float softcap, int64_t starts, const py::object& mask,
                                 const py::object& state, const py::object& out,
                                 int num_threads) {
  AttentionParams p = {};
  p.dtype = static_cast<DType>(dtype);
  p.num_threads = num_threads;
  const auto shape = integers<4>(query_shape);
  const auto stride = integers<4>(query_stride);
  p.batch = shape[0];
  p.heads = shape[1];
  p.queries = shape[2];
  p.query = pointer<const void>(query);
  for (int i = 0; i < 3; ++i) p.query_stride[i] = stride[i];
  const View seen = block_view(view);
  p.view = seen.blocks;
  p.first_token = seen.first_token;
  p.kv_tokens = kv_tokens;
  p.query_start = query_start;
  p.causal = causal;
  p.scale = scale;
  p.softcap = softcap;
  p.has_prefetch = hf_tiered_cache::wants_prefetch();
  p.starts = pointer<const int32_t>(starts);
  if (!mask.is_none()) {
    const auto numbers = integers<5>(py::reinterpret_borrow<py::tuple>(mask));
    p.mask = pointer<const uint8_t>(numbers[0]);
    for (int i = 0; i < 4; ++i) p.mask_stride[i] = numbers[1 + i];
  }
  p.state = state_rows(state);
  p.output = output_rows(out);
  return p;
}

// A Python function of the arguments of `attention_params`; runs without the interpreter lock.
template <class Run>
auto with_params(Run run) {
  return [run](int kernel, int dtype, int64_t query, const py::tuple& query_shape,
               const py::tuple& query_stride, const py::tuple& view, int64_t kv_tokens,
               int64_t query_start, bool causal, float scale, float softcap, int64_t starts,
               const py::object& mask, const py::object& state, const py::object& out,
               int num_threads) {
    const AttentionParams p =
        attention_params(dtype, query, query_shape, query_stride, view, kv_tokens, query_start,
                         causal, scale, softcap, starts, mask, state, out, num_threads);
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

// The move of `addresses.size()` records of `record_bytes` from, or to, `offset`.
std::shared_ptr<Move> new_move(bool is_write, int fd, int64_t offset, int64_t record_bytes,
                               const std::vector<int64_t>& addresses, bool is_direct,
                               std::vector<std::shared_ptr<Move>> after) {
  auto move = std::make_shared<Move>();
  move->is_write = is_write;
  move->is_direct = is_direct;
  move->fd = fd;
  move->offset = offset;
  for (int64_t address : addresses) {
    move->records.push_back({pointer<void>(address), static_cast<size_t>(record_bytes)});
  }
  move->after = std::move(after);
  return move;
}

// As `time.perf_counter` counts: both are the monotonic clock.
double seconds(std::chrono::steady_clock::time_point time) {
  return std::chrono::duration<double>(time.time_since_epoch()).count();
}

py::list checksums(const Move& move) {
  py::list list;
  for (const auto& checksum : move.checksums) {
    list.append(py::bytes(reinterpret_cast<const char*>(checksum.data()), checksum.size()));
  }
  return list;
}

// Called through hf_tiered_cache/tiers/movers.py. The threads never need the interpreter lock.
void bind_block_io(py::module_& m) {
  m.attr("END_OF_FILE") = hf_tiered_cache::kEndOfFile;
  m.attr("CANCELLED") = hf_tiered_cache::kCancelled;

  py::class_<Move, std::shared_ptr<Move>>(m, "Move")
      .def(py::init(&new_move), py::kw_only(), py::arg("is_write"), py::arg("fd"),
           py::arg("offset"), py::arg("record_bytes"), py::arg("addresses"), py::arg("is_direct"),
           py::arg("after"))
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
      .def("start", &BlockIO::start)
      .def("submit", &BlockIO::submit, Unlocked())
      .def("cancel", &BlockIO::cancel, Unlocked())
      .def(
          "wait",
          [](BlockIO& io, const Move& move, double timeout_seconds) {
            return io.wait(move, std::chrono::duration<double>(timeout_seconds));
          },
          Unlocked())
      .def("close", &BlockIO::close, Unlocked());

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
    job->calls.push_back(attention_params(dtype, query, query_shape, query_stride, view, kv_tokens,
                                          query_start, causal, scale, softcap, 0, py::none(), state,
                                          py::none(), num_threads));
    hf_tiered_cache::check_slots(job->calls.back());
  }
  const auto shape = integers<4>(query_shape);
  job->num_rows = shape[0] * shape[1] * shape[2];
  job->value_dim = views.empty() ? 0 : job->calls.front().view.value_dim;
  job->state = state_rows(state);
  job->ready = {pointer<uint32_t>(ready), value};
  job->done = {pointer<uint32_t>(done), value};
  return job;
}

// Called through hf_tiered_cache/cpu_lane.py. The thread never needs the interpreter lock.
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
        FinishParams p = {};
        const auto sizes = integers<4>(shape);
        p.dtype = static_cast<DType>(dtype);
        p.num_threads = num_threads;
        p.batch = sizes[0];
        p.heads = sizes[1];
        p.queries = sizes[2];
        p.value_dim = sizes[3];
        p.state = state_rows(state);
        p.output = output_rows(out);
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
        AppendParams p = {};
        const auto key_strides = integers<4>(key_stride);
        const auto value_strides = integers<4>(value_stride);
        const auto shape = integers<4>(key_shape);
        const View seen = block_view(view);
        p.keys = pointer<const uint8_t>(keys);
        p.values = pointer<const uint8_t>(values);
        for (int i = 0; i < 4; ++i) {
          p.key_stride[i] = key_strides[i];
          p.value_stride[i] = value_strides[i];
        }
        p.view = seen.blocks;
        p.blocks = const_cast<uint8_t*>(p.view.blocks);
        p.batch = shape[0];
        p.tokens = shape[2];
        p.element_bytes = seen.element_bytes;
        p.start_token = start_token - seen.first_token;
        p.num_threads = num_threads;
        py::gil_scoped_release unlocked;
        hf_tiered_cache::append_tokens(p);
      },
      "Write new tokens into their blocks. Raises ValueError for a slot outside the slab, before "
      "anything is written.");

  bind_attention_worker(m);
  bind_block_io(m);
}
