// CUDA's driver and NVRTC, as far as quire.kernels_cuda calls them, over memory of the host.
//
// A launch runs the kernel's own source, thread after thread. Threads that would wait for each
// other, or whose order mattered, could not be told from this; the source has none.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

struct Place {
  unsigned int x, y, z;
};
static Place gridDim, blockDim, blockIdx, threadIdx;

#define __global__
#define __device__ static
#define __grid_constant__
#include COPY_ARRAYS

static std::string compiled_source, compiled_options, said;
static int faults[3];
static std::uint64_t num_launches, last_stream;

enum { COMPILING, LOADING, LAUNCHING };

extern "C" {

// What tests ask.
void set_fault(int where, int status) { faults[where] = status; }
std::uint64_t launches() { return num_launches; }
std::uint64_t stream() { return last_stream; }
const char *options() { return compiled_options.c_str(); }
std::size_t size_of_array() { return sizeof(Array); }
std::size_t max_arrays() { return MAX_ARRAYS; }

// NVRTC.
int nvrtcCreateProgram(void **program, const char *source, const char *, int, void *, void *) {
  compiled_source = source;
  *program = &compiled_source;
  return 0;
}
int nvrtcDestroyProgram(void **program) {
  *program = nullptr;
  return 0;
}
int nvrtcCompileProgram(void *, int count, const char *const *options) {
  compiled_options.clear();
  for (int i = 0; i < count; ++i) compiled_options += std::string(options[i]) + " ";
  said = "an error of the compiler's";
  return faults[COMPILING];
}
int nvrtcGetProgramLogSize(void *, std::size_t *size) { return *size = said.size() + 1, 0; }
int nvrtcGetProgramLog(void *, char *log) { return std::strcpy(log, said.c_str()), 0; }
int nvrtcGetCUBINSize(void *, std::size_t *size) { return *size = 6, 0; }
int nvrtcGetCUBIN(void *, char *image) { return std::memcpy(image, "cubin", 6), 0; }
const char *nvrtcGetErrorString(int) { return "NVRTC_ERROR"; }

// The driver.
int cuModuleLoadData(void **module, const void *image) {
  *module = &compiled_source;
  return std::memcmp(image, "cubin", 6) ? 200 : faults[LOADING];
}
int cuModuleGetFunction(void **function, void *, const char *name) {
  *function = reinterpret_cast<void *>(&copy_arrays);
  return std::strcmp(name, "copy_arrays") ? 500 : 0;
}
int cuGetErrorString(int status, const char **text) {
  *text = status == 700 ? "an illegal memory access was encountered" : "some other failure";
  return 0;
}
int cuLaunchKernel(void *function, unsigned int gx, unsigned int gy, unsigned int gz,
                   unsigned int bx, unsigned int by, unsigned int bz, unsigned int, void *stream,
                   void **arguments, void **) {
  if (faults[LAUNCHING]) return faults[LAUNCHING];
  ++num_launches;
  last_stream = reinterpret_cast<std::uint64_t>(stream);
  gridDim = {gx, gy, gz};
  blockDim = {bx, by, bz};
  const auto kernel = reinterpret_cast<void (*)(Arrays)>(function);
  for (blockIdx.y = 0; blockIdx.y < gy; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < gx; ++blockIdx.x)
      for (threadIdx.x = 0; threadIdx.x < bx; ++threadIdx.x)
        kernel(*static_cast<const Arrays *>(arguments[0]));
  return 0;
}
}
