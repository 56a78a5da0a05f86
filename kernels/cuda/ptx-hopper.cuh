/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Named wrappers round the PTX that only sm_90 and sm_90a have: mbarriers with
 * transaction counts, bulk and tensor copies, clusters, programmatic dependent
 * launch, and what stands round wgmma (wgmma.cuh has the products themselves).
 */
#ifndef FQ_KERNELS_CUDA_PTX_HOPPER_CUH
#define FQ_KERNELS_CUDA_PTX_HOPPER_CUH

#include "ptx.cuh"

/* ---- Programmatic dependent launch ---------------------------------------------------------- */

/* The next kernel of the stream may start; it still waits for this one in grid_wait(). */
static __device__ __forceinline__ void grid_launch_dependents() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

/* Until the kernels before this one are done and what they wrote is visible. */
static __device__ __forceinline__ void grid_wait() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

/* ---- mbarriers ------------------------------------------------------------------------------ */

static __device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

/* Makes initialized barriers visible to the cluster and to the copy engine. */
static __device__ __forceinline__ void mbarrier_fence_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

/* One arrival, and `bytes` more that copies are to bring before the phase ends. */
static __device__ __forceinline__ void mbarrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

static __device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/*
 * At the same place in the shared memory of another CTA of the cluster.  Says only that this thread
 * has read what it wanted: a release at cluster scope would cost a fence of the whole GPU's memory.
 */
static __device__ __forceinline__ void mbarrier_arrive_at(uint32_t barrier, uint32_t rank) {
    asm volatile("{\n.reg .b32 remote;\n"
                 "mapa.shared::cluster.u32 remote, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
                 "r"(rank)
                 : "memory");
}

/* The same at a cluster_address(). */
static __device__ __forceinline__ void mbarrier_arrive_there(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/* One arrival once the cp.async of this thread so far are done. */
static __device__ __forceinline__ void mbarrier_arrive_copies(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

/* Sleeps until the phase of that parity is over. */
static __device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile("{\n.reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
                 "@done bra over;\n"
                 "bra again;\n"
                 "over:\n}" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
}

/* Whether it is over. */
static __device__ __forceinline__ bool mbarrier_is_over(uint32_t barrier, uint32_t parity) {
    uint32_t over;

    asm volatile("{\n.reg .pred done;\n"
                 "mbarrier.test_wait.parity.shared.b64 done, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, done;\n}"
                 : "=r"(over)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return over;
}

/* ---- Copies by the copy engine -------------------------------------------------------------- */

/* `bytes`, a multiple of 16, from global memory; their arrival counts at the barrier. */
static __device__ __forceinline__ void bulk_copy(uint32_t to, const void *from, uint32_t bytes,
                                                 uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

/* A box of a two-dimensional tensor, x the fast coordinate, into every CTA of the cluster that
 * `mask` names, at the same place in each. */
static __device__ __forceinline__ void
tensor_copy_multicast(uint32_t to, const void *map, int x, int y, uint32_t barrier, uint16_t mask) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
                 "l"(map), "r"(x), "r"(y), "r"(barrier), "h"(mask)
                 : "memory");
}

/* The same into this CTA's shared memory alone. */
static __device__ __forceinline__ void tensor_copy(uint32_t to, const void *map, int x, int y,
                                                   uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3}], [%4];" ::"r"(to),
                 "l"(map), "r"(x), "r"(y), "r"(barrier)
                 : "memory");
}

/* The other way: a box out of this CTA's shared memory; what lies past the tensor's ends is left
 * out, but of a row's end only whole 16 bytes.  Queued with others of this thread that are not
 * committed yet. */
static __device__ __forceinline__ void tensor_store(const void *map, int x, int y, uint32_t from) {
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map),
        "r"(x), "r"(y), "r"(from)
        : "memory");
}
static __device__ __forceinline__ void tensor_store_commit() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
/* Until all but the last PENDING commits of this thread have read their shared memory. */
template <int PENDING> static __device__ __forceinline__ void tensor_store_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}
/* What this thread wrote to shared memory, the copy engine will read. */
static __device__ __forceinline__ void fence_copy_engine() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
/* The same of global memory: what it wrote, or has seen written. */
static __device__ __forceinline__ void fence_copy_engine_global() {
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

/* Asks for the line at an address of global memory, to be in the L2 cache. */
static __device__ __forceinline__ void prefetch_l2(const void *address) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address) : "memory");
}

/* Asks for a tensor map ahead of the copies by it. */
static __device__ __forceinline__ void prefetch_tensor_map(const void *map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/* A flag in global memory: who sees it sees what the CTA wrote before a barrier ahead of it. */
static __device__ __forceinline__ void store_release(unsigned *flag, unsigned value) {
    asm volatile("fence.acq_rel.gpu;\nst.relaxed.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value)
                 : "memory");
}

static __device__ __forceinline__ unsigned load_acquire(const unsigned *flag) {
    unsigned value;

    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    return value;
}

/* 16 bytes by this thread, past L1; takes only the first `bytes` and writes zeros for the rest. */
static __device__ __forceinline__ void cp_async_16(uint32_t to, const void *from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
                 : "memory");
}

static __device__ __forceinline__ void cp_async_16(uint32_t to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

/* ---- Clusters and parts of a CTA ------------------------------------------------------------ */

/* Both halves of a barrier of the cluster; all threads of a warp together.  It orders nothing but
 * mbarrier_init() ahead of mbarrier_fence_init(): with release it is a fence of the whole device's
 * memory. */
static __device__ __forceinline__ void cluster_arrive_relaxed() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
static __device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
}

/* The same place in the shared memory of the cluster's CTA of that rank. */
static __device__ __forceinline__ uint32_t cluster_address(uint32_t address, uint32_t rank) {
    uint32_t there;

    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}

/* Four numbers to a cluster_address(); their arrival counts at the barrier there, as a copy's does.
 */
static __device__ __forceinline__ void cluster_send(uint32_t to, const float *v, uint32_t barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 "
                 "[%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
                 "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(barrier)
                 : "memory");
}

/* True for one thread of a warp that is here as a whole; better than a lane's number, in that the
 * compiler knows it for one. */
static __device__ __forceinline__ bool elect_one() {
    uint32_t elected;

    asm volatile("{\n.reg .pred one;\n"
                 "elect.sync _|one, 0xffffffff;\n"
                 "selp.u32 %0, 1, 0, one;\n}"
                 : "=r"(elected));
    return elected;
}

/* A barrier of `threads` threads of the CTA; id 0 is __syncthreads()'s. */
static __device__ __forceinline__ void named_barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/* Counts this warp in at a named barrier, and goes on. */
static __device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

template <int REGISTERS> static __device__ __forceinline__ void registers_give() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS> static __device__ __forceinline__ void registers_take() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

/* ---- Round wgmma ---------------------------------------------------------------------------- */

/* Before the first wgmma, and after its register operands were written. */
static __device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

static __device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int PENDING> static __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

/*
 * A tile of X in shared memory: rows of 128 bytes (64 columns), the 16-byte pieces of row r at
 * piece ^ (r % 8), eight rows to 1024 bytes, on which the tile starts.  wgmma_tile() is the half of
 * its descriptor that tells where; one k16 step further is WGMMA_STEP more, one byte 1/16.
 */
#define WGMMA_STEP 2
static __device__ __forceinline__ uint32_t wgmma_tile(uint32_t address) {
    return ((address & 0x3ffff) >> 4) | 1u << 16;
}

/* The other half: 1024 bytes from eight rows to the next, pieces permuted over 128 bytes. */
static __device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t tile) {
    uint64_t descriptor;

    asm("mov.b64 %0, {%1, %2};" : "=l"(descriptor) : "r"(tile), "r"((1024u >> 4) | 1u << 30));
    return descriptor;
}

/* Four 8×8 matrices of two-byte elements, v[i] the i-th's fragment (row lane / 4, columns 2 ·
 * (lane % 4) and one more), turned: lane 8i + j gives the address of the i-th's column j. */
static __device__ __forceinline__ void store_turned(uint32_t to, const uint32_t (&v)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to),
                 "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
                 : "memory");
}

/* Where piece `piece` of row `row` of such a tile lies. */
static __device__ __forceinline__ uint32_t wgmma_piece(int row, int piece) {
    return row * 128 + ((piece ^ (row & 7)) << 4);
}

#endif
