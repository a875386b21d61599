// Python's arguments to the kernels: integers to pointers, tuples to structs. The same for the CPU
// and the CUDA core; which tuple holds what is said in hf_tiered_cache/kernels/cores.py.
#pragma once

#include <pybind11/pybind11.h>

#include <array>

#include "paged_attention.h"

namespace hf_tiered_cache {

namespace py = pybind11;

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

inline RunningStateRows state_rows(const py::object& state) {
  if (state.is_none()) return {nullptr, nullptr, nullptr};
  const auto addresses = integers<3>(py::reinterpret_borrow<py::tuple>(state));
  return {pointer<float>(addresses[0]), pointer<float>(addresses[1]), pointer<float>(addresses[2])};
}

inline OutputRows output_rows(const py::object& out) {
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

inline View block_view(const py::tuple& arguments) {
  const auto n = integers<13>(arguments);
  return {{pointer<const uint8_t>(n[0]), n[1], n[2], n[3], n[4], n[5], n[6],
           pointer<const int32_t>(n[8]), n[9], n[10], n[12] != 0},
          n[7],
          n[11]};
}

inline AttentionParams attention_params(int dtype, int64_t query, const py::tuple& query_shape,
                                        const py::tuple& query_stride, const py::tuple& view,
                                        int64_t kv_tokens, int64_t query_start, bool causal,
                                        float scale, float softcap, int64_t starts,
                                        const py::object& mask, const py::object& state,
                                        const py::object& out) {
  AttentionParams p = {};
  p.dtype = static_cast<DType>(dtype);
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

inline FinishParams finish_params(int dtype, const py::tuple& shape, const py::object& state,
                                  const py::object& out) {
  FinishParams p = {};
  const auto sizes = integers<4>(shape);
  p.dtype = static_cast<DType>(dtype);
  p.batch = sizes[0];
  p.heads = sizes[1];
  p.queries = sizes[2];
  p.value_dim = sizes[3];
  p.state = state_rows(state);
  p.output = output_rows(out);
  return p;
}

inline AppendParams append_params(int64_t keys, const py::tuple& key_shape,
                                  const py::tuple& key_stride, int64_t values,
                                  const py::tuple& value_stride, const py::tuple& view,
                                  int64_t start_token) {
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
  return p;
}

}  // namespace hf_tiered_cache
