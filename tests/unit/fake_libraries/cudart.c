/* A libcudart without a GPU: "device memory" is a file in $FAKE_CUDART_DIR, so that IPC handles
 * work between processes and real bytes move.
 *
 * CUDA_VISIBLE_DEVICES   entries whose first digit is the physical device: "1,0" or "GPU-1-..."
 * FAKE_CUDART_FAULTS     "accessor>owner:fault,..." in physical devices; fault is one of
 *   noaccess  cudaIpcOpenMemHandle fails        wedge  cudaIpcOpenMemHandle never returns
 *   nowrite   writes do not arrive              noread  other bytes are read
 *   crash     the process aborts
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum {
  MAX = 256,
  OK = 0,
  INVALID_VALUE = 1,
  NO_MEMORY = 2,
  INVALID_DEVICE = 101,
  INVALID_HANDLE = 400,
  PEER_UNSUPPORTED = 217
};

typedef struct {
  char* address;
  size_t size;
  int owner;
  int mapped; /* by cudaIpcOpenMemHandle, not cudaMalloc */
  char path[512];
} Block;

typedef struct {
  char name[40];
  int owner;
  long long size;
  char rest[8];
} Handle; /* 64 bytes */
_Static_assert(sizeof(Handle) == 64, "a cudaIpcMemHandle_t");

static Block blocks[MAX];
static int current, serial;

static int physical(int device) {
  const char* visible = getenv("CUDA_VISIBLE_DEVICES");
  if (!visible) return device < 2 ? device : -1;
  char text[256];
  snprintf(text, sizeof text, "%s", visible);
  for (char* entry = strtok(text, ","); entry; entry = strtok(NULL, ","))
    if (device-- == 0) return entry[strcspn(entry, "0123456789")] - '0';
  return -1;
}

static const char* fault(int accessor, int owner) {
  static char text[256], key[32];
  const char* all = getenv("FAKE_CUDART_FAULTS");
  if (!all) return "";
  snprintf(text, sizeof text, "%s", all);
  snprintf(key, sizeof key, "%d>%d:", accessor, owner);
  for (char* one = strtok(text, ","); one; one = strtok(NULL, ","))
    if (!strncmp(one, key, strlen(key))) return one + strlen(key);
  return "";
}

static Block* find(const void* pointer) {
  for (int i = 0; i < MAX; i++)
    if (blocks[i].address && (char*)pointer >= blocks[i].address &&
        (char*)pointer < blocks[i].address + blocks[i].size)
      return &blocks[i];
  return NULL;
}

static int map(Block* block, int flags) {
  int file = open(block->path, flags, 0600);
  if (file < 0) return INVALID_HANDLE;
  if ((flags & O_CREAT) && ftruncate(file, block->size)) {
    close(file);
    return NO_MEMORY;
  }
  void* address = mmap(NULL, block->size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (address == MAP_FAILED) return NO_MEMORY;
  block->address = address;
  return OK;
}

static Block* unused(void) {
  for (int i = 0; i < MAX; i++)
    if (!blocks[i].address) return &blocks[i];
  return NULL;
}

static int drop(void* pointer, int mapped) {
  Block* block = find(pointer);
  if (!block || block->address != pointer || block->mapped != mapped) return INVALID_VALUE;
  munmap(block->address, block->size);
  if (!mapped) unlink(block->path);
  block->address = NULL;
  return OK;
}

const char* cudaGetErrorString(int error) {
  switch (error) {
    case OK:
      return "no error";
    case INVALID_VALUE:
      return "invalid argument";
    case NO_MEMORY:
      return "out of memory";
    case INVALID_DEVICE:
      return "invalid device ordinal";
    case PEER_UNSUPPORTED:
      return "peer access is not supported between these two devices";
    default:
      return "invalid resource handle";
  }
}
int cudaGetLastError(void) { return OK; }
int cudaGetDeviceCount(int* count) {
  for (*count = 0; physical(*count) >= 0; ++*count) {
  }
  return OK;
}
int cudaSetDevice(int device) {
  if (physical(device) < 0) return INVALID_DEVICE;
  current = device;
  return OK;
}
int cudaDeviceSynchronize(void) { return OK; }
int cudaDeviceReset(void) {
  for (int i = 0; i < MAX; i++)
    if (blocks[i].address) drop(blocks[i].address, blocks[i].mapped);
  return OK;
}
int cudaDeviceCanAccessPeer(int* answer, int device, int peer) {
  *answer = strcmp(fault(physical(device), physical(peer)), "noaccess") != 0;
  return OK;
}
int cudaMalloc(void** pointer, size_t size) {
  Block* block = unused();
  const char* directory = getenv("FAKE_CUDART_DIR");
  if (!block || size > (1u << 30) || !directory) return NO_MEMORY;
  *block = (Block){.size = size, .owner = physical(current)};
  snprintf(block->path, sizeof block->path, "%s/%d-%d", directory, getpid(), serial++);
  int error = map(block, O_RDWR | O_CREAT);
  *pointer = block->address;
  return error;
}
int cudaFree(void* pointer) { return pointer ? drop(pointer, 0) : OK; }
static void move(void* to, const void* from, size_t count) {
  Block *into = find(to), *out = find(from);
  if (into && into->mapped && !strcmp(fault(physical(current), into->owner), "nowrite")) return;
  memmove(to, from, count);
  if (out && out->mapped && !strcmp(fault(physical(current), out->owner), "noread"))
    memset(to, 0, count);
}
int cudaMemset(void* pointer, int value, size_t count) {
  char* bytes = malloc(count);
  memset(bytes, value, count);
  move(pointer, bytes, count);
  free(bytes);
  return OK;
}
int cudaMemcpy(void* to, const void* from, size_t count, int kind) {
  if (kind != 4) return INVALID_VALUE;
  move(to, from, count);
  return OK;
}
int cudaMemcpyAsync(void* to, const void* from, size_t count, int kind, void* stream) {
  (void)stream;
  return cudaMemcpy(to, from, count, kind);
}
int cudaIpcGetMemHandle(Handle* handle, void* pointer) {
  Block* block = find(pointer);
  if (!block || block->mapped) return INVALID_VALUE;
  memset(handle, 0, sizeof *handle);
  snprintf(handle->name, sizeof handle->name, "%s", strrchr(block->path, '/') + 1);
  handle->owner = block->owner;
  handle->size = (long long)block->size;
  return OK;
}
int cudaIpcOpenMemHandle(void** pointer, Handle handle, unsigned flags) {
  const char* what = fault(physical(current), handle.owner);
  if (flags != 1) return INVALID_VALUE;
  if (!strcmp(what, "noaccess")) return PEER_UNSUPPORTED;
  if (!strcmp(what, "crash")) abort();
  while (!strcmp(what, "wedge")) sleep(1000);
  Block* block = unused();
  if (!block) return NO_MEMORY;
  *block = (Block){.size = (size_t)handle.size, .owner = handle.owner, .mapped = 1};
  snprintf(block->path, sizeof block->path, "%s/%s", getenv("FAKE_CUDART_DIR"), handle.name);
  int error = map(block, O_RDWR);
  *pointer = block->address;
  return error;
}
int cudaIpcCloseMemHandle(void* pointer) { return drop(pointer, 1); }
int cudaEventCreate(void** event) { return (*event = malloc(sizeof(double))) ? OK : NO_MEMORY; }
int cudaEventRecord(void* event, void* stream) {
  struct timespec now;
  (void)stream;
  clock_gettime(CLOCK_MONOTONIC, &now);
  *(double*)event = now.tv_sec * 1e3 + now.tv_nsec * 1e-6;
  return OK;
}
int cudaEventSynchronize(void* event) { return event ? OK : INVALID_HANDLE; }
int cudaEventElapsedTime(float* milliseconds, void* start, void* end) {
  *milliseconds = (float)(*(double*)end - *(double*)start);
  return OK;
}
int cudaEventDestroy(void* event) {
  free(event);
  return OK;
}
int cudaThreadExchangeStreamCaptureMode(int* mode) {
  static __thread int mine;
  int before = mine;
  mine = *mode;
  *mode = before;
  return OK;
}
