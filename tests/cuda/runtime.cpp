// SPDX-License-Identifier: MIT
// Calls launch.h and device.h on the emulated runtime. The first argument names a scenario; what happened is printed,
// one "name value" a line, and test_runtime.py compares it.
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <thread>

#include "../../csrc/cuda/device.h"
#include "../../csrc/cuda/launch.h"

namespace {

using namespace tokred::cuda;

constexpr int kKilobyte = 1024, kLargeDevice = 227 * kKilobyte, kSmallDevice = 99 * kKilobyte;

__global__ void first_kernel(int) {}
__global__ void second_kernel(int) {}

void print(const char* name, const std::string& value) { std::printf("%s %s\n", name, value.c_str()); }
void print(const char* name, int value) { print(name, std::to_string(value)); }

// Launch, and print "ok" or the error.
void try_launch(const char* name, void (*kernel)(int), int shared_bytes) {
  try {
    launch(name, kernel, 1, 32, shared_bytes, nullptr, 0);
    print(name, "ok");
  } catch (const std::runtime_error& error) {
    print(name, error.what());
  }
}

// Thread B asks for less shared memory and launches after thread A has asked and before A's launch.
void two_threads() {
  emulation::runtime().before_launch = [] { std::thread(try_launch, "B", first_kernel, 60 * kKilobyte).join(); };
  try_launch("A", first_kernel, 100 * kKilobyte);
}

void attribute_calls() {
  const auto step = [](const char* name, void (*kernel)(int), int shared_bytes) {
    launch(name, kernel, 1, 32, shared_bytes, nullptr, 0);
    print(name, emulation::runtime().attribute_calls);
  };
  step("small", first_kernel, 40 * kKilobyte);
  step("large", first_kernel, 60 * kKilobyte);
  step("larger", first_kernel, kLargeDevice - kReservedShared);
  step("smaller", first_kernel, 50 * kKilobyte);
  step("other_kernel", second_kernel, 60 * kKilobyte);
  emulation::device().shared_limit = kSmallDevice;
  step("other_device", first_kernel, 60 * kKilobyte);
  step("other_device_again", first_kernel, 70 * kKilobyte);
}

void errors() {
  try_launch("too_large", first_kernel, kLargeDevice);
  print("pending", cudaGetLastError());
  try_launch("next", first_kernel, 60 * kKilobyte);
  emulation::runtime().last_error = cudaErrorNoDevice;  // another library's call failed
  try_launch("after_foreign", first_kernel, 0);
  print("foreign", cudaGetLastError());
}

void load(char** arguments) {
  emulation::Runtime& r = emulation::runtime();
  r.load_status = static_cast<cudaError_t>(std::atoi(arguments[0]));
  r.driver = std::atoi(arguments[1]), r.capability = std::atoi(arguments[2]);
  print("reason", load_failure(reinterpret_cast<const void*>(first_kernel), "80 90a"));
  print("pending", cudaGetLastError());
}

}  // namespace

int main(int, char** arguments) {
  const std::string scenario = arguments[1];
  emulation::device().shared_limit = kLargeDevice;
  if (scenario == "two_threads") two_threads();
  if (scenario == "attribute_calls") attribute_calls();
  if (scenario == "errors") errors();
  if (scenario == "load") load(arguments + 2);
}
