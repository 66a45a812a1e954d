"""Runs the PTX that Triton compiles for sm_80 on the CPU, to find bugs that an interpreter of the source cannot.

Triton's interpreter runs a kernel's source tile by tile. It models no warps, shared memory or barriers. This emulator
runs the compiled code instead, on the memory of NumPy arrays and CPU tensors:

    with emulating("together") as launches:      # launchers run unchanged on CPU tensors
        compress_window(..., backend="triton")
    assert not any(launch.problems for launch in launches)

program.py        PTX text -> basic blocks of instructions
memory.py         global and shared memory with bounds and last accesses; the counts
instructions.py   every instruction in NumPy; unknown ones are an error
machine.py        grids, warps, divergence, barriers
driver.py         a Triton driver whose device is the emulator

Threads of a launch are rows of arrays, ``[warps, 32]``, and an instruction is one NumPy expression over all warps that
have reached it. Between barriers, warps may run in any order. "together" runs them in lockstep, which is fast.
"forward", "backward" and "shuffled" run each warp to its next barrier before the next one starts. A race is reported in
any order, because it is detected from the accesses to a byte since the last barrier, not from a wrong result.

It reports accesses out of bounds or misaligned; reads of shared memory that was never written, or that an asynchronous
copy is still writing; two warps that access one address, one of them writing, without a barrier between them, in shared
or global memory; two blocks that access one global address, one of them writing; two threads that store different
values to one address at once; barriers, shuffles, votes and matrix instructions that only part of a warp has reached.

Not modelled: wgmma, TMA, mbarriers, tcgen05 and clusters (sm_90 and newer builds that use them are compiled and
inspected, never run here); weak memory order between threads of one warp, which run in lockstep; caches; time.
Approximate instructions (ex2, div.full, sqrt.approx) round correctly here, which no GPU guarantees. Writing the same
value again is not reported as a race with another write."""

from .driver import emulating
from .machine import ORDERS, Launch, run

__all__ = ["ORDERS", "Launch", "emulating", "run"]
