// All the small arrays of a step, copied to where a recording reads them, by one launch.
//
// What to copy is the launch's argument itself, so nothing but the launch goes to the device. Rows
// of bytes: a program of a block copies its share of one array, in the widest words that all of its
// addresses allow. No sum, no order between threads: any grid gives the same bytes.
//
// Includes nothing and names of CUDA what every compiler of it knows: NVRTC builds it where it
// runs, nvcc for each architecture where kernels are checked, and a host's compiler in tests.

#define MAX_ARRAYS 48

struct Array {
  const unsigned char *source;
  unsigned char *target;
  unsigned long long source_stride; // bytes from row to row
  unsigned long long target_stride;
  unsigned int num_rows;
  unsigned int row_bytes;
};

struct Arrays {
  Array items[MAX_ARRAYS];
};

struct alignas(16) Quad {
  unsigned int words[4];
};

template <typename Word>
__device__ void copy_words(const Array &array) {
  const unsigned int width = array.row_bytes / static_cast<unsigned int>(sizeof(Word));
  const unsigned int count = array.num_rows * width;
  const unsigned int step = gridDim.x * blockDim.x;
  for (unsigned int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
    const unsigned int row = i / width, column = i - row * width;
    const Word *source = reinterpret_cast<const Word *>(array.source + row * array.source_stride);
    Word *target = reinterpret_cast<Word *>(array.target + row * array.target_stride);
    target[column] = source[column];
  }
}

// Grid: (shares of an array, arrays). Sources and targets overlap nowhere; an array has less than
// 2^31 bytes.
extern "C" __global__ void copy_arrays(const __grid_constant__ Arrays arrays) {
  const Array &array = arrays.items[blockIdx.y];
  const unsigned long long all = reinterpret_cast<unsigned long long>(array.source) |
                                 reinterpret_cast<unsigned long long>(array.target) |
                                 array.source_stride | array.target_stride | array.row_bytes;
  if (all % sizeof(Quad) == 0)
    copy_words<Quad>(array);
  else if (all % sizeof(unsigned int) == 0)
    copy_words<unsigned int>(array);
  else
    copy_words<unsigned char>(array);
}
