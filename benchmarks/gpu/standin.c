/* A CUDA runtime, driver and cuBLAS without a GPU, to be loaded in front of NVIDIA's: everything that is asked of a GPU
 * is checked and counted, and no kernel computes anything. Memory is address space that holds zeros and what was copied
 * there. Captures are kept as CUDA keeps them: streams join by events, what may not happen in a capture is refused, a
 * stream that was not joined ends it with an error.
 *
 * STANDIN_MEMORY: bytes of the GPU, 80 GB by default. STANDIN_VERBOSE: say on stderr what was refused.
 */
#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#undef cudaGetDeviceProperties
#undef cudaStreamGetCaptureInfo
#undef cudaGraphNodeGetDependencies
#undef cudaStreamUpdateCaptureDependencies

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread cudaError_t last_error;
static __thread enum cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
static __thread void* thread_capture; /* the capture that this thread has begun */

typedef struct Graph {
  long nodes;
  int strays; /* work that the capturing thread put on other streams */
} Graph;

typedef struct Stream {
  Graph* capture;  /* what it is captured into */
  int origin;      /* the capture began here */
  int pending;     /* work of a joined stream that no event has brought back */
  int priority;
  unsigned long long id;
  enum cudaStreamCaptureMode mode;
  struct Stream* next;
} Stream;

typedef struct Event {
  Graph* capture;
  Stream* stream;
  double seconds;
} Event;

static Stream legacy;
static Stream* streams;
static unsigned long long captures_begun;
static struct {
  long driver_launches, runtime_launches, gemms, modules, captures, replays, allocations, refused, strays, captured;
} counts;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}

static cudaError_t refuse(cudaError_t error, const char* what) {
  last_error = error;
  counts.refused++;
  if (getenv("STANDIN_VERBOSE")) fprintf(stderr, "standin: %s refused with %d\n", what, error);
  return error;
}

static Stream* stream_of(void* handle) {
  /* the legacy and the per-thread default stream have small numbers as handles */
  return (size_t)handle < 16 ? &legacy : (Stream*)handle;
}

/* one node on a stream; what the capturing thread does elsewhere would be missing in the graph */
static void work_on(Stream* stream) {
  if (stream->capture) {
    stream->capture->nodes++;
    stream->pending = !stream->origin;
  } else if (thread_capture && thread_mode != cudaStreamCaptureModeRelaxed) {
    ((Graph*)thread_capture)->strays++;
    counts.strays++;
  }
}

static int prohibited(void) { return thread_capture && thread_mode != cudaStreamCaptureModeRelaxed; }

/* ---- device and versions */
cudaError_t cudaGetDeviceCount(int* count) { *count = 1; return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { *device = 0; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : refuse(cudaErrorInvalidDevice, "device"); }
cudaError_t cudaDriverGetVersion(int* version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int peer) { *can = 0; return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* text, int length, int device) {
  snprintf(text, length, "0000:00:00.0");
  return cudaSuccess;
}
const char* cudaGetErrorName(cudaError_t error) { return error ? "cudaErrorOfTheStandIn" : "cudaSuccess"; }
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureUnjoined: return "capture was not joined to original stream";
    case cudaErrorCapturedEvent: return "operation not permitted on an event last recorded in a capturing stream";
    default: return error ? "refused by the stand-in driver" : "no error";
  }
}
cudaError_t cudaGetLastError(void) {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError(void) { return last_error; }

/* an H100 */
static size_t total_memory(void) {
  const char* asked = getenv("STANDIN_MEMORY");
  return asked ? strtoull(asked, NULL, 10) : 85017493504ull;
}
static int attribute(int which) {
  switch (which) {
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X: return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y: return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z: return 64;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X: return 2147483647;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y: return 65535;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z: return 65535;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: return 49152;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: return 232448;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: return 233472;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: return 32;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: return 65536;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR: return 65536;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return 132;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: return 2048;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: return 1980000;
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: return 2619000;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: return 5120;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: return 52428800;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return 9;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: return 0;
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING: return 1;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR: return 32;
    default: return 0;
  }
}
cudaError_t cudaDeviceGetAttribute(int* value, enum cudaDeviceAttr which, int device) {
  *value = attribute(which);
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp* found, int device) {
  memset(found, 0, sizeof *found);
  strcpy(found->name, "NVIDIA H100 80GB HBM3");
  found->totalGlobalMem = total_memory();
  found->sharedMemPerBlock = 49152;
  found->sharedMemPerBlockOptin = 232448;
  found->sharedMemPerMultiprocessor = 233472;
  found->regsPerBlock = found->regsPerMultiprocessor = 65536;
  found->warpSize = 32;
  found->maxThreadsPerBlock = 1024;
  found->maxThreadsPerMultiProcessor = 2048;
  found->maxBlocksPerMultiProcessor = 32;
  found->maxThreadsDim[0] = found->maxThreadsDim[1] = 1024;
  found->maxThreadsDim[2] = 64;
  found->maxGridSize[0] = 2147483647;
  found->maxGridSize[1] = found->maxGridSize[2] = 65535;
  found->major = 9;
  found->multiProcessorCount = 132;
  found->l2CacheSize = 52428800;
  found->memoryBusWidth = 5120;
  found->unifiedAddressing = found->canMapHostMemory = found->concurrentKernels = 1;
  return cudaSuccess;
}

/* ---- memory: a range of addresses whose pages appear when they are written */
enum { ROOM_BITS = 38, ALIGN = 512, BLOCKS = 1 << 16 };
static char* base;
static size_t used;
static struct Block { char* start; size_t size; int taken; } blocks[BLOCKS];
static int block_count;

static int on_device(const void* p) { return base && (char*)p >= base && (char*)p < base + (1ull << ROOM_BITS); }

static cudaError_t take(void** found, size_t size) {
  size = (size + ALIGN - 1) / ALIGN * ALIGN;
  if (prohibited()) return refuse(cudaErrorStreamCaptureUnsupported, "an allocation in a capture");
  pthread_mutex_lock(&lock);
  if (!base) {
    base = mmap(NULL, 1ull << ROOM_BITS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  }
  cudaError_t error = cudaErrorMemoryAllocation;
  if (base != MAP_FAILED && used + size <= total_memory()) {
    int best = -1;
    for (int i = 0; i < block_count; i++)
      if (!blocks[i].taken && blocks[i].size >= size && (best < 0 || blocks[i].size < blocks[best].size)) best = i;
    char* end = block_count ? blocks[block_count - 1].start + blocks[block_count - 1].size : base;
    if (best < 0 && block_count < BLOCKS && end + size <= base + (1ull << ROOM_BITS)) {
      best = block_count++;
      blocks[best] = (struct Block){end, size, 0};
    }
    if (best >= 0) {
      blocks[best].taken = 1;
      used += blocks[best].size;
      *found = blocks[best].start;
      counts.allocations++;
      error = cudaSuccess;
    }
  }
  pthread_mutex_unlock(&lock);
  return error ? refuse(error, "an allocation") : cudaSuccess;
}
cudaError_t cudaMalloc(void** found, size_t size) { return take(found, size); }
cudaError_t cudaMallocAsync(void** found, size_t size, cudaStream_t stream) { return take(found, size); }
cudaError_t cudaFree(void* p) {
  if (!p) return cudaSuccess;
  if (prohibited()) return refuse(cudaErrorStreamCaptureUnsupported, "cudaFree in a capture");
  pthread_mutex_lock(&lock);
  cudaError_t error = cudaErrorInvalidValue;
  for (int i = 0; i < block_count; i++)
    if (blocks[i].start == p && blocks[i].taken) {
      blocks[i].taken = 0;
      used -= blocks[i].size;
      char* page = (char*)(((size_t)blocks[i].start + 4095) / 4096 * 4096);
      char* end = blocks[i].start + blocks[i].size;
      if (end > page) madvise(page, (end - page) / 4096 * 4096, MADV_DONTNEED);
      error = cudaSuccess;
    }
  pthread_mutex_unlock(&lock);
  return error ? refuse(error, "cudaFree") : cudaSuccess;
}
cudaError_t cudaFreeAsync(void* p, cudaStream_t stream) { return cudaFree(p); }
cudaError_t cudaMemGetInfo(size_t* left, size_t* total) {
  *total = total_memory();
  *left = *total - used;
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** found, size_t size, unsigned flags) {
  return posix_memalign(found, 4096, size ? size : 1) ? refuse(cudaErrorMemoryAllocation, "host memory") : cudaSuccess;
}
cudaError_t cudaFreeHost(void* p) { free(p); return cudaSuccess; }
cudaError_t cudaHostRegister(void* p, size_t size, unsigned flags) { return cudaSuccess; }
cudaError_t cudaHostUnregister(void* p) { return cudaSuccess; }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes* found, const void* p) {
  memset(found, 0, sizeof *found);
  found->type = on_device(p) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  if (on_device(p)) found->devicePointer = (void*)p;
  return cudaSuccess;
}
/* what is read back is zeros: no kernel has written anything */
static cudaError_t copy(void* to, const void* from, size_t size) {
  if (!on_device(to)) on_device(from) ? memset(to, 0, size) : memcpy(to, from, size);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
  Stream* s = stream_of(stream);
  work_on(s);
  return s->capture ? cudaSuccess : copy(to, from, size);
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t size, enum cudaMemcpyKind kind) {
  if (prohibited()) return refuse(cudaErrorStreamCaptureUnsupported, "cudaMemcpy in a capture");
  return copy(to, from, size);
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, enum cudaMemcpyKind kind, cudaStream_t stream) {
  Stream* s = stream_of(stream);
  work_on(s);
  for (size_t i = 0; !s->capture && i < height; i++)
    copy((char*)to + i * to_pitch, (const char*)from + i * from_pitch, width);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t size, cudaStream_t stream) {
  work_on(stream_of(stream));
  return cudaSuccess;
}
cudaError_t cudaMemset(void* p, int value, size_t size) { return cudaSuccess; }

/* ---- streams, events, captures */
static Stream* make_stream(int priority) {
  Stream* stream = calloc(1, sizeof *stream);
  stream->priority = priority;
  pthread_mutex_lock(&lock);
  stream->next = streams;
  streams = stream;
  pthread_mutex_unlock(&lock);
  return stream;
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* found, unsigned flags, int priority) {
  *found = (cudaStream_t)make_stream(priority);
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* found, unsigned flags) {
  return cudaStreamCreateWithPriority(found, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t* found) { return cudaStreamCreateWithPriority(found, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  *priority = stream_of(stream)->priority;
  return cudaSuccess;
}
static cudaError_t wait_for_stream(cudaStream_t stream) {
  if (stream_of(stream)->capture) return refuse(cudaErrorStreamCaptureUnsupported, "a wait for a captured stream");
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return wait_for_stream(stream); }
cudaError_t cudaStreamQuery(cudaStream_t stream) { return wait_for_stream(stream); }
cudaError_t cudaDeviceSynchronize(void) {
  if (prohibited()) return refuse(cudaErrorStreamCaptureUnsupported, "a wait for the device in a capture");
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  *event = (cudaEvent_t)calloc(1, sizeof(Event));
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { free(event); return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream) {
  Event* event = (Event*)handle;
  event->stream = stream_of(stream);
  event->capture = event->stream->capture;
  event->seconds = now();
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  return cudaEventRecord(event, stream);
}
static cudaError_t wait_for_event(cudaEvent_t event) {
  return ((Event*)event)->capture ? refuse(cudaErrorCapturedEvent, "a wait for a captured event") : cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return wait_for_event(event); }
cudaError_t cudaEventQuery(cudaEvent_t event) { return wait_for_event(event); }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  double passed = (((Event*)end)->seconds - ((Event*)start)->seconds) * 1e3;
  *milliseconds = passed < 1e-3 ? 1e-3f : (float)passed;
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event_handle, unsigned flags) {
  Stream* stream = stream_of(handle);
  Event* event = (Event*)event_handle;
  if (!event->capture) {
    /* work from before a capture cannot be a part of it */
    return stream->capture && event->stream ? refuse(cudaErrorStreamCaptureIsolation, "an outer event") : cudaSuccess;
  }
  if (stream->capture && stream->capture != event->capture)
    return refuse(cudaErrorStreamCaptureMerge, "two captures in one");
  if (!stream->capture) {
    if (stream == &legacy) return refuse(cudaErrorStreamCaptureImplicit, "the legacy stream in a capture");
    stream->capture = event->capture;
    stream->id = event->stream->id;
    stream->origin = 0;
  }
  if (event->stream && event->stream->capture == stream->capture) event->stream->pending = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t handle, enum cudaStreamCaptureMode mode) {
  Stream* stream = stream_of(handle);
  if (stream == &legacy) return refuse(cudaErrorStreamCaptureUnsupported, "a capture of the legacy stream");
  if (stream->capture) return refuse(cudaErrorIllegalState, "a capture in a capture");
  stream->capture = calloc(1, sizeof(Graph));
  stream->origin = 1;
  stream->mode = mode;
  stream->id = __sync_add_and_fetch(&captures_begun, 1);
  if (mode != cudaStreamCaptureModeRelaxed) thread_capture = stream->capture;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  Stream* stream = stream_of(handle);
  if (!stream->capture || !stream->origin) return refuse(cudaErrorIllegalState, "the end of no capture");
  Graph* captured = stream->capture;
  cudaError_t error = cudaSuccess;
  pthread_mutex_lock(&lock);
  for (Stream* other = streams; other; other = other->next)
    if (other->capture == captured) {
      if (other->pending) error = cudaErrorStreamCaptureUnjoined;
      other->capture = NULL;
      other->pending = other->origin = 0;
    }
  counts.captures++;
  counts.captured = captured->nodes;
  pthread_mutex_unlock(&lock);
  thread_capture = NULL;
  *graph = error ? NULL : (cudaGraph_t)captured;
  return error ? refuse(error, "a stream that was not joined") : cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus* status) {
  *status = stream_of(stream)->capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, enum cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges,
                                     size_t* count) {
  Stream* stream = stream_of(handle);
  cudaStreamIsCapturing(handle, status);
  if (id) *id = stream->id;
  if (graph) *graph = (cudaGraph_t)stream->capture;
  if (nodes) *nodes = NULL;
  if (edges) *edges = NULL;
  if (count) *count = 0;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode* mode) {
  enum cudaStreamCaptureMode before = thread_mode;
  thread_mode = *mode;
  *mode = before;
  return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  *count = ((Graph*)graph)->nodes;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* made, cudaGraph_t graph, unsigned long long flags) {
  Graph* copied = malloc(sizeof(Graph));
  *copied = *(Graph*)graph;
  *made = (cudaGraphExec_t)copied;
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  work_on(stream_of(stream));
  __sync_add_and_fetch(&counts.replays, 1);
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { free(graph); return cudaSuccess; }

/* ---- kernels */
static cudaError_t launched(Stream* stream, unsigned gx, unsigned gy, unsigned gz, unsigned threads, size_t shared) {
  if (!gx || !gy || !gz || gy > 65535 || gz > 65535 || gx > 2147483647u || !threads || threads > 1024 ||
      shared > 232448)
    return refuse(cudaErrorInvalidConfiguration, "a launch");
  work_on(stream);
  return cudaSuccess;
}
static __thread struct Call { dim3 grid, block; size_t shared; void* stream; } calls[8];
static __thread int call_count;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  if (call_count < 8) calls[call_count++] = (struct Call){grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  struct Call* call = &calls[--call_count];
  *grid = call->grid;
  *block = call->block;
  *shared = call->shared;
  *(void**)stream = call->stream;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* f, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t s) {
  __sync_add_and_fetch(&counts.runtime_launches, 1);
  return launched(stream_of(s), grid.x, grid.y, grid.z, block.x * block.y * block.z, shared);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* f, void** arguments) {
  return cudaLaunchKernel(f, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes, config->stream);
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* f) {
  *kernel = (cudaKernel_t)f;
  return cudaSuccess;
}
void** __cudaRegisterFatBinary(void* binary) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void** handle) {}
void __cudaUnregisterFatBinary(void** handle) {}
char __cudaInitModule(void** handle) { return 0; }
void __cudaRegisterFunction(void** handle, const char* f, char* name, const char* device_name, int limit, uint3* tid,
                            uint3* bid, dim3* block, dim3* grid, int* size) {}
void __cudaRegisterVar(void** handle, char* var, char* address, const char* name, int ext, size_t size, int constant,
                       int global) {}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes* found, const void* f) {
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = 1024;
  found->numRegs = 64;
  found->binaryVersion = found->ptxVersion = 90;
  found->maxDynamicSharedSizeBytes = 232448;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* f, enum cudaFuncAttribute which, int value) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* f, int threads,
                                                                   size_t shared, unsigned flags) {
  *blocks = 2;
  return cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void** p, const void* symbol) { return take(p, 4096); }
cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* from, size_t size, size_t offset,
                               enum cudaMemcpyKind kind) {
  return cudaSuccess;
}
cudaError_t cudaProfilerStart(void) { return cudaSuccess; }
cudaError_t cudaProfilerStop(void) { return cudaSuccess; }

/* ---- the driver, as Triton and torch use it */
CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) { *version = CUDART_VERSION; return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = cudaGetErrorString((cudaError_t)error);
  return CUDA_SUCCESS;
}
CUresult cuGetErrorName(CUresult error, const char** text) { return cuGetErrorString(error, text); }
CUresult cuPointerGetAttribute(void* found, CUpointer_attribute which, CUdeviceptr p) {
  if (!on_device((void*)p)) return CUDA_ERROR_INVALID_VALUE;
  *(CUdeviceptr*)found = p;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetDevice(CUdevice* device) { *device = 0; return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext* context) { *context = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int index) { *device = index; return CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int* count) { *count = 1; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice device) {
  *value = attribute(which);
  return CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  if (prohibited()) return (CUresult)refuse(cudaErrorStreamCaptureUnsupported, "loading a module in a capture");
  __sync_add_and_fetch(&counts.modules, 1);
  *module = (CUmodule)image;
  return CUDA_SUCCESS;
}
CUresult cuModuleLoad(CUmodule* module, const char* path) { return cuModuleLoadData(module, path); }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* f, CUmodule module, const char* name) {
  *f = (CUfunction)1;
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction f) {
  *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute which, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache value) { return CUDA_SUCCESS; }
CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction f, void** arguments, void** extra) {
  __sync_add_and_fetch(&counts.driver_launches, 1);
  unsigned threads = config->blockDimX * config->blockDimY * config->blockDimZ;
  return (CUresult)launched(stream_of(config->hStream), config->gridDimX, config->gridDimY, config->gridDimZ, threads,
                            config->sharedMemBytes);
}
CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, CUstream stream, void** arguments, void** extra) {
  __sync_add_and_fetch(&counts.driver_launches, 1);
  return (CUresult)launched(stream_of(stream), gx, gy, gz, bx * by * bz, shared);
}
CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction f, const CUlaunchConfig* config) {
  *clusters = 1;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetLimit(size_t* value, CUlimit which) { *value = 0; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit which, size_t value) { return CUDA_SUCCESS; }
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  return CUDA_SUCCESS;
}
static CUresult unknown_to_the_driver(void) { return CUDA_ERROR_NOT_SUPPORTED; }
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** f, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult* status) {
  *f = dlsym(RTLD_DEFAULT, name);
  if (!*f) *f = (void*)unknown_to_the_driver;
  if (status) *status = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

/* ---- cuBLAS: a handle is the stream it works on */
typedef struct { Stream* stream; } Blas;
int cublasCreate_v2(Blas** handle) { *handle = calloc(1, sizeof(Blas)); (*handle)->stream = &legacy; return 0; }
int cublasDestroy_v2(Blas* handle) { free(handle); return 0; }
int cublasSetStream_v2(Blas* handle, cudaStream_t stream) { handle->stream = stream_of(stream); return 0; }
int cublasGetMathMode(Blas* handle, int* mode) { *mode = 0; return 0; }
int cublasGetPointerMode_v2(Blas* handle, int* mode) { *mode = 0; return 0; }
size_t cublasLtGetVersion(void) { return 130002; }
static int gemm(Stream* stream) {
  __sync_add_and_fetch(&counts.gemms, 1);
  work_on(stream);
  return 0;
}
#define GEMM(name) int name(Blas* handle) { return gemm(handle->stream); }
GEMM(cublasGemmEx)
GEMM(cublasGemmStridedBatchedEx)
GEMM(cublasSgemm_v2)
GEMM(cublasDgemm_v2)
GEMM(cublasSgemmEx)
GEMM(cublasSgemmStridedBatched)
GEMM(cublasDgemmStridedBatched)
GEMM(cublasSgemv_v2)
GEMM(cublasDgemv_v2)
GEMM(cublasDotEx)
GEMM(cublasSdot_v2)
GEMM(cublasDdot_v2)
static int made(void** handle) { *handle = malloc(8); return 0; }
int cublasLtMatmulDescCreate(void** handle) { return made(handle); }
int cublasLtMatrixLayoutCreate(void** handle) { return made(handle); }
int cublasLtMatmulPreferenceCreate(void** handle) { return made(handle); }
int cublasLtMatmulDescDestroy(void* handle) { free(handle); return 0; }
int cublasLtMatrixLayoutDestroy(void* handle) { free(handle); return 0; }
int cublasLtMatmulPreferenceDestroy(void* handle) { free(handle); return 0; }
/* the struct of a result: an algorithm of 64 bytes, then workspace size and state, which is 0 for success */
int cublasLtMatmulAlgoGetHeuristic(void* handle, void* desc, void* a, void* b, void* c, void* d, void* preference,
                                   int asked, void* results, int* found) {
  memset(results, 0, 80);
  *found = 1;
  return 0;
}
int cublasLtMatmul(void* handle, void* desc, const void* alpha, const void* a, void* da, const void* b, void* db,
                   const void* beta, const void* c, void* dc, void* d, void* dd, const void* algorithm, void* workspace,
                   size_t size, cudaStream_t stream) {
  return gemm(stream_of(stream));
}

/* ---- what was counted, for ctypes */
void standin_counts(long* found) { memcpy(found, &counts, sizeof counts); }
int standin_launch(void* stream) {
  dim3 one = {1, 1, 1};
  return cudaLaunchKernel(NULL, one, one, NULL, 0, stream);
}
