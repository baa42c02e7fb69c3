// The Python module edet_emulation: loading it registers the ops, with emulated CUDA kernels, in
// torch.ops.edet_emulation; its functions steer and read the emulator and run probes on arrays.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <iterator>

#include "emulator.h"
#include "probe.cuh"

namespace py = pybind11;
using namespace edet;

namespace {

// What a probe may touch is its arrays.
class Memory {
 public:
  ~Memory() { emulation::forget_memory(); }
  template <class T>
  const T* in(const py::array_t<T>& array) {
    emulation::know_memory(array.data(), static_cast<size_t>(array.nbytes()), false);
    return array.data();
  }
  template <class T>
  T* out(py::array_t<T>& array) {
    emulation::know_memory(array.mutable_data(), static_cast<size_t>(array.nbytes()), true);
    return array.mutable_data();
  }
};

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

py::array_t<float> reverse(const py::array_t<float>& numbers, int threads,
                           const std::string& fault) {
  static const char* const names[] = {"none",
                                      "missing_barrier",
                                      "missing_warp_barrier",
                                      "missing_last_barrier",
                                      "divergent_barrier",
                                      "early_exit",
                                      "divergent_warp",
                                      "global_overrun",
                                      "global_misaligned",
                                      "input_written",
                                      "shared_overrun",
                                      "local_overrun"};
  int number = -1;
  for (int i = 0; i < static_cast<int>(std::size(names)); i++)
    if (fault == names[i]) number = i;
  if (number < 0) throw std::invalid_argument("fault is unknown: " + fault);
  py::array_t<float> result(numbers.size());
  Memory memory;
  const cuda::ReverseParams p{static_cast<cuda::Fault>(number), memory.in(numbers),
                              memory.out(result)};
  const auto blocks = static_cast<unsigned>(numbers.size() / threads);
  check(cuda::launch(cuda::reverse, blocks, static_cast<unsigned>(threads),
                     sizeof(float) * static_cast<size_t>(threads), nullptr, p));
  return result;
}

// a and b are the operands' bytes, type is that of the operands.
void product(const py::array_t<uint8_t>& a, const py::array_t<uint8_t>& b, py::array_t<float> d,
             const std::string& type) {
  static const char* const names[] = {"f16", "bf16", "tf32"};
  const auto* found = std::find(std::begin(names), std::end(names), type);
  if (found == std::end(names)) throw std::invalid_argument("type is unknown: " + type);
  Memory memory;
  const cuda::ProductParams p{static_cast<int>(found - names), memory.in(a), memory.in(b),
                              memory.out(d)};
  check(cuda::launch(cuda::product, 1u, 32u, 1024, nullptr, p));
}

py::tuple warp(const py::array_t<int>& numbers) {
  const auto threads = static_cast<unsigned>(numbers.size());
  py::array_t<int> shuffled(threads), exchanged(threads), votes(threads), sums(2);
  sums.mutable_at(0) = 0;
  Memory memory;
  const cuda::WarpParams p{memory.in(numbers), memory.out(shuffled), memory.out(exchanged),
                           memory.out(votes), memory.out(sums)};
  check(cuda::launch(cuda::warp, 1u, threads, sizeof(int), nullptr, p));
  return py::make_tuple(shuffled, exchanged, votes, sums);
}

void touch(int stride, int vector) {
  const cuda::StrideParams p{stride, vector};
  check(cuda::launch(cuda::touch, 1u, 32u, sizeof(float) * static_cast<size_t>(31 * stride + 4),
                     nullptr, p));
}

// Passes numbers from block to block; see probe.cuh.
py::array_t<int> pass(const py::array_t<int>& numbers, int blocks, const std::string& fault) {
  static const char* const names[] = {"none",          "no_await",   "no_release", "no_barrier",
                                      "constant_read", "wrong_flag", "deadlock"};
  int number = -1;
  for (int i = 0; i < static_cast<int>(std::size(names)); i++)
    if (fault == names[i]) number = i;
  if (number < 0) throw std::invalid_argument("fault is unknown: " + fault);
  py::array_t<int> result({static_cast<py::ssize_t>(blocks), numbers.size()});
  py::array_t<uint32_t> flags(blocks + 1);
  std::fill_n(flags.mutable_data(), flags.size(), 0u);
  std::fill_n(result.mutable_data(), result.size(), -1);
  Memory memory;
  const cuda::PassParams p{static_cast<cuda::PassFault>(number), memory.in(numbers),
                           memory.out(result), memory.out(flags)};
  check(cuda::launch(cuda::pass, static_cast<unsigned>(blocks),
                     static_cast<unsigned>(numbers.size()), sizeof(int), nullptr, p));
  return result;
}

// Adds one to numbers twice, the second time by a launch that may overtake the first.
py::array_t<int> overtake(const py::array_t<int>& numbers, const std::string& fault) {
  py::array_t<int> once(numbers.size()), twice(numbers.size());
  Memory memory;
  const auto threads = static_cast<unsigned>(numbers.size());
  const cuda::OvertakeParams first{true, memory.in(numbers), memory.out(once)};
  check(cuda::launch(cuda::overtake, 1u, threads, 0, nullptr, first));
  const cuda::OvertakeParams second{fault != "no_await", once.data(), memory.out(twice)};
  check(cuda::launch(cuda::overtake, 1u, threads, 0, nullptr, second, true));
  return twice;
}

py::list launches() {
  py::list list;
  for (const emulation::Launch& l : emulation::launches()) {
    py::dict d;
    const auto extent = [](emulation::Extent e) { return py::make_tuple(e.x, e.y, e.z); };
    d["kernel"] = l.kernel;
    d["function"] = l.function;
    d["params"] = py::bytes(l.params);
    d["grid"] = extent(l.grid);
    d["block"] = extent(l.block);
    d["pdl"] = l.pdl;
    d["blocks"] = l.blocks;
    d["shared_bytes"] = l.shared_bytes;
    d["bytes_read"] = l.bytes_read;
    d["bytes_written"] = l.bytes_written;
    d["sectors_read"] = l.sectors_read;
    d["sectors_written"] = l.sectors_written;
    d["bank_conflicts"] = l.bank_conflicts;
    list.append(d);
  }
  return list;
}

}  // namespace

PYBIND11_MODULE(edet_emulation, m) {
  m.def("set_seed", &emulation::set_seed, "Of the order in which threads and blocks run.");
  m.def("set_device", &emulation::set_device, py::arg("multiprocessors"), py::arg("shared_bytes"),
        py::arg("architecture") = 90);
  m.def("set_resident", &emulation::set_resident, py::arg("blocks"),
        "How many blocks of a launch run together; 1 at first.");
  m.def("count_launches", &emulation::count_launches, "Begins a new list, or ends counting.");
  m.def("set_dry", &emulation::set_dry, py::arg("on"),
        "Whether launches are listed but not run, and no memory is touched.");
  m.def("launches", &launches, "What each launch since then was and did.");
  m.def("reverse", &reverse, py::arg("numbers"), py::arg("threads"), py::arg("fault") = "none");
  m.def("product", &product, py::arg("a"), py::arg("b"), py::arg("d"), py::arg("type"));
  m.def("warp", &warp, py::arg("numbers"));
  m.def("pass_on", &pass, py::arg("numbers"), py::arg("blocks"), py::arg("fault") = "none");
  m.def("overtake", &overtake, py::arg("numbers"), py::arg("fault") = "none");
  m.def("touch", &touch, py::arg("stride"), py::arg("vector"));
}
