// Measures what arithmetic costs on a Hopper multiprocessor while the tensor
// cores run.
//
//   nvcc -std=c++17 -gencode arch=compute_90a,code=sm_90a -o /tmp/registers \
//     benchmarks/registers.cu && /tmp/registers
//
// This prints JSON. registers_h100.json adds the date and the commit.
//
// Two warpgroups run products of matrices one after another. Both factors are in
// shared memory (64 x 192 x 64, like the products of scores), or the left one is
// in registers (64 x 64 x 192, like the products of values). Two other warpgroups
// compute on 32 numbers in each thread. The cycles of a number are the elapsed
// cycles, divided by the numbers that one lane of the two computing warps of a
// quarter of the multiprocessor computes.

#include <cstdio>

enum { FMA_BEFORE = 1, TANH = 2, ADD_AFTER = 4, FMA_AFTER = 8, CVT = 16, PACED = 32 };

constexpr int kNumbers = 32, kRounds = 400, kMuch = 20;

__device__ __forceinline__ void scores(float (&d)[96], unsigned long long a,
                                       unsigned long long b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"
      " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31,"
      " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47,"
      " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63,"
      " %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79,"
      " %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95},"
      " %96, %97, 1, 1, 1, 0, 1;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]),
        "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]),
        "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),
        "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]),
        "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]),
        "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]),
        "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
        "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]),
        "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]),
        "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]),
        "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]),
        "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]), "+f"(d[64]),
        "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]),
        "+f"(d[70]), "+f"(d[71]), "+f"(d[72]), "+f"(d[73]), "+f"(d[74]),
        "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]),
        "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]),
        "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), "+f"(d[88]), "+f"(d[89]),
        "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]),
        "+f"(d[95])
      : "l"(a), "l"(b));
}

__device__ __forceinline__ void values(float (&d)[32], unsigned long long b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"
      " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31},"
      " {%32, %32, %32, %32}, %33, 1, 1, 1, 1;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]),
        "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]),
        "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),
        "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]),
        "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]),
        "+f"(d[30]), "+f"(d[31])
      : "r"(0), "l"(b));
}

template <int OPS>
__device__ __forceinline__ void compute(float (&r)[kNumbers], float scale,
                                        float bias, unsigned copy) {
  float here = bias, first = 0;
#pragma unroll
  for (int i = 0; i < kNumbers; i += 2) {
    if ((OPS & PACED) && i && i % 8 == 0)
      here = __uint_as_float(__byte_perm(__float_as_uint(bias),
                                         __float_as_uint(first), copy));
    float x = r[i], y = r[i + 1];
    if (OPS & FMA_BEFORE) x = fmaf(x, scale, here), y = fmaf(y, scale, here);
    if (OPS & TANH) {
      asm volatile("tanh.approx.f32 %0, %0;" : "+f"(x));
      asm volatile("tanh.approx.f32 %0, %0;" : "+f"(y));
    }
    if ((OPS & PACED) && i % 8 == 0) first = x;
    if (OPS & ADD_AFTER) x += 1, y += 1;
    if (OPS & FMA_AFTER) x = fmaf(x, 0.5f, 0.5f), y = fmaf(y, 0.5f, 0.5f);
    if (OPS & CVT) {
      unsigned both;
      asm volatile("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(y), "f"(x));
      y = __uint_as_float(both);
    }
    r[i] = x, r[i + 1] = y;
  }
}

__device__ unsigned long long descriptor(unsigned address) {
  // Rows of 128 bytes, swizzled.
  return (unsigned long long)((address & 0x3FFFF) >> 4) | 1ull << 16 |
         (unsigned long long)(1024 >> 4) << 32 | 1ull << 62;
}

template <int OPS, bool VALUES>
__global__ void __launch_bounds__(512)
    run(float *out, long long *cycles, int products, int numbers, float scale,
        float bias, unsigned copy) {
  extern __shared__ __align__(1024) char room[];
  int warpgroup = threadIdx.x / 128;
  for (int i = threadIdx.x; i < 40960; i += blockDim.x) ((int *)room)[i] = 0;
  __syncthreads();
  float sum = 0;
  long long begin = clock64();
  if (warpgroup < 2) {
    unsigned base = (unsigned)__cvta_generic_to_shared(room);
    unsigned long long a = descriptor(base + warpgroup * 8192);
    unsigned long long b = descriptor(base + 65536);
    float d[VALUES ? 32 : 96] = {};
    for (int n = 0; n < products; n++) {
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int i = 0; i < (VALUES ? 12 : 4); i++)
        if constexpr (VALUES) values(d, b + i * 128);
        else scores(d, a + 2 * i, b + 2 * i);
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    }
    for (float x : d) sum += x;
  } else {
    float r[kNumbers];
    for (int i = 0; i < kNumbers; i++) r[i] = threadIdx.x * 0.01f + i;
    for (int n = 0; n < numbers; n++) compute<OPS>(r, scale, bias, copy);
    for (float x : r) sum += x;
  }
  long long end = clock64();
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
  if (threadIdx.x % 128 == 0) cycles[blockIdx.x * 4 + warpgroup] = end - begin;
}

bool comma = false;

template <int OPS, bool VALUES>
void measure(const char *name) {
  float *out;
  long long *cycles, found[4];
  cudaMalloc(&out, 132 * 512 * 4);
  cudaMalloc(&cycles, 132 * 4 * 8);
  auto kernel = run<OPS, VALUES>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 163840);
  auto go = [&](int products, int numbers) {
    for (int i = 0; i < 2; i++)  // The first run is a warm-up.
      kernel<<<132, 512, 163840>>>(out, cycles, products, numbers, 0.5f, 0.125f,
                                   0x3210);
    cudaMemcpy(found, cycles, 32, cudaMemcpyDeviceToHost);
  };
  auto of_product = [&] { return found[0] / (double)kRounds / 2; };
  auto of_number = [&] { return found[2] / (double)kRounds / kNumbers / 2; };
  go(kRounds, 0);
  double product = of_product();
  go(0, kRounds);
  double number = of_number();
  go(kRounds, kMuch * kRounds);  // Arithmetic runs until the products end.
  double product_beside = of_product();
  go(kMuch * kRounds, kRounds);
  double number_beside = of_number();
  printf("%s{\"products\": \"%s\", \"arithmetic\": \"%s\", "
         "\"cycles_of_a_number\": %.2f, \"beside_products\": %.2f, "
         "\"cycles_of_a_product\": %.0f, \"beside_arithmetic\": %.0f}",
         comma ? ",\n  " : "\n  ", VALUES ? "values" : "scores", name, number,
         number_beside, product, product_beside);
  comma = true;
  cudaFree(out), cudaFree(cycles);
}

template <int OPS>
void both(const char *name) {
  measure<OPS, false>(name);
  measure<OPS, true>(name);
}

int main() {
  cudaDeviceProp device;
  cudaGetDeviceProperties(&device, 0);
  printf("{\"device\": \"%s\", \"rows\": [", device.name);
  both<TANH>("tanh");
  both<TANH | CVT>("tanh cvt");
  both<TANH | ADD_AFTER | CVT>("tanh add cvt");
  both<FMA_BEFORE | TANH | CVT>("fma tanh cvt");
  both<FMA_BEFORE | TANH | FMA_AFTER | CVT>("fma tanh fma cvt");
  both<FMA_BEFORE | TANH | ADD_AFTER | CVT>("fma tanh add cvt");
  both<FMA_BEFORE | TANH | ADD_AFTER | CVT | PACED>("fma tanh add cvt, paced");
  both<FMA_BEFORE>("fma");
  both<CVT>("cvt");
  printf("\n]}\n");
  cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) fprintf(stderr, "%s\n", cudaGetErrorString(error));
  return error != cudaSuccess;
}
