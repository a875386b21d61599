// The CUDA core's door to Python. Knows no torch, and loads where there is no driver. Arguments are
// those of the CPU core (hf_tiered_cache/kernels/cores.py) with the device and the stream in front;
// every address is one of device memory unless said otherwise.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "../python_arguments.h"
#include "cuda_api.h"

namespace py = pybind11;
using hf_tiered_cache::AttentionParams;
using hf_tiered_cache::CopyDirection;
using hf_tiered_cache::CopyParams;
using hf_tiered_cache::CudaPlace;
using hf_tiered_cache::CudaStatus;
using hf_tiered_cache::DeviceProperties;
using hf_tiered_cache::JoinParams;
using hf_tiered_cache::pointer;

namespace {

CudaPlace place_of(int device, int64_t stream) { return {device, pointer<void>(stream)}; }

// Call without the interpreter lock; what fails becomes a RuntimeError that says what was done.
template <class Call>
void run(const char* what, const Call& call) {
  CudaStatus status;
  {
    py::gil_scoped_release unlocked;
    status = call();
  }
  if (status.code != 0) {
    throw std::runtime_error(std::string(what) + ": " + status.text + " (CUDA error " +
                             std::to_string(status.code) + ")");
  }
}

py::tuple device_count() {
  int count = 0;
  const CudaStatus status = hf_tiered_cache::htc_cuda_device_count(&count);
  if (status.code == 0) return py::make_tuple(count, count > 0 ? "" : "no CUDA device");
  return py::make_tuple(0, std::string("no CUDA device: ") + status.text);
}

py::dict device_properties(int device) {
  DeviceProperties properties = {};
  run("device_properties",
      [&] { return hf_tiered_cache::htc_cuda_device_properties(device, &properties); });
  py::dict named;
  named["name"] = properties.name;
  named["capability"] = py::make_tuple(properties.major, properties.minor);
  named["pci_bus_id"] = properties.pci_bus_id;
  named["num_multiprocessors"] = properties.num_multiprocessors;
  named["memory_bytes"] = properties.memory_bytes;
  return named;
}

int64_t scratch_bytes(const py::tuple& query_shape, const py::tuple& view, int64_t kv_tokens,
                      int64_t query_start, bool causal, bool has_state) {
  AttentionParams p = {};
  const auto shape = hf_tiered_cache::integers<4>(query_shape);
  const hf_tiered_cache::View seen = hf_tiered_cache::block_view(view);
  p.batch = shape[0];
  p.heads = shape[1];
  p.queries = shape[2];
  p.view = seen.blocks;
  p.first_token = seen.first_token;
  p.kv_tokens = kv_tokens;
  p.query_start = query_start;
  p.causal = causal;
  return hf_tiered_cache::htc_cuda_scratch_bytes(&p, has_state);
}

void copy(int device, int64_t stream, const std::vector<int64_t>& targets,
          const std::vector<int64_t>& sources, const std::vector<int64_t>& num_bytes,
          CopyDirection direction, bool is_pinned) {
  if (targets.size() != sources.size() || targets.size() != num_bytes.size()) {
    throw std::invalid_argument("targets, sources and num_bytes differ in length");
  }
  std::vector<void*> to;
  std::vector<const void*> from;
  for (size_t i = 0; i < targets.size(); ++i) {
    to.push_back(pointer<void>(targets[i]));
    from.push_back(pointer<const void>(sources[i]));
  }
  const CopyParams p = {direction, is_pinned,   static_cast<int64_t>(to.size()),
                        to.data(), from.data(), num_bytes.data()};
  run("copy", [&] { return hf_tiered_cache::htc_cuda_copy(place_of(device, stream), &p); });
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA core of hf_tiered_cache; call it through hf_tiered_cache.kernels.ops.";

  m.def("device_count", &device_count, "(number of devices, reason why there is none or '').");
  m.def("device_properties", &device_properties, py::arg("device"),
        "name, capability, pci_bus_id, num_multiprocessors and memory_bytes of a device.");

  m.def("scratch_bytes", &scratch_bytes,
        "Bytes of device memory that `attend` needs for these arguments; bounded.");

  m.def(
      "attend",
      [](int device, int64_t stream, int dtype, int64_t query, const py::tuple& query_shape,
         const py::tuple& query_stride, const py::tuple& view, int64_t kv_tokens,
         int64_t query_start, bool causal, float scale, float softcap, int64_t starts,
         const py::object& mask, const py::object& state, const py::object& out, int64_t scratch,
         int64_t scratch_bytes) {
        const AttentionParams p = hf_tiered_cache::attention_params(
            dtype, query, query_shape, query_stride, view, kv_tokens, query_start, causal, scale,
            softcap, starts, mask, state, out);
        run("attend", [&] {
          return hf_tiered_cache::htc_cuda_attend(place_of(device, stream), &p,
                                                  pointer<void>(scratch), scratch_bytes);
        });
      },
      "Attend the blocks of a table into `state` (acc, max, sum) or into `out` (address, 4 "
      "strides, lse, sinks). A slot outside the slab makes its rows NaN.");

  m.def(
      "finish",
      [](int device, int64_t stream, int dtype, const py::tuple& shape, const py::object& state,
         const py::object& out) {
        const auto p = hf_tiered_cache::finish_params(dtype, shape, state, out);
        run("finish",
            [&] { return hf_tiered_cache::htc_cuda_finish(place_of(device, stream), &p); });
      },
      "Normalise a running state into `out` (address, 4 strides, lse, sinks).");

  m.def(
      "join",
      [](int device, int64_t stream, int64_t rows, int64_t value_dim, const py::object& state,
         const py::object& other) {
        const JoinParams p = {rows, value_dim, hf_tiered_cache::state_rows(state),
                              hf_tiered_cache::state_rows(other)};
        run("join", [&] { return hf_tiered_cache::htc_cuda_join(place_of(device, stream), &p); });
      },
      "Fold the running state `other` (acc, max, sum), over other positions, into `state`.");

  m.def(
      "append",
      [](int device, int64_t stream, int64_t keys, const py::tuple& key_shape,
         const py::tuple& key_stride, int64_t values, const py::tuple& value_stride,
         const py::tuple& view, int64_t start_token) {
        const auto p = hf_tiered_cache::append_params(keys, key_shape, key_stride, values,
                                                      value_stride, view, start_token);
        run("append",
            [&] { return hf_tiered_cache::htc_cuda_append(place_of(device, stream), &p); });
      },
      "Write new tokens into their blocks. A slot outside the slab is not written.");

  py::enum_<CopyDirection>(m, "CopyDirection", py::module_local())
      .value("HOST_TO_DEVICE", CopyDirection::kHostToDevice)
      .value("DEVICE_TO_HOST", CopyDirection::kDeviceToHost)
      .value("DEVICE_TO_DEVICE", CopyDirection::kDeviceToDevice);
  m.def("copy", &copy, py::arg("device"), py::arg("stream"), py::arg("targets"), py::arg("sources"),
        py::arg("num_bytes"), py::arg("direction"), py::arg("is_pinned"),
        "Copy pieces of memory, runs of neighbours at once. Host sources must not change until the "
        "stream is done with them.");

  m.def(
      "post",
      [](int device, int64_t stream, int64_t target, int64_t source, int64_t num_bytes) {
        run("post", [&] {
          return hf_tiered_cache::htc_cuda_post(place_of(device, stream), pointer<void>(target),
                                                pointer<const void>(source), num_bytes);
        });
      },
      py::arg("device"), py::arg("stream"), py::arg("target"), py::arg("source"),
      py::arg("num_bytes"),
      "Copy a little between the device and pinned host memory by a kernel, which queues behind no "
      "other copy.");
  m.def(
      "write_flag",
      [](int device, int64_t stream, int64_t host_word, uint32_t value) {
        run("write_flag", [&] {
          return hf_tiered_cache::htc_cuda_write_flag(place_of(device, stream),
                                                      pointer<void>(host_word), value);
        });
      },
      "Set a 32-bit word of pinned host memory once the stream has done everything before.");
  m.def(
      "wait_flag",
      [](int device, int64_t stream, int64_t host_word, uint32_t value) {
        run("wait_flag", [&] {
          return hf_tiered_cache::htc_cuda_wait_flag(place_of(device, stream),
                                                     pointer<void>(host_word), value);
        });
      },
      "Let the stream wait until a 32-bit word of pinned host memory is `value` or more.");
}
