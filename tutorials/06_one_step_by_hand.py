# %% [markdown]
# # 06 One step by hand
#
# Training is three lines: make a loss, find out how it changes with each weight, move each weight a little. The middle
# line is the one that looks like magic. Here we do it by hand for one transformer block, in NumPy, and hold every
# number against minibeit's `value_and_grad` and against finite differences. Then we measure two things that BEiT's
# recipes rely on: the *layer scale* and the *layer-wise decay* of the learning rate.
#
# [Tutorial 01](01_from_pixels_to_a_label.ipynb) explains the forward pass of a block. Our model is the included one,
# which reads digits.

# %%
import matplotlib.pyplot as plt
import numpy as np

from minibeit import BeitForImageClassification, BeitImageProcessor, Trace
from minibeit.checkpoint.load import load_checkpoint
from minibeit.labels import weights_folder
from minibeit.ops import reference
from minibeit.ops.activations import ACTIVATIONS
from minibeit.ops.backward.activations import derivative
from minibeit.params import flatten
from minibeit.train.gradients import value_and_grad
from minibeit.train.optimizer import AdamW, layer_number
from minibeit.verify.gradients import GradientJob, model_gradients

plt.rcParams.update({"figure.dpi": 80, "font.size": 9})
digits = weights_folder() / "digits"
held_out = np.load(digits / "held_out.npz")
images, labels = held_out["images"], held_out["labels"].astype(np.int64)
pixels = BeitImageProcessor.from_pretrained(digits)(list(images))["pixel_values"]
config, weights = load_checkpoint(digits, "image_classification")
L = config.num_hidden_layers


def reader(dtype="float32", **changes):
    arrays = {name: array.astype(dtype) for name, array in weights.items()}
    return BeitForImageClassification(config.replace(**changes), arrays=arrays, dtype=dtype, backend="numpy")


# %% [markdown]
# ## 1. The gradient of everything
#
# `value_and_grad` runs the model, notes every op on a tape, and plays the tape in reverse. We ask for the loss of eight
# digits and get, in the structure of the parameters, how fast it changes with each of them.

# %%
x8, y8 = pixels[:8].astype(np.float64), labels[:8]
model = reader("float64")
loss, grads = value_and_grad(model, x8, labels=y8)
named = flatten(grads)
print(f"loss {loss:.5f}; {len(named)} gradients of {sum(g.size for g in named.values())} numbers")

# %% [markdown]
# Between the ops the tape carries *cotangents*: that of an array y, written dy, is the gradient of the loss with
# respect to y, an array of y's shape. An op is given dy and makes dx and the gradients of its weights. That is all; the
# rest is bookkeeping. For our block we take what comes in from above, dy, and what the forward made.

# %%
BLOCK = 1
forward = Trace("*")
model(x8, trace=forward)
job = GradientJob(config, "image_classification", weights, {"pixel_values": x8, "labels": y8})
tape = model_gradients(job, model).arrays
p = model.params.beit.encoder[BLOCK]
f = {name: forward[f"encoder.{BLOCK}.{name}"] for name in ("norm1", "attention.context", "norm2", "attention.residual")}
x = forward[f"encoder.{BLOCK - 1}.output"]  # (B, N, D)
dy = tape[f"cotangent.encoder.{BLOCK}.output"]  # (B, N, D)
mine = {}  # our gradients, by the parameter's name in the block
print("x", x.shape, " dy", dy.shape)


# %% [markdown]
# ## 2. The MLP branch
#
# Forward, with r the block's middle (after attention) and f = GELU:
#
# $$h = \mathrm{norm}_2(r),\quad z = h W_1^T + b_1,\quad u = f(z),\quad y = r + \lambda_2 \odot (u W_2^T + b_2)$$
#
# One rule serves every linear layer y = x Wᵀ + b, with rows for tokens:
#
# $$dx = dy\,W,\qquad dW = dy^T x,\qquad db = \textstyle\sum dy$$
#
# Shapes alone nearly force it: dW must be (out, in), and dyᵀ x is the only product that is. The layer norm has one more
# idea: mean and spread depend on x too, so what would shift all of a token, or stretch it, is taken out. With
# $\hat x = (x - \mathrm{mean})\,s$, $s = 1/\sqrt{\mathrm{var} + \varepsilon}$ and $a = dy \odot w$:
#
# $$dx = s\,(a - \mathrm{mean}(a) - \hat x\,\mathrm{mean}(a \hat x)),\qquad dw = \textstyle\sum dy \odot \hat x$$


# %%
def rows(array):
    return array.reshape(-1, array.shape[-1])


def linear_backward(dy, x, layer, name):
    mine[f"{name}.weight"] = rows(dy).T @ rows(x)
    if layer.bias is not None:
        mine[f"{name}.bias"] = rows(dy).sum(axis=0)
    return dy @ layer.weight


def norm_backward(dy, x, norm, name):
    centred = x - x.mean(axis=-1, keepdims=True)
    s = 1 / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + config.layer_norm_eps)
    hat, a = centred * s, dy * norm.weight
    mine[f"{name}.weight"], mine[f"{name}.bias"] = rows(dy * hat).sum(axis=0), rows(dy).sum(axis=0)
    return s * (a - a.mean(axis=-1, keepdims=True) - hat * (a * hat).mean(axis=-1, keepdims=True))


r = f["attention.residual"]
z = f["norm2"] @ p.fc1.weight.T + p.fc1.bias
gelu = ACTIVATIONS[config.hidden_act]
u = gelu(z)
if p.lambda_2 is not None:
    mine["lambda_2"] = rows(dy * (u @ p.fc2.weight.T + p.fc2.bias)).sum(axis=0)
scale_2 = 1 if p.lambda_2 is None else p.lambda_2
du = linear_backward(dy * scale_2, u, p.fc2, "fc2")
dz = du * derivative(config.hidden_act, z)
dh = linear_backward(dz, f["norm2"], p.fc1, "fc1")
dr = dy + norm_backward(dh, r, p.norm2, "norm2")  # the residual: dy goes straight through, the branch adds its share

# %% [markdown]
# ## 3. The attention branch
#
# $$S = q k^T / \sqrt d + \mathrm{bias},\quad P = \mathrm{softmax}(S),\quad c = P v$$
#
# $$dv = P^T dc,\quad dP = dc\,v^T,\quad dS = P \odot (dP - \mathrm{rowsum}(P \odot dP)),\quad dq = dS\,k/\sqrt d,
# \quad dk = dS^T q/\sqrt d$$
#
# The row sum is there because each row of P adds up to one: raising all scores of a row alike changes nothing. The bias
# table gets dS too, and since many pairs of patches read the same row of the table, their dS *add up*.

# %%
B, N, D = x.shape
H, d = config.num_attention_heads, D // config.num_attention_heads


def heads(array):  # (B, N, D) -> (B, H, N, d)
    return array.reshape(B, N, H, d).transpose(0, 2, 1, 3)


def joined(array):  # (B, H, N, d) -> (B, N, D)
    return array.transpose(0, 2, 1, 3).reshape(B, N, D)


a, h = p.attention, f["norm1"]
q, k, v = (heads(h @ part.weight.T + (0 if part.bias is None else part.bias)) for part in (a.query, a.key, a.value))
S = q @ k.swapaxes(2, 3) / np.sqrt(d)
index = reference.relative_position_index(config.grid)  # (N, N): which row of the table
if p.bias_table is not None:
    S = S + p.bias_table[index].transpose(2, 0, 1)
P = reference.softmax(S)
context = f["attention.context"]
if p.lambda_1 is not None:
    mine["lambda_1"] = rows(dr * (context @ a.output.weight.T + a.output.bias)).sum(axis=0)
dc = heads(linear_backward(dr * (1 if p.lambda_1 is None else p.lambda_1), context, a.output, "attention.output"))
dv, dP = P.swapaxes(2, 3) @ dc, dc @ v.swapaxes(2, 3)
dS = P * (dP - (P * dP).sum(axis=-1, keepdims=True))
dq, dk = dS @ k / np.sqrt(d), dS.swapaxes(2, 3) @ q / np.sqrt(d)
if p.bias_table is not None:
    table = np.zeros_like(p.bias_table)
    np.add.at(
        table, index, dS.sum(axis=0).transpose(1, 2, 0)
    )  # add.at: repeated rows add up; table[index] += would not
    mine["bias_table"] = table
dh = sum(
    linear_backward(joined(part), h, layer, f"attention.{name}")
    for part, layer, name in ((dq, a.query, "query"), (dk, a.key, "key"), (dv, a.value, "value"))
)
dx = dr + norm_backward(dh, x, p.norm1, "norm1")

# %% [markdown]
# ## 4. Is it right?
#
# First compared with minibeit: all parameters of the block, and the cotangent that is passed to the block below:


# %%
def relative(found, truth):
    return np.linalg.norm(found - truth) / np.linalg.norm(truth)


errors = {name: relative(mine[name], named[f"beit.encoder.{BLOCK}.{name}"]) for name in mine}
errors["dx"] = relative(dx, tape[f"cotangent.encoder.{BLOCK - 1}.output"])
for name, error in errors.items():
    print(f"{name:26} {error:.1e}")
assert {f"beit.encoder.{BLOCK}.{name}" for name in mine} == {n for n in named if n.startswith(f"beit.encoder.{BLOCK}.")}
assert max(errors.values()) < 1e-11

# %% [markdown]
# Then with a method that needs no calculus: move *one* weight a little up and down and look at the loss. Too large a
# step sees the curvature, too small a one drowns in rounding; in between, eight or nine digits are right.

# %%
steps = 10.0 ** np.arange(-1, -12, -1)
moved = {}
for name, place in (("fc1.weight", (3, 5)), ("attention.query.weight", (2, 7)), ("norm1.weight", (4,))):
    array, slopes = flatten(model.params)[f"beit.encoder.{BLOCK}.{name}"], []
    middle = array[place]
    for step in steps:
        sides = []
        for sign in (1, -1):
            array[place] = middle + sign * step
            sides.append(float(model(x8, labels=y8).loss))
        slopes.append((sides[0] - sides[1]) / (2 * step))
    array[place] = middle
    moved[name] = np.abs(np.array(slopes) / mine[name][place] - 1)
    print(f"{name:24} by hand {mine[name][place]: .10e}   best difference off by {moved[name].min():.0e}")
    assert moved[name].min() < 1e-6
plt.figure(figsize=(6, 3), layout="constrained")
for name, error in moved.items():
    plt.loglog(steps, np.maximum(error, 1e-16), ".-", label=name)
plt.xlabel("step of the difference")
plt.ylabel("relative to the gradient by hand")
plt.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## 5. Why layer scale
#
# $y = r + \lambda_2 \odot (\ldots)$: each branch has a small learned factor per channel, 0.1 in base models, 1e-5 in
# large ones. We build deep random models of the same width, 24 blocks, with weights of unit gain, and look at how large
# the hidden states are, and the cotangents on their way back.

# %%
DEPTH = 24
deep = {}
for scale in (1.0, 0.1, 1e-5):
    changed = config.replace(num_hidden_layers=DEPTH, layer_scale_init_value=scale)
    made = BeitForImageClassification(changed, seed=0, dtype="float64", backend="numpy")
    rng = np.random.default_rng(0)
    for name, array in flatten(made.params).items():
        if name.endswith("weight") and array.ndim == 2 and ".encoder." in name:
            array[...] = rng.standard_normal(array.shape) / np.sqrt(array.shape[1])
        elif name.endswith(("patch.weight", "cls_token")):  # tokens of unit size
            array[...] = rng.standard_normal(array.shape) / (1 if "cls" in name else np.sqrt(array[0].size))
    states = Trace("encoder.*.output")
    made(x8, trace=states)
    back = model_gradients(GradientJob(changed, "image_classification", {}, {"pixel_values": x8, "labels": y8}), made)
    names = [f"encoder.{i}.output" for i in range(DEPTH)]
    deep[scale] = (
        np.array([np.sqrt((states[name] ** 2).mean()) for name in names]),
        np.array([np.sqrt((back.arrays[f"cotangent.{name}"] ** 2).mean()) for name in names]),
    )
figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
for scale, (sizes, cotangents) in deep.items():
    axes[0].semilogy(sizes / sizes[0], label=f"layer scale {scale:g}")
    axes[1].semilogy(cotangents / cotangents[-1], label=f"layer scale {scale:g}")
axes[0].set(xlabel="block", title="hidden states, in units of the first")
axes[1].set(xlabel="block", title="cotangents, in units of the last")
axes[0].legend(fontsize=8)
plt.show()
growth = {scale: (sizes[-1] / sizes[0], cotangents[0] / cotangents[-1]) for scale, (sizes, cotangents) in deep.items()}
for scale, (up, down) in growth.items():
    print(f"layer scale {scale:g}: states grow {up:.2f} times over {DEPTH} blocks, cotangents {down:.2f} times back")
assert growth[1.0][1] > 1.5 * growth[0.1][1]
assert abs(growth[1e-5][0] - 1) < 0.01
assert abs(growth[1e-5][1] - 1) < 0.01

# %% [markdown]
# With 1e-5 the whole stack starts as the identity: every block sees the embeddings, every block gets the same
# cotangent, and each can grow as far as it helps. Without layer scale, the first blocks get far larger gradients than
# the last ones.
#
# ## 6. Why layer-wise decay
#
# Adam divides a gradient by its own size. So every weight moves by about the learning rate at each step, *however
# little the loss depends on it*: the embeddings, which know strokes and edges, change as fast as a new head.
# Layer i of L + 1 therefore gets the rate times decay^(L + 1 - i). We fine-tune on 40 digits whose labels mean
# something else (d -> 9 - d), and look at how far each layer went from where it was, and at 200 other digits.

# %%
few, other = np.arange(40), np.arange(160, 360)
target = 9 - labels


def fine_tuned(decay, count=12, rate=1e-3):
    tuned = reader()
    before = {name: array.copy() for name, array in flatten(tuned.params).items()}
    optimizer, curve = AdamW(tuned, layer_decay=decay), []
    for _ in range(count):
        result = value_and_grad(tuned, pixels[few], labels=target[few])
        optimizer.step(result.grads, rate)
        curve.append(result.loss)
    far = np.zeros((2, L + 2))
    for name, array in flatten(tuned.params).items():
        i = layer_number(name, L)
        far[:, i] += ((array - before[name]) ** 2).sum(), array.size
    right = (tuned(pixels[other]).logits.argmax(axis=1) == target[other]).mean()
    return curve, np.sqrt(far[0] / far[1]), right


results = {decay: fine_tuned(decay) for decay in (1.0, 0.65)}
figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
for decay, (curve, far, right) in results.items():
    print(f"decay {decay:4}: loss {curve[0]:.2f} -> {curve[-1]:.3f}, {right:.1%} of the other digits right")
    axes[0].plot(curve, label=f"decay {decay}")
    axes[1].semilogy(far, ".-", label=f"decay {decay}")
axes[0].set(xlabel="step", title="loss on the 40 digits")
axes[1].set(title="how far the weights of a layer went (rms)")
axes[1].set_xticks(range(L + 2), ["embed", *(str(i) for i in range(L)), "head"])
axes[0].legend(fontsize=8)
plt.show()
flat, steep = results[1.0][1], results[0.65][1]
assert flat[0] > 0.3 * flat[-1]  # without decay the embeddings move like the head
assert steep[0] < 0.5 * flat[0]
assert all(curve[-1] < curve[0] for curve, _, _ in results.values())

# %% [markdown]
# Without decay all layers move about equally far, whether the loss needed it or not; with decay the embeddings stay
# closer to their pre-trained values, and most of the change is near the head. The price shows in the numbers above:
# at the same rate the loss falls more slowly, and after these few steps fewer of the other digits are classified
# correctly. So recipes with a decay (0.65 for base models) have larger rates and many epochs. What is measured is
# *where the change*
# *goes*, not that decay wins: a task as small as ours cannot show that.
#
# ## 7. In practice
#
# ```
# minibeit verify --model DIR --gradients --against torch    every gradient beside float64 and autograd
# ```
#
# The code: [`minibeit/tape.py`](../minibeit/tape.py) is the bookkeeping,
# [`minibeit/ops/backward/`](../minibeit/ops/backward/transformer.py) has each op's formulas, and
# [`minibeit/train/optimizer.py`](../minibeit/train/optimizer.py) is AdamW.

# %% [markdown]
# ## Exercises
#
# 1. Derive the gradient of the loss with respect to the logits (the mean over images of minus the log of the right
#    class's share), and from it those of the classifier's weight and bias. The trace has what the classifier reads
#    under "pooler".
# 2. Keys have no bias. Show with the numbers of section 3 that one would get no gradient, whatever the weights.
#
# The next two cells have solutions.

# %% [solution]
# 1. d(-log share_y) / d logit_c is share_c, less 1 for c = y; the classifier is a linear layer like any other.
logits = forward["logits"]
share = np.exp(logits - logits.max(axis=1, keepdims=True))
share = share / share.sum(axis=1, keepdims=True)
dlogits = (share - np.eye(len(share[0]))[y8]) / len(y8)
by_hand = {"weight": dlogits.T @ forward["pooler"], "bias": dlogits.sum(axis=0)}
for name, gradient in by_hand.items():
    print(f"classifier.{name:8} {relative(gradient, named[f'classifier.{name}']):.1e}")
    assert relative(gradient, named[f"classifier.{name}"]) < 1e-11

# %% [solution]
# 2. A bias of the keys would get the sum of dk over all tokens b. Each term is dS[a, b] q[a], and for every a the row
# dS[a] adds up to zero: the row sum in dS was taken out so that it does.
print(f"largest row sum of dS: {np.abs(dS.sum(axis=-1)).max():.0e}, of its elements: {np.abs(dS).max():.0e}")
print(f"largest sum of dk over tokens: {np.abs(dk.sum(axis=2)).max():.0e}, of its elements: {np.abs(dk).max():.0e}")
assert np.abs(dk.sum(axis=2)).max() < 1e-12 * np.abs(dk).max() * N
