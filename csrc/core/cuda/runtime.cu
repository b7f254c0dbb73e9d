#include "core/cuda/runtime.h"

#include <cuda_runtime.h>

namespace specbranch::cuda {
namespace {

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// Built for the same architectures as every other kernel.
__global__ void probe() {}

std::string problem_of(cudaError_t error, int device) {
  int runtime = 0, driver = 0;
  cudaRuntimeGetVersion(&runtime);
  cudaDriverGetVersion(&driver);
  if (error == cudaErrorInsufficientDriver) {
    return "the driver is for CUDA " + version_text(driver) + " and this build needs CUDA " + version_text(runtime);
  }
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  const std::string remedy = "; SPECBRANCH_CUDA_ARCHITECTURES=" + std::to_string(major) + std::to_string(minor) +
                             " builds for it, =all for every release";
  const std::string capability = "it has compute capability " + std::to_string(major) + "." + std::to_string(minor);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    return capability + " and this build is for " SPECBRANCH_CUDA_ARCHITECTURES + remedy;
  }
  // A driver runs machine code of newer toolkits than its own, but compiles none of their PTX.
  if (error == cudaErrorUnsupportedPtxVersion) {
    return capability + ", this build is for " SPECBRANCH_CUDA_ARCHITECTURES ", and the driver, for CUDA " +
           version_text(driver) + ", compiles no PTX of CUDA " + version_text(runtime) + remedy;
  }
  return cudaGetErrorString(error);
}

}  // namespace

std::string device_problem(int device) {
  int current = 0;
  cudaError_t error = cudaGetDevice(&current);
  if (error == cudaSuccess && current != device) error = cudaSetDevice(device);
  cudaFuncAttributes attributes;
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, probe);
  std::string problem = error == cudaSuccess ? "" : problem_of(error, device);
  cudaGetLastError();  // it is sticky, and the next launch would report it
  if (current != device) cudaSetDevice(current);
  return problem;
}

std::string runtime_report() {
  int runtime = 0, driver = 0, count = 0;
  cudaRuntimeGetVersion(&runtime);
  cudaDriverGetVersion(&driver);
  std::string text = "runtime " + version_text(runtime) + ", ";
  text += driver == 0 ? "no driver" : "driver for CUDA " + version_text(driver);
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();  // it is sticky, and the next launch would report it
    return text + ": " + cudaGetErrorString(error);
  }
  for (int device = 0; device < count; ++device) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, device) != cudaSuccess) continue;
    text += (device ? "; " : ": ") + std::string(properties.name) + " (" + std::to_string(properties.major) + "." +
            std::to_string(properties.minor) + ")";
  }
  return text;
}

uint64_t capture_id(int64_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  if (cudaStreamGetCaptureInfo(reinterpret_cast<cudaStream_t>(stream), &status, &id) != cudaSuccess) {
    cudaGetLastError();  // asked of the legacy stream while another one is captured
    return 0;
  }
  return status == cudaStreamCaptureStatusActive ? id : 0;
}

}  // namespace specbranch::cuda
