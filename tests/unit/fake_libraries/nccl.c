/* An NCCL without a GPU, for several ranks that are threads of one process: buffers are host
 * memory, every collective is made of messages in mailboxes, and a send never waits, so nothing
 * deadlocks. Streams are ignored. -DFAKE_NCCL_OLD leaves out what NCCL 2.12 lacked.
 *
 * fake_nccl_calls() returns the names of the calls since fake_nccl_reset(), "a b c ".
 * fake_nccl_fail(result) makes the next collective fail with an ncclResult_t.
 */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { RANKS = 8, OK = 0, CUDA_ERROR = 1, INVALID_ARGUMENT = 4, REMOTE_ERROR = 6 };

typedef struct Message {
  struct Message* next;
  size_t size;
  char bytes[];
} Message;
typedef struct {
  char internal[128];
} UniqueId;
typedef struct World {
  struct World* next;
  UniqueId id;
  int size, joined;
  Message* box[RANKS][RANKS];
} World;
typedef struct {
  World* world;
  int rank, dead;
} Comm;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static World* worlds;
static char calls[1 << 16];
static int failing, serial;

static void note(const char* name) {
  pthread_mutex_lock(&lock);
  if (strlen(calls) + strlen(name) + 2 < sizeof calls) strcat(strcat(calls, name), " ");
  pthread_mutex_unlock(&lock);
}
const char* fake_nccl_calls(void) { return calls; }
void fake_nccl_reset(void) {
  calls[0] = 0;
  failing = 0;
}
void fake_nccl_fail(int result) { failing = result; }

static int fails(void) {
  int result = failing;
  failing = 0;
  return result;
}

static const size_t widths[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};

static void push(Comm* comm, int to, const void* bytes, size_t size) {
  Message* message = malloc(sizeof *message + size);
  message->next = NULL;
  message->size = size;
  memcpy(message->bytes, bytes, size);
  pthread_mutex_lock(&lock);
  Message** end = &comm->world->box[comm->rank][to];
  while (*end) end = &(*end)->next;
  *end = message;
  pthread_cond_broadcast(&changed);
  pthread_mutex_unlock(&lock);
}

/* Waits at most ten seconds: a test that forgets a rank fails, it does not hang. */
static int pop(Comm* comm, int from, void* bytes, size_t size) {
  struct timespec end;
  clock_gettime(CLOCK_REALTIME, &end);
  end.tv_sec += 10;
  pthread_mutex_lock(&lock);
  Message** box = &comm->world->box[from][comm->rank];
  while (!*box)
    if (pthread_cond_timedwait(&changed, &lock, &end)) {
      pthread_mutex_unlock(&lock);
      return REMOTE_ERROR;
    }
  Message* message = *box;
  *box = message->next;
  pthread_mutex_unlock(&lock);
  int error = message->size == size ? OK : INVALID_ARGUMENT;
  if (!error) memcpy(bytes, message->bytes, size);
  free(message);
  return error;
}

static int add(void* into, const void* from, size_t count, int type, int op) {
#define CASE(number, T)                             \
  case number:                                      \
    for (size_t i = 0; i < count; i++) {            \
      T *a = (T*)into + i, b = ((const T*)from)[i]; \
      if (op == 2 ? b > *a : b < *a) {              \
        if (op >= 2) *a = b;                        \
      }                                             \
      if (op == 0) *a += b;                         \
      if (op == 1) *a *= b;                         \
    }                                               \
    return OK
  switch (type) {
    CASE(0, int8_t);
    CASE(1, uint8_t);
    CASE(2, int32_t);
    CASE(4, int64_t);
    CASE(7, float);
    CASE(8, double);
    default:
      return INVALID_ARGUMENT;
  }
}

/* Everybody's `count` elements at each rank's offset go to that rank, which adds them. */
static int reduce_parts(Comm* c, const void* send, void* recv, size_t count, int type, int op,
                        int scatter, int root) {
  size_t size = count * widths[type];
  int W = c->world->size, error = OK;
  for (int to = 0; to < W; to++)
    if (root < 0 || to == root) push(c, to, (const char*)send + (scatter ? to * size : 0), size);
  if (root >= 0 && root != c->rank) return OK;
  char* part = malloc(size + 1);
  for (int from = 0; from < W && !error; from++) {
    error = pop(c, from, part, size);
    if (!error && from == 0) memcpy(recv, part, size);
    if (!error && from > 0) error = add(recv, part, count, type, op);
  }
  free(part);
  return error;
}

const char* ncclGetErrorString(int result) {
  switch (result) {
    case OK:
      return "no error";
    case CUDA_ERROR:
      return "unhandled cuda error";
    case INVALID_ARGUMENT:
      return "invalid argument";
    case REMOTE_ERROR:
      return "remote process exited or there was a network error";
    default:
      return "internal error";
  }
}
int ncclGetUniqueId(UniqueId* id) {
  note("ncclGetUniqueId");
  memset(id, 0, sizeof *id);
  snprintf(id->internal, sizeof id->internal, "world %d", ++serial);
  return OK;
}
int ncclCommInitRank(Comm** comm, int size, UniqueId id, int rank) {
  note("ncclCommInitRank");
  if (size > RANKS || rank >= size) return INVALID_ARGUMENT;
  pthread_mutex_lock(&lock);
  World* world = worlds;
  while (world && memcmp(&world->id, &id, sizeof id)) world = world->next;
  if (!world) {
    world = calloc(1, sizeof *world);
    *world = (World){.next = worlds, .id = id, .size = size};
    worlds = world;
  }
  *comm = calloc(1, sizeof **comm);
  **comm = (Comm){.world = world, .rank = rank};
  world->joined++;
  pthread_cond_broadcast(&changed);
  struct timespec end;
  clock_gettime(CLOCK_REALTIME, &end);
  end.tv_sec += 10;
  int late = 0;
  while (world->joined < size && !late) late = pthread_cond_timedwait(&changed, &lock, &end);
  pthread_mutex_unlock(&lock);
  return late ? REMOTE_ERROR : OK;
}
int ncclAllReduce(const void* s, void* r, size_t n, int t, int op, Comm* c, void* stream) {
  note("ncclAllReduce");
  (void)stream;
  int error = fails();
  return error ? error : reduce_parts(c, s, r, n, t, op, 0, -1);
}
int ncclReduceScatter(const void* s, void* r, size_t n, int t, int op, Comm* c, void* stream) {
  note("ncclReduceScatter");
  (void)stream;
  return reduce_parts(c, s, r, n, t, op, 1, -1);
}
int ncclReduce(const void* s, void* r, size_t n, int t, int op, int root, Comm* c, void* stream) {
  note("ncclReduce");
  (void)stream;
  return reduce_parts(c, s, r, n, t, op, 0, root);
}
int ncclAllGather(const void* s, void* r, size_t n, int t, Comm* c, void* stream) {
  note("ncclAllGather");
  (void)stream;
  size_t size = n * widths[t];
  int error = OK;
  for (int to = 0; to < c->world->size; to++) push(c, to, s, size);
  for (int from = 0; from < c->world->size && !error; from++)
    error = pop(c, from, (char*)r + from * size, size);
  return error;
}
int ncclBroadcast(const void* s, void* r, size_t n, int t, int root, Comm* c, void* stream) {
  note("ncclBroadcast");
  (void)stream;
  if (c->rank == root)
    for (int to = 0; to < c->world->size; to++) push(c, to, s, n * widths[t]);
  return pop(c, root, r, n * widths[t]);
}
int ncclSend(const void* s, size_t n, int t, int to, Comm* c, void* stream) {
  note("ncclSend");
  (void)stream;
  push(c, to, s, n * widths[t]);
  return OK;
}
int ncclRecv(void* r, size_t n, int t, int from, Comm* c, void* stream) {
  note("ncclRecv");
  (void)stream;
  return pop(c, from, r, n * widths[t]);
}
int ncclCommDestroy(Comm* c) {
  note("ncclCommDestroy");
  c->dead = 1;
  return OK;
}
int ncclGroupStart(void) {
  note("ncclGroupStart");
  return OK;
}
int ncclGroupEnd(void) {
  note("ncclGroupEnd");
  return OK;
}

#ifdef FAKE_NCCL_OLD
int ncclGetVersion(int* version) {
  *version = 21210;
  return OK;
}
#else
int ncclGetVersion(int* version) {
  *version = 22809;
  return OK;
}
const char* ncclGetLastError(Comm* c) {
  (void)c;
  return "the fake's last error";
}
int ncclCommAbort(Comm* c) {
  note("ncclCommAbort");
  c->dead = 1;
  return OK;
}
int ncclCommGetAsyncError(Comm* c, int* state) {
  *state = c->dead ? REMOTE_ERROR : OK;
  return OK;
}
int ncclCommInitRankConfig(Comm** c, int size, UniqueId id, int rank, const unsigned* config) {
  /* size_t size; unsigned magic, version; int blocking; ... */
  if (config[2] != 0xcafebeef || *(const size_t*)config != 48) return INVALID_ARGUMENT;
  return ncclCommInitRank(c, size, id, rank);
}
int ncclMemAlloc(void** pointer, size_t size) {
  return (*pointer = malloc(size)) ? OK : CUDA_ERROR;
}
int ncclMemFree(void* pointer) {
  free(pointer);
  return OK;
}
int ncclCommWindowRegister(Comm* c, void* buffer, size_t size, void** window, int flags) {
  (void)c;
  note("ncclCommWindowRegister");
  if (flags != 1 || !size) return INVALID_ARGUMENT;
  *window = buffer;
  return OK;
}
int ncclCommWindowDeregister(Comm* c, void* window) {
  (void)c;
  note("ncclCommWindowDeregister");
  return window ? OK : INVALID_ARGUMENT;
}
#endif
