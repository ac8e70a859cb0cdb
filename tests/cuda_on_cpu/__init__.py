"""A stand-in for CuPy on a CPU, with which the whole CuPy backend runs, its CUDA C++ kernels included.

`include/cuda_emulation.h` lets g++ compile the kernels unchanged.  The threads of a block are fibers of one thread of
the machine, which change at barriers and shuffles: results are the same on every run.  `world.backwards` runs threads
and blocks in reverse order; a kernel that needs a barrier it does not have then gives something else in one of the two
orders, as a rule.  Reported: barriers and shuffles that not all threads reach, shuffles from absent lanes, wild reads
and writes (every array ends at a guard page), misaligned vectors, indices outside fixed-size arrays.  Fresh device
memory and shared memory is NaN.

Work waits in its stream until the host waits for it, as late as a GPU might be; freed memory is spoilt and given out
again as early as CuPy's pools might.  Reported (queues.py): work of two streams on the same memory that nothing orders,
freed memory that another stream still uses, memory of the host that is changed or freed before a copy has run,
addresses whose array is gone.  `pretend(asynchronous=False)` runs everything at once.

`fake_cupy.pretend()` puts the module in the place of `cupy`.  What real CuPy refuses (NumPy arrays in device functions,
implicit downloads, arrays of another device) is refused here, and kernel arguments of a wrong width too, which CuPy
does not notice.  `world.counted()` counts copies between host and device, launches,
and how often the host waits.

What it cannot show: speed; whether nvcc or NVRTC accepts the source; races between blocks, and races between threads
that happen in neither of the two orders; who reads the target of a download too early (it is NaN until then); the GPU's
own rounding of expf, rsqrtf, erff and fused multiply-adds; the order in which cuBLAS adds; TF32; how much memory cuBLAS
and the context need.
"""
