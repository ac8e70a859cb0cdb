# %% [markdown]
# # 04 Checking an implementation
#
# Somebody has reimplemented BEiT: for a chip, in C++, in another framework. The logits differ from PyTorch's in the
# fifth digit. Is that rounding, or a bug? And if it is a bug, where is it? This tutorial plants bugs and finds them,
# and shows what float32 can and cannot guarantee.
#
# On the command line, all of this is `minibeit verify`. Here we call the functions behind it:
# [`minibeit/verify/lockstep.py`](../minibeit/verify/lockstep.py).
# [Tutorial 01](01_from_pixels_to_a_label.ipynb) explains the model.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from minibeit import BeitForImageClassification, Trace
from minibeit.catalogue import weights_folder
from minibeit.checkpoint.formats import write_safetensors
from minibeit.checkpoint.load import load_checkpoint
from minibeit.ops import reference
from minibeit.verify.difference import difference
from minibeit.verify.lockstep import Job, check, model_source
from minibeit.verify.report_text import verdict
from minibeit.verify.trace_file import FORMAT, TraceFile, misfits
from minibeit.verify.trace_names import describe

plt.rcParams.update({"figure.dpi": 80, "font.size": 9})
config, weights = load_checkpoint(weights_folder() / "digits", "image_classification")
pixels = np.random.default_rng(0).standard_normal((1, 3, *config.image_shape), dtype=np.float32)
job = Job(config, "image_classification", weights, {"pixel_values": pixels})


def model(dtype="float32", backend="numpy"):
    arrays = {name: array.astype(dtype) for name, array in weights.items()}
    return BeitForImageClassification(config, arrays=arrays, dtype=dtype, backend=backend)


# %% [markdown]
# ## 1. What float32 guarantees
#
# A float32 number has 24 significant bits, so rounding it once changes it by up to 2^-24 = 6e-8 of its size. A network
# rounds after every operation. Here are the logits of the same model in float32 and in float64, which has 53 bits:
# enough to call its result *the truth*.

# %%
single, double = model()(pixels).logits, model("float64")(pixels).logits
print("float32", single[0, :4])
print("float64", double[0, :4])
d = difference(single, double)
print(f"relative error {d.rms_rel:.1e}, largest difference {d.max_abs:.1e}, cosine {d.cosine:.12f}")
assert 1e-8 < d.rms_rel < 2e-6

# %% [markdown]
# Float32 can do no better: another implementation sums in a different order, rounds in different places, and ends up
# just as far from the truth, but in another direction. So two correct float32 implementations *never agree to all
# digits*, and "the largest difference from PyTorch is 3e-5" says nothing by itself: it depends on the weights, on the
# image, on the depth. The right question is: **is it as close to the truth as other float32 implementations are?**
#
# ## 2. Every array on the way
#
# A trace holds every intermediate array of a call under its canonical name. The names are generated from the model, so
# the list is always right (`minibeit verify --list-names`):

# %%
print(describe(job.shapes()))

# %% [markdown]
# `check` advances several runs through the network in lockstep: the candidate, the truth in float64, and the yardstick,
# which is PyTorch's float32 (`--against torch`) or NumPy's. It asks two questions about each array:
#
# - **total error**: how far is it from the truth? This includes everything that happened before.
# - **own error**: how far is it from what the float64 op makes of *the candidate's own inputs*? What went wrong earlier
#   does not count, so this convicts or acquits a single op.
#
# The budget for each is the yardstick's error at the same place, times a small factor (4 for one op, 6 for the total;
# [`budget.py`](../minibeit/verify/budget.py) says why).

# %%
good = check(job, model_source(job, model(), "minibeit NumPy"))
print(verdict(good))
assert good.ok
assert [row.name for row in good.rows] == list(job.shapes())

# %% [markdown]
# ## 3. Plant a bug
#
# The third layer norm gets an epsilon of 1e-3, the default of some frameworks, although this model was trained with
# 1e-12. It is the kind of mistake that nobody notices: the predicted class is the same, and so, nearly, are the logits.


# %%
def with_wrong_epsilon(number):
    faulty, calls = model(), [0]

    def layer_norm(x, norm, eps):
        calls[0] += 1
        return reference.layer_norm(x, norm, 1e-3 if calls[0] == number else eps)

    faulty.ops.layer_norm = layer_norm
    return faulty


print("as it should be", model()(pixels).logits[0, :4])
print("with the bug   ", with_wrong_epsilon(3)(pixels).logits[0, :4])
report = check(job, model_source(job, with_wrong_epsilon(3), "a port with a bug"))
print(verdict(report))
assert report.guilty is not None
assert report.guilty.name == "encoder.1.norm1"
assert "0.001 instead of 1e-12" in report.guilty.note

# %% [markdown]
# Found, named and explained: the verifier tries common mistakes on the guilty op (other epsilons, a missing bias, a
# transposed weight, another activation, half precision, ...) and says which of them reproduces the candidate's numbers.
#
# This is why two kinds of error are needed. The total error rises at the bug and never falls again, so everything after
# it looks wrong; the own error has a single peak.

# %%
figure, axes = plt.subplots(2, 1, figsize=(8, 4.6), sharex=True, layout="constrained")
names = [row.name for row in report.rows]
for axis, which in zip(axes, ("total", "own")):
    for rows, label, colour in ((report.rows, "with the bug", "tab:red"), (good.rows, "without", "tab:blue")):
        errors = np.array([getattr(row, which).rms_rel for row in rows])
        axis.semilogy(np.where(errors > 0, errors, np.nan), ".-", color=colour, label=label)
    axis.set_ylabel(f"{which} error")
    axis.axhline(2.0**-24, color="gray", linestyle=":", label="one rounding of float32")
axes[0].legend(loc="upper left", fontsize=8)
starts = [i for i, name in enumerate(names) if name.endswith(".norm1")]
axes[1].set_xticks(starts, [f"block {i}" for i in range(len(starts))])
plt.show()

own = [row.name for row in report.rows if row.status == "own"]
inherited = [row.name for row in report.rows if row.status == "total"]
print(f"{len(own)} array with an error of its own, {len(inherited)} that inherit it")
assert own == ["encoder.1.norm1"]
assert len(inherited) > 10

# %% [markdown]
# ## 4. Bugs that hide
#
# How small can a bug be and still be detected? We scale one row of the first MLP's weights by a little and look at the
# own error of the resulting array, in units of the yardstick's.


# %%
def with_scaled_weight(factor):
    changed = dict(weights)
    name = "beit.encoder.0.fc1.weight"
    changed[name] = weights[name].copy()
    changed[name][5, :] *= np.float32(factor)
    return BeitForImageClassification(config, arrays=changed, backend="numpy")


caught = {}
for change in (1e-2, 1e-4, 1e-5, 1e-6, 1e-7):
    report = check(job, model_source(job, with_scaled_weight(1 + change), "changed"), only="encoder.0.mlp.hidden")
    caught[change] = not report.ok
    print(f"one row changed by {change:.0e}: {report.rows[0].own_ratio:8.1f}x the yardstick  {report.rows[0].status}")
assert caught[1e-2]
assert caught[1e-4]
assert not caught[1e-7]

# %% [markdown]
# A change of one row in 256 by less than about a millionth is lost in the rounding of float32. That is what float32
# cannot guarantee: such a bug looks like noise, to the verifier as to anyone who looks at the outputs. To detect
# smaller ones, run the port in float64 if it can: a float64 trace is held to float64 accuracy.
#
# The same holds for what is small beside the budget everywhere: an epsilon of 1e-12 for 1e-13, or in bfloat16 one of
# 1e-3. And no verifier sees what the weights do not show: a bias that is 0, or a table of zeros, may as well be left
# out. The verdict then says *as far as these weights can show*; `--test-weights` makes weights that show everything.
# [The page on traces](../docs/verify.md) lists what stays invisible, with measured counts.
#
# ## 5. A trace from elsewhere
#
# The other implementation need not run here or be written in Python. It only has to write its arrays to a safetensors
# file under the canonical names, with one entry in the metadata:

# %%
trace = Trace("encoder.*.output")
with_wrong_epsilon(3)(pixels, trace=trace)
folder = tempfile.TemporaryDirectory()
path = Path(folder.name) / "theirs.safetensors"
write_safetensors(path, dict(trace), {"format": FORMAT, "made_by": "a chip"})

# %% [markdown]
# This file holds only the output of each block. Own errors are then those of whole blocks: the float64 reference runs
# from each of the candidate's arrays to the next. On the command line this is
# `minibeit verify --model DIR --against theirs.safetensors --only "encoder.*.output"`

# %%
theirs = TraceFile(path)
assert misfits(theirs, job) == []
report = check(job, theirs.source(), only="encoder.*.output")
for row in report.rows:
    print(f"{row.name:20} own {row.own.rms_rel:.1e} ({row.own_ratio:.1f}x)  {row.status}")
assert report.guilty is not None
assert report.guilty.name == "encoder.1.output"
folder.cleanup()

# %% [markdown]
# ## 6. In practice
#
# ```
# minibeit verify --model DIR --against torch --report report.html   the fast backend beside PyTorch, with plots
# minibeit verify --model DIR --bisect                               which fast op is it?
# minibeit verify --model DIR --export-golden DIR2                   test vectors for a port: float64, float32, hashes
# minibeit verify --model DIR --against THEIRS.safetensors           the port's arrays, judged
# minibeit verify --weights A B                                      or was it the conversion of the weights?
# ```
#
# If something is wrong: are all numbers finite? Are the pixels the same (`embeddings.patches` is the first array to
# show it)? Are the weights the same (`--weights`)? Only then look into the first guilty array.

# %% [markdown]
# ## Exercises
#
# 1. A port has lost the layer scale of one branch: its `lambda_1` in block 2 is all ones. Which array does the verifier
#    name, and how many others only inherit the error?
# 2. Somebody has stored the weights in float16 and computes in float32. Is the predicted class still right? Is the
#    port?
#
# The next two cells have solutions.

# %% [solution]
# 1. The array that the factor is applied in, and nothing before it.
changed = dict(weights)
changed["beit.encoder.2.lambda_1"] = np.ones_like(weights["beit.encoder.2.lambda_1"])
lost = BeitForImageClassification(config, arrays=changed, backend="numpy")
report = check(job, model_source(job, lost, "no layer scale"))
print(verdict(report))
print(sum(row.status == "total" for row in report.rows), "arrays inherit the error")
assert report.guilty is not None and report.guilty.name == "encoder.2.attention.residual"
assert all(row.ok for row in report.rows[: report.rows.index(report.guilty)])

# %% [solution]
# 2. The class is right, and the port is not: each rounding of a weight is 8,000 times as large as one of float32.
rounded = {name: array.astype(np.float16).astype(np.float32) for name, array in weights.items()}
halves = BeitForImageClassification(config, arrays=rounded, backend="numpy")
report = check(job, model_source(job, halves, "weights in float16"))
print(verdict(report))
assert halves(pixels).logits.argmax() == model()(pixels).logits.argmax()
assert not report.ok and sum(row.status == "own" for row in report.rows) > 10
