# %% [markdown]
# # 05 From loops to the roof
#
# BEiT spends nine tenths of its time in one operation: the matrix product. This tutorial writes that product nine
# times, from three nested loops in Python to the kernel that minibeit uses, measures each version, and says what held
# it back. The losers stay here with their times; the package holds the winner.
#
# You need to know what a matrix product is, and that a processor has registers and caches. The times in this notebook
# are those of the machine that built it; run it to get your own.
#
# Everything runs on **one thread** until the last section, so that the steps can be compared.

# %%
import os

for library in ("OPENBLAS", "MKL", "OMP", "VECLIB"):  # read by NumPy's BLAS when NumPy is imported
    os.environ[f"{library}_NUM_THREADS"] = os.environ[f"{library}_MAXIMUM_THREADS"] = "1"

import time

import matplotlib.pyplot as plt
import numpy as np
from numba import njit

from minibeit import BeitConfig, BeitForImageClassification
from minibeit.bench import roof
from minibeit.bench.measure import cpu_name
from minibeit.bench.profile import profile
from minibeit.ops import get_ops
from minibeit.ops.activations import gelu
from minibeit.ops.numba_cpu.kernels.micro import multiply_tile
from minibeit.ops.numba_cpu.memory import padded
from minibeit.ops.numba_cpu.pack import pack_matrix
from minibeit.ops.numba_cpu.pool import default_num_threads, num_threads
from minibeit.ops.numba_cpu.target import MR, NR
from minibeit.params import Linear

plt.rcParams.update({"figure.dpi": 80, "font.size": 9})

# %% [markdown]
# ## 1. The work, and the clock
#
# The work is the first layer of the MLP in BEiT-base: N = 197 tokens of width D = 768 become N vectors of width
# F = 3072. `x` is (N, D), `W` is (F, D), and the result is `y = x Wᵀ`, (N, F). Each of the N F results is a sum of D
# products: 2 N D F = 930 million operations, counting a multiplication and an addition as two. The model computes about
# 48 layers of this kind for one image.
#
# We take the **minimum** of several runs: other programs can only make a run slower. Slow versions get fewer rows; what
# counts is the rate, in operations per second.

# %%
N, D, F = 197, 768, 3072
rng = np.random.default_rng(0)
x = rng.standard_normal((N, D), dtype=np.float32)
W = rng.standard_normal((F, D), dtype=np.float32) * np.float32(D**-0.5)
b = rng.standard_normal(F, dtype=np.float32)
truth = x.astype(np.float64) @ W.T.astype(np.float64)  # (N, F), in double precision

rates, errors = {}, {}  # {rung: operations per second}, {rung: relative error}
roofs = []  # operations per second of nothing but FMAs; section 2


def least(function, seconds=0.4):
    """The least time of a call, in seconds; the first call, which may compile, does not count."""
    function()
    times, end = [], time.perf_counter() + seconds
    while not times or (time.perf_counter() < end and len(times) < 200):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def climb(rung, function, rows=N, columns=F):
    """Measures one way to compute the first rows and columns of x Wᵀ, and compares the result with the truth."""
    result = function()
    exact = truth[:rows, :columns]
    assert result.shape == exact.shape, (result.shape, exact.shape)
    errors[rung] = float(np.sqrt(np.mean((result - exact) ** 2) / np.mean(exact**2)))
    rates[rung] = 2 * rows * columns * D / least(function)
    roofs.extend(roof.measure(1) for _ in range(50))  # other programs may slow the roof too: the highest counts
    print(f"{rung:28s} {rates[rung] / 1e9:9.3f} GFLOP/s   relative error {errors[rung]:.0e}")


# %% [markdown]
# ## 2. The roof
#
# A modern processor has an instruction that multiplies and adds in one step (FMA), on a vector of several elements: 16
# float32 with AVX-512, 8 with AVX2, 4 with NEON. Nothing in this notebook can be faster than a program that does FMAs
# and nothing else. That program is [`minibeit/bench/roof_kernel.py`](../minibeit/bench/roof_kernel.py): twelve
# independent sums, all in registers.
#
# There are two more limits: how fast data arrives from the first-level cache, and from main memory. Both are measured
# with `a = a * s + b` on arrays: two elements loaded and one stored for every two operations.


# %%
@njit(fastmath={"contract"})  # contract: a multiplication and an addition may become one FMA
def triad(a, b, times):
    for _ in range(times):
        for i in range(a.size):
            a[i] = a[i] * np.float32(0.5) + b[i]


def bandwidth(size, times):
    """Bytes per second between the core and arrays of `size` float32 numbers."""
    first, second = np.ones(size, np.float32), np.ones(size, np.float32)
    return 12 * size * times / least(lambda: triad(first, second, times), seconds=1)


roofs += [roof.measure(1) for _ in range(300)]
L1 = bandwidth(2048, 1000)  # two arrays of 8 kB
RAM = bandwidth(1 << 24, 1)  # two arrays of 64 MB
print(cpu_name())
print(
    f"FMA from registers {max(roofs) / 1e9:.0f} GFLOP/s, L1 cache {L1 / 1e9:.0f} GB/s, main memory {RAM / 1e9:.0f} GB/s"
)

# %% [markdown]
# ## 3. Python loops
#
# The definition, word for word. Every number is a Python object, and every `+` first has to find out what `+` means
# here. This is so slow that we compute only 2 of the 197 rows and 16 of the 3072 columns.


# %%
def python_loops(x, W):
    y = np.zeros((len(x), len(W)), np.float32)
    for i in range(len(x)):
        for j in range(len(W)):
            total = 0.0
            for k in range(x.shape[1]):
                total += float(x[i, k]) * float(W[j, k])
            y[i, j] = total
    return y


climb("Python loops", lambda: python_loops(x[:2], W[:16]), rows=2, columns=16)

# %% [markdown]
# ## 4. NumPy without its matrix product
#
# "Vectorised" NumPy: all products at once, then a sum. There is no Python object per number any more. But the products
# are written to memory and read back: for the whole layer that would be 1.9 GB. A loser, and its lesson is that
# arithmetic is cheap and moving data is not.

# %%
climb("NumPy, multiply then sum", lambda: (x[:8, None, :] * W[None, :256, :]).sum(-1), rows=8, columns=256)

# %% [markdown]
# ## 5. The same loops, compiled
#
# numba turns the three loops into machine code. The inner loop is one multiplication and one addition, and yet it
# reaches only about a hundredth of the roof. Each addition waits for the previous one, about four clock cycles, and
# only one element is added at a time: the compiler must not change the order, since floating-point sums depend on it.


# %%
@njit(fastmath={"contract"})
def compiled_loops(x, W):
    y = np.empty((x.shape[0], W.shape[0]), np.float32)
    for i in range(x.shape[0]):
        for j in range(W.shape[0]):
            total = np.float32(0)
            for k in range(x.shape[1]):
                total += x[i, k] * W[j, k]
            y[i, j] = total
    return y


climb("numba, three loops", lambda: compiled_loops(x[:24], W), rows=24)

# %% [markdown]
# We can permit reordering (`reassoc`). Now the sum is kept in several vectors, and the dependency chain is broken. The
# remaining cost: every FMA needs two loads, a vector of `x` and a vector of `W`.

# %%
reordered_sums = njit(fastmath={"contract", "reassoc"})(compiled_loops.py_func)
climb("numba, sums reordered", lambda: reordered_sums(x, W))

# %% [markdown]
# ## 6. The loops in another order
#
# Alternatively we change the loops and not the rules: with `k` in the middle, the inner loop adds a multiple of a row
# of Wᵀ to a row of `y`. No sum waits for another, and each keeps its order. But each FMA now comes with two loads **and
# a store**, because a row of `y` does not fit into registers.


# %%
@njit(fastmath={"contract"})
def rows_of_y(x, Wt):
    y = np.zeros((x.shape[0], Wt.shape[1]), np.float32)
    for i in range(x.shape[0]):
        for k in range(x.shape[1]):
            scalar = x[i, k]
            for j in range(Wt.shape[1]):
                y[i, j] += scalar * Wt[k, j]
    return y


Wt = np.ascontiguousarray(W.T)  # (D, F)
climb("numba, k in the middle", lambda: rows_of_y(x, Wt))

# %% [markdown]
# ## 7. Blocks for the cache, and four rows at once
#
# Wᵀ takes 9.4 MB, and the version above reads all of it for every row of `x`. If it is split into panels of 64 columns
# (196 kB), a panel stays in the second-level cache while all rows are processed. In addition, four rows of `x` are
# processed together, so that a vector of `W` is loaded once for four FMAs.


# %%
PANEL = 64


@njit(fastmath={"contract"})
def blocked(x, panels):
    y = np.zeros((x.shape[0], panels.shape[0] * PANEL), np.float32)
    whole = x.shape[0] // 4 * 4
    for p in range(panels.shape[0]):
        for i in range(0, whole, 4):
            y0, y1, y2, y3 = np.zeros((4, PANEL), np.float32)
            for k in range(x.shape[1]):
                row = panels[p, k]
                a0, a1, a2, a3 = x[i, k], x[i + 1, k], x[i + 2, k], x[i + 3, k]
                for j in range(PANEL):
                    y0[j] += a0 * row[j]
                    y1[j] += a1 * row[j]
                    y2[j] += a2 * row[j]
                    y3[j] += a3 * row[j]
            here = slice(p * PANEL, (p + 1) * PANEL)
            y[i, here], y[i + 1, here], y[i + 2, here], y[i + 3, here] = y0, y1, y2, y3
        for i in range(whole, x.shape[0]):
            for k in range(x.shape[1]):
                for j in range(PANEL):
                    y[i, p * PANEL + j] += x[i, k] * panels[p, k, j]
    return y


panels_64 = np.ascontiguousarray(W.reshape(F // PANEL, PANEL, D).transpose(0, 2, 1))  # (panels, D, 64)
climb("numba, blocked, 4 rows", lambda: blocked(x, panels_64))

# %% [markdown]
# ## 8. The register tile
#
# The last step is not to load or store `y` at all while summing: a tile of it, MR rows by NR columns, has to stay in
# registers from the first product to the last. On AVX-512 that is 6 rows x 4 vectors of 16, or 12 x 2: 24 of the 32
# registers hold sums. A step of `k` then loads 4 vectors of `W` and 6 single elements of `x`, and does 24 FMAs with
# them. (12 x 2 needs 14 loads. That does not matter on a CPU that completes one FMA of 16 elements per cycle, as Zen 4
# does. One that completes two has to fetch and decode twice as many instructions in the same time, and if it shares its
# core with another program, instruction throughput is what runs short.)
#
# With Python loops, even under numba, the compiler decides what stays in registers, and it decides differently. So
# minibeit writes the tile one level lower, in LLVM's own language, from Python: `multiply_tile` in
# [`micro.py`](../minibeit/ops/numba_cpu/kernels/micro.py). The loops around it are ordinary numba. `W` is packed once,
# when a model is loaded, into panels of exactly NR columns, so that the tile reads it front to back.


# %%
@njit
def tiles(x, x_bytes, panels, y, y_bytes, count, steps, number):
    """All arguments are integers: addresses, distances between rows in bytes, and counts."""
    for p in range(number):
        panel = panels + p * steps * NR * 4
        for i in range(0, count, MR):
            tile = y + i * y_bytes + p * NR * 4
            multiply_tile(
                min(MR, count - i), x + i * x_bytes, x_bytes, panel, tile, y_bytes, steps, 0, 0, panel, 0, tile, y_bytes
            )


panels = pack_matrix(W)  # (F / NR, D, NR), aligned to cache lines


def micro_kernel():
    y = padded((N, F))  # rows an odd number of cache lines apart, so that they do not share places in the cache
    tiles(x.ctypes.data, x.strides[0], panels.ctypes.data, y.ctypes.data, y.strides[0], N, D, len(panels))
    return y


print(f"tile {MR} x {NR}")
climb("micro-kernel", micro_kernel)

# %% [markdown]
# For comparison, here is what everyone uses: NumPy's `@`, which calls a BLAS library whose kernels are written by hand
# in assembly language for each processor family. It does not know that `W` never changes, so it packs it again in every
# call.

# %%
climb("NumPy @ (BLAS)", lambda: x @ W.T)

# %% [markdown]
# minibeit's op adds what a real program needs: rows in blocks that stay in the second-level cache, prefetching of the
# next panel, long sums split into shorter ones to keep rounding errors small, and threads.

# %%
ops = get_ops("numba")
packed = ops.prepare(Linear(W, None))
with num_threads(1):
    climb("minibeit linear", lambda: ops.linear(x, packed))

# %% [markdown]
# ## 9. Fused: what comes after the product
#
# A layer is more than a product. Here it is `gelu(x Wᵀ + b)`, and GELU takes an error function for each of the 605,184
# results. NumPy makes a pass over memory for every operation in it. If it is done while the tile is still in the
# first-level cache, with vector instructions, it costs little.

# %%
layer = Linear(W, b)
packed = ops.prepare(layer)
fused_truth = gelu(truth + b)


def in_passes():
    y = x @ W.T
    y += b
    return gelu(y)


with num_threads(1):
    seconds = {
        "NumPy, pass after pass": least(in_passes),
        "our product, NumPy's GELU": least(lambda: gelu(ops.linear(x, packed))),
        "fused": least(lambda: ops.linear_activation(x, packed, "gelu")),
        "(the product alone)": least(lambda: ops.linear(x, packed)),
    }
    fused = ops.linear_activation(x, packed, "gelu")
for name, value in seconds.items():
    print(f"{name:28s} {1000 * value:8.2f} ms   {2 * N * D * F / value / 1e9:7.1f} GFLOP/s of the product")
rates["fused with bias and GELU"] = 2 * N * D * F / seconds["fused"]
errors["fused with bias and GELU"] = float(np.sqrt(np.mean((fused - fused_truth) ** 2) / np.mean(fused_truth**2)))

# %% [markdown]
# ## 10. The ladder

# %%
names, FMA = list(rates), max(roofs)
figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
winners = ("micro-kernel", "minibeit linear", "fused with bias and GELU")
axis.barh(names, [rates[n] / 1e9 for n in names], color=["#c2410c" if n in winners else "#64748b" for n in names])
for place, name in enumerate(names):
    axis.text(1.4 * FMA / 1e9, place, f"{rates[name] / 1e9:.3g}  ({100 * rates[name] / FMA:.2g} %)", va="center")
axis.axvline(FMA / 1e9, color="#0f172a", linestyle=":")
axis.set_title(f"dotted: the roof, {FMA / 1e9:.0f} GFLOP/s", fontsize=9)
axis.set_xscale("log")
axis.set_xlim(right=20 * FMA / 1e9)
axis.invert_yaxis()
axis.set_xlabel("GFLOP/s on one thread, each mark ten times the one before; in brackets the share of the roof")
axis.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## 11. Why: the roofline
#
# How many operations does a version get out of each byte that it moves between the first-level cache and the
# registers? This number can be read off its inner loop:
#
# | version | operations | bytes | operations per byte |
# |---|---|---|---|
# | reordered sums | 2 | 8: one `x`, one `W` | 0.25 |
# | `k` in the middle | 2 | 12: one `W`, one `y` loaded and stored | 0.17 |
# | four rows | 8 | 36: one `W`, four `y` loaded and stored | 0.22 |
# | register tile | 2 MR NR | 4 (MR + NR) | 2.7 for 6 x 64, 4.4 for 12 x 32 |
#
# A program can hardly be faster than its operations per byte times the bytes per second: the slanted line. Nor can it
# be faster than the roof: the flat line. (The slanted line was measured with one store for two loads; a loop with more
# loads per store, or whose unrolled body uses an element twice, may lie somewhat above it.) The lines meet between half
# an operation and one operation per byte, and only the register tile is to the right of that point: for all others the
# slanted line is the limit, even if the cache were used perfectly. (To the right of it, more operations per byte gain
# nothing: 6 x 64 moves more bytes than 12 x 32 does, with fewer instructions.)
#
# Points far below the line have a further reason. With `k` in the middle, all of `W` comes from a distant cache for
# every row. Blocking cured that: `W` stayed near. The tile keeps `y` nearer than any cache.

# %%
intensity = {
    "numba, sums reordered": 2 / 8,
    "numba, k in the middle": 2 / 12,
    "numba, blocked, 4 rows": 8 / 36,
    "micro-kernel": 2 * MR * NR / (4 * (MR + NR)),
}
figure, axis = plt.subplots(figsize=(7, 4.4), layout="constrained")
per_byte = np.geomspace(0.05, 32, 200)
axis.plot(
    per_byte, np.minimum(FMA, per_byte * L1) / 1e9, color="#0f172a", label=f"from the L1 cache, {L1 / 1e9:.0f} GB/s"
)
axis.plot(
    per_byte, np.minimum(FMA, per_byte * RAM) / 1e9, color="#0f172a", linestyle=":",
    label=f"from main memory, {RAM / 1e9:.0f} GB/s",
)  # fmt: skip
for marker, (name, where) in zip("o^sD", intensity.items()):
    colour = "#c2410c" if name in winners else "#64748b"
    axis.plot(where, rates[name] / 1e9, marker, color=colour, markersize=8, label=name.removeprefix("numba, "))
axis.set(
    xscale="log", yscale="log", xlabel="operations per byte moved", ylabel="GFLOP/s, one thread",
    title="roofline: what the loop asks for (right is better) and what it gets",
)  # fmt: skip
axis.set_ylim(rates["numba, three loops"] / 2e9, 2 * FMA / 1e9)
axis.legend(loc="lower right", frameon=False)
axis.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## 12. All threads, and a whole model
#
# Finally all threads, and a model instead of one layer: two blocks of BEiT-base on one image. `profile` times every op;
# `minibeit bench --profile` does the same with any model. The rate of the products is compared with the roof of all
# threads.

# %%
threads = default_num_threads()
config = BeitConfig.from_dict(
    dict(num_hidden_layers=2, image_size=224, use_relative_position_bias=True, num_labels=1000, initializer_range=0.05)
)
model = BeitForImageClassification(config, backend="numba")
picture = rng.standard_normal((1, 3, 224, 224), dtype=np.float32)
all_roof = max(roof.measure(threads) for _ in range(300))
entries, total = profile(model, picture, runs=20)
print(f"{threads} threads: {1000 * total:.1f} ms for two blocks; roof {all_roof / 1e9:.0f} GFLOP/s")
for name, entry in entries.items():
    rate = entry.operations / entry.seconds
    of_roof = f"{rate / 1e9:6.0f} GFLOP/s {100 * rate / all_roof:4.0f} % of the roof" if entry.operations else ""
    print(f"{name:20s} {entry.calls:3d} calls {1000 * entry.seconds:8.2f} ms {of_roof}")

# %% [markdown]
# ## What was learned
#
# 1. Arithmetic is cheap; what costs time is moving data, waiting for the previous sum, and Python itself.
# 2. Each rung removes one cost: objects, passes over memory, the chain of additions, distant caches, and finally even
#    the nearest cache.
# 3. numba is enough for the last rung too, if its twelve-line core is written in LLVM's language.
#
# A claim about speed holds for one machine, so nothing below checks one. What must hold everywhere is that all rungs
# compute the same product.

# %%
assert len(errors) >= 9
for rung, error in errors.items():
    assert error < 3e-6, (rung, error)  # rounding of 768 float32 additions one after another: about 1e-6 at most
reference = get_ops("numpy")
assert np.allclose(fused, reference.linear_activation(x, layer, "gelu"), rtol=1e-4, atol=1e-5)
slow = BeitForImageClassification(config, backend="numpy", arrays=model.arrays)
difference = model(picture).logits - slow(picture).logits
assert np.abs(difference).max() < 1e-4 * np.abs(slow(picture).logits).max()
print("all rungs agree")

# %% [markdown]
# ## Exercises
#
# 1. A CPU has 32 vector registers of 16 numbers. A tile of m rows and n vectors needs m n of them for sums, n for the
#    row of `W` and one for an element of `x`. Which tile does most operations per byte moved, and what speaks against
#    it?
# 2. How much slower is the product in float64, with NumPy's `@`? Guess first: how many numbers fit into a vector, and
#    how many bytes are moved?
#
# The next two cells have solutions.

# %% [solution]
# 1. A nearly square tile moves least, and a row counts one number where a vector counts sixteen: few vectors, many
# rows. Against it speaks that each row is one more instruction to fetch for every vector of W (section 8), and that 197
# rows are not a multiple of 30: the last tile is nearly half empty.
tiles_that_fit = [(m, n) for m in range(1, 32) for n in range(1, 32) if m * n + n + 1 <= 32]
per_byte_moved = {(m, n): 2 * m * 16 * n / (4 * (m + 16 * n)) for m, n in tiles_that_fit}
for m, n in sorted(per_byte_moved, key=per_byte_moved.get, reverse=True)[:5]:
    wasted = -N % m / (N + -N % m)
    print(f"{m:2} rows x {n} vectors: {per_byte_moved[m, n]:.2f} operations per byte, {wasted:.1%} of the rows wasted")
assert max(per_byte_moved, key=per_byte_moved.get) == (30, 1)
assert (6, 4) in per_byte_moved and (12, 2) in per_byte_moved

# %% [solution]
# 2. Half as many numbers fit into a vector and twice the bytes are moved: about twice the time.
x64, W64 = x.astype(np.float64), W.astype(np.float64)
single, double = least(lambda: x @ W.T), least(lambda: x64 @ W64.T)
print(f"float32 {1000 * single:.1f} ms, float64 {1000 * double:.1f} ms: {double / single:.2f} times as long")
assert np.array_equal(x64 @ W64.T, truth)
