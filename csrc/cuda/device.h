// SPDX-License-Identifier: MIT
// Check that the driver can load the kernels of this build on the current device.
#pragma once

#include <cuda_runtime.h>

#include <string>

namespace tokred::cuda {

// Format CUDA's version numbers, which are 1000 * major + 10 * minor.
inline std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// Return "" if the current device can load `kernel`, else the reason. `architectures` are those of the build; they are
// the same for all kernels, so the result holds for all.
inline std::string load_failure(const void* kernel, const std::string& architectures) {
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, kernel);
  if (status == cudaSuccess) return "";
  cudaGetLastError();  // clear the error: this function reports it
  if (status == cudaErrorInsufficientDriver || status == cudaErrorUnsupportedPtxVersion) {
    int driver = 0, runtime = 0;  // a driver version of 0 means no driver
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    if (driver == 0) return "no NVIDIA driver is installed";
    return "the driver supports CUDA " + version_text(driver) + ", but the kernels were built with CUDA " +
           version_text(runtime) + "; update the driver or reinstall with an older CUDA toolkit";
  }
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction) {
    int device = 0, major = 0, minor = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    const std::string number = std::to_string(major) + std::to_string(minor);
    if (major < 8) return "the GPU is sm_" + number + ", but the kernels need sm_80 or newer";
    return "the GPU is sm_" + number + ", but the kernels were built for " + architectures +
           "; reinstall with TOKRED_CUDA_ARCHS=" + number;
  }
  return cudaGetErrorString(status);
}

}  // namespace tokred::cuda
