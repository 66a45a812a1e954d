"""Run the PTX that Triton compiles for sm_80 on the CPU, and see what no interpreter of the source can.

Triton's interpreter runs a kernel's source tile by tile; it knows no warps, no shared memory, no barriers. This
runs the compiled code instead, on the memory of NumPy arrays and CPU tensors:

    with emulating("together") as launches:      # launchers run unchanged on CPU tensors
        compress_window(..., backend="triton")
    assert not any(launch.problems for launch in launches)

program.py        PTX text -> basic blocks of instructions
memory.py         global and shared memory that know their bounds and who touched what last; the counts
instructions.py   what each instruction does, in NumPy; unknown ones are an error
machine.py        grids, warps, divergence, barriers
driver.py         a Triton driver whose device is this

Threads of a launch are rows of arrays, ``[warps, 32]``, and an instruction is one NumPy expression over all warps that
have come to it. Between barriers the order of warps is free: "together" runs them in lockstep, which is fast, and
"forward", "backward" and "shuffled" run each to its next barrier before the next one starts. A race is reported in any
order, because it is found by who touched a byte since the last barrier, not by a wrong result.

Reported: accesses out of bounds or misaligned; reads of shared memory that nobody wrote, or that an asynchronous
copy is still writing; two warps, one of them writing, at one address without a barrier between them, in shared
memory and in global memory; two blocks, one of them writing, at one global address; two threads that store
different values to one address at once; barriers, shuffles, votes and matrix instructions that a part of a warp has
not come to.

Not modelled: wgmma, TMA, mbarriers, tcgen05 and clusters (sm_90 and newer builds that use them are compiled and
inspected, never run here); weak memory order between threads of one warp, which run in lockstep; caches; time.
Approximate instructions (ex2, div.full, sqrt.approx) round correctly here, as no GPU promises to. Writing the value
that is there already is not called a race with another write."""

from .driver import emulating
from .machine import ORDERS, Launch, run

__all__ = ["ORDERS", "Launch", "emulating", "run"]
