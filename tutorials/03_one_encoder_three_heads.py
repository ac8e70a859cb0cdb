# %% [markdown]
# # 03 One encoder, three heads
#
# Everything BEiT does starts with the same encoder: an image becomes P patch tokens and `[CLS]`, each a vector of D
# numbers that knows about the whole image. What comes after, the *head*, is different for each task:
#
# | task | what the head reads | what comes out |
# |---|---|---|
# | classification | the mean of the patch tokens | K numbers for the image |
# | masked image modelling (pre-training) | the token of each patch | V numbers for each patch, one per *visual token* |
# | semantic segmentation | four hidden states, as maps | K numbers for each cell of a fine map |
#
# minibeit ships one trained encoder, for digits, with a classification head. Nothing trained ships for the other two
# tasks, so this tutorial does two things: it runs the real heads with *random* weights, to show their shapes; and it
# *fits* small linear heads to the trained encoder, by least squares in NumPy, to see what its tokens know. It always
# says what was trained and what is fitted here.
#
# Letters: **B** images, **P** patches in a grid of **(gh, gw)**, **N** = 1 + P tokens, **D** width, **L** blocks,
# **K** classes, **V** visual tokens. [Tutorial 01](01_from_pixels_to_a_label.ipynb) explains the encoder.

# %%
import warnings

import matplotlib.pyplot as plt
import numpy as np

from minibeit import (
    BeitConfig,
    BeitForImageClassification,
    BeitForMaskedImageModeling,
    BeitForSemanticSegmentation,
    BeitImageProcessor,
    Trace,
)
from minibeit.catalogue import weights_folder
from minibeit.masking import block_mask
from minibeit.params import param_shapes

digits = weights_folder() / "digits"
plt.rcParams.update({"figure.dpi": 80, "image.cmap": "gray", "font.size": 9})

held_out = np.load(digits / "held_out.npz")  # 360 digits that the encoder was not trained on
images, labels = held_out["images"], held_out["labels"]  # (360, 8, 8) bytes, (360,)
pixels = BeitImageProcessor.from_pretrained(digits)(list(images))["pixel_values"]  # (360, C, 32, 32)
order = np.random.default_rng(0).permutation(len(images))
fit, test = order[:240], order[240:]  # heads are fitted on 240 of them and judged on the other 120
print(f"{len(fit)} images to fit heads, {len(test)} to judge them")

# %% [markdown]
# ## 1. Classification: the head that was trained
#
# A layer norm of the mean of the patch tokens, and one matrix:
# [`minibeit/tasks/image_classification.py`](../minibeit/tasks/image_classification.py). We keep the hidden states of
# all blocks: the other heads will read them.

# %%
model = BeitForImageClassification.from_pretrained(digits, backend="numpy")
config = model.config
output = model(pixels, output_hidden_states=True)
states = [state[:, 1:] for state in output.hidden_states]  # L + 1 of (B, P, D), [CLS] left out
right = output.logits.argmax(axis=1) == labels
print("logits", output.logits.shape, "  hidden states", len(states), "of", states[0].shape)
print(f"right: {right.sum()} of {len(labels)}")
assert right.all()

# %% [markdown]
# At what depth does the network know which digit it sees? For each hidden state, we fit ten linear functions of the
# mean token and count. `ridge` is least squares with a small penalty on large weights; it has a closed form, so there
# is no training loop.


# %%
def ridge(x, y, penalty=1e-4):
    """weight (V, D) and bias (V,) that minimise mean |x W^T + b - y|^2 + penalty |W|^2, x (n, D), y (n, V)."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    x_mean, y_mean = x.mean(axis=0), y.mean(axis=0)
    x, y = x - x_mean, y - y_mean
    gram = x.T @ x / len(x) + penalty * np.eye(x.shape[1])
    weight = np.linalg.solve(gram, x.T @ y / len(x)).T
    return weight, y_mean - weight @ x_mean


def read(x, head):
    """x (..., D) -> (..., V)"""
    weight, bias = head
    return x @ weight.T + bias


ten = np.eye(10)[labels]  # (360, 10): 1 at the label
by_state = []
for state in states:
    mean = state.mean(axis=1) / state.std()  # (B, D)
    head = ridge(mean[fit], ten[fit])
    by_state.append((read(mean[test], head).argmax(axis=1) == labels[test]).mean())
names = ["embeddings", *(f"block {i}" for i in range(config.num_hidden_layers))]
print("digits read correctly, by a head fitted to the mean token after")
for name, value in zip(names, by_state, strict=True):
    print(f"  {name:12} {value:.1%}")
assert by_state[-1] > by_state[0] + 0.2

# %% [markdown]
# ## 2. Masked image modelling: the head of pre-training
#
# BEiT learned to see by filling gaps. Some patches are masked: their tokens are replaced by one learned *mask token*.
# For every masked patch the network has to say which *visual token* was there: one of V = 8192 codes that another
# network (DALL-E's tokenizer) assigns to patches. The head is a layer norm and one matrix, D to V, for each patch:
# [`minibeit/tasks/masked_image_modeling.py`](../minibeit/tasks/masked_image_modeling.py). We first run it with random
# weights, to see what goes in and out. Patches are masked in blocks, as in the paper:
# [`minibeit/masking.py`](../minibeit/masking.py).

# %%
rng = np.random.default_rng(1)
tiny = BeitConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, use_mask_token=True)
untrained = BeitForMaskedImageModeling(tiny, seed=0, backend="numpy")
mask = block_mask((14, 14), 75, rng)  # (gh, gw): the paper's grid and number
x = rng.uniform(-1, 1, (1, 3, 224, 224))
codes = rng.integers(0, tiny.vocab_size, mask.sum())  # any: nothing is trained
untrained_output = untrained(x, bool_masked_pos=mask.reshape(1, -1), labels=codes)
print("logits", untrained_output.logits.shape, " masked", mask.sum(), f" loss {untrained_output.loss:.2f}")
print(f"log V = {np.log(tiny.vocab_size):.2f}: the loss of guessing")
assert abs(untrained_output.loss - np.log(tiny.vocab_size)) < 0.2

figure, axes = plt.subplots(1, 4, figsize=(8, 2.2), layout="constrained")
for axis, seed in zip(axes, range(4), strict=True):
    drawn = block_mask((14, 14), 75, np.random.default_rng(seed))
    axis.imshow(drawn, cmap="Greys")
    axis.set(title=f"{drawn.sum()} of 196 masked", xticks=[], yticks=[])
plt.show()

# %% [markdown]
# Now something real, but small. Our *visual tokens*: the 2 x 2 original pixels under each patch of a digit are
# clustered into V = 16 codes by k-means, a tokenizer of a few lines. Our *mask token*: what the encoder makes of bare
# paper. Our *head*: fitted by least squares. The encoder stays as it is. It was never trained with masked patches,
# which is exactly what pre-training would do, so do not expect much.

# %%
V = 16


def patches_of(pictures):
    """(B, 8, 8) -> (B, P, 4): the four pixels under each patch"""
    return pictures.reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 16, 4)


def nearest(x, centres):
    """(..., 4) -> (...): number of the nearest centre"""
    return ((x[..., None, :] - centres) ** 2).sum(axis=-1).argmin(axis=-1)


points = patches_of(images[fit]).reshape(-1, 4) / 255
centres = rng.permutation(np.unique(points, axis=0))[:V]
for _ in range(30):  # k-means: to the nearest centre, centre to the mean
    nearest_centre = nearest(points, centres)
    centres = np.stack([points[nearest_centre == c].mean(axis=0) for c in range(V)])
codes = nearest(patches_of(images) / 255, centres)  # (B, P)


def drawn_with(codes):
    """(P,) codes -> (8, 8) image"""
    return centres[codes].reshape(4, 4, 2, 2).transpose(0, 2, 1, 3).reshape(8, 8)


figure, axes = plt.subplots(1, 11, figsize=(9, 1.6), layout="constrained", width_ratios=[2.5, *[1] * 10])
code_sheet = np.pad(centres.reshape(4, 4, 2, 2), ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=np.nan)
axes[0].imshow(code_sheet.transpose(0, 2, 1, 3).reshape(12, 12)[:-1, :-1], vmin=0, vmax=1)
axes[0].set_title("the 16 codes")
for i in range(5):
    axes[1 + 2 * i].imshow(images[test[i]])
    axes[2 + 2 * i].imshow(drawn_with(codes[test[i]]), vmin=0, vmax=1)
    axes[2 + 2 * i].set_title("in codes", fontsize=8)
for axis in axes:
    axis.set_axis_off()
plt.show()

# %%
masked_config = config.replace(use_mask_token=True, vocab_size=V)
paper = model(np.full((1, 3, 32, 32), -1.0), output_hidden_states=True).hidden_states[0][:, 1:2]  # (1, 1, D)
D = config.hidden_size
wanted_names = param_shapes(masked_config, "masked_image_modeling")
arrays = {name: model.arrays[name] for name in wanted_names if name in model.arrays}
arrays["beit.embeddings.mask_token"] = paper
arrays["norm.weight"], arrays["norm.bias"] = np.ones(D, np.float32), np.zeros(D, np.float32)
arrays["lm_head.weight"], arrays["lm_head.bias"] = np.zeros((V, D), np.float32), np.zeros(V, np.float32)
masked_model = BeitForMaskedImageModeling(masked_config, arrays=arrays, backend="numpy")


def cover(count):
    """Masks (count, P) of 6 of the 16 patches, in blocks."""
    return np.stack([block_mask((4, 4), 6, rng).reshape(-1) for _ in range(count)])


def covered_states(chosen, masks):
    """Of masked patches: the last state, normalised as the head gets it, (n, D), and all blocks' states, (n, L D)."""
    trace = Trace("layernorm")
    out = masked_model(pixels[chosen], bool_masked_pos=masks, output_hidden_states=True, trace=trace)
    every = np.concatenate([s / s.std() for s in out.hidden_states[1:]], axis=-1)
    return trace["layernorm"][:, 1:][masks], every[:, 1:][masks]


rounds = 8  # each image is masked in eight ways
masks_fit, masks_test = cover(rounds * len(fit)), cover(rounds * len(test))
many_fit, many_test = np.tile(fit, rounds), np.tile(test, rounds)
last_fit, every_fit = covered_states(many_fit, masks_fit)
last_test, every_test = covered_states(many_test, masks_test)
target_fit, target_test = codes[many_fit][masks_fit], codes[many_test][masks_test]

lm_head = ridge(last_fit, np.eye(V)[target_fit])
every_head = ridge(every_fit, np.eye(V)[target_fit])
place_fit, place_test = np.nonzero(masks_fit)[1], np.nonzero(masks_test)[1]
usual = np.array([np.bincount(target_fit[place_fit == p], minlength=V).argmax() for p in range(16)])

scores = {
    "always the most frequent code": (target_test == np.bincount(target_fit).argmax()).mean(),
    "the most frequent code at this place": (target_test == usual[place_test]).mean(),
    "fitted head on the last state": (target_test == read(last_test, lm_head).argmax(axis=1)).mean(),
    "fitted head on the states of all blocks": (target_test == read(every_test, every_head).argmax(axis=1)).mean(),
}
print(f"codes of masked patches predicted correctly ({len(target_test)} patches)")
for name, value in scores.items():
    print(f"  {name:40} {value:.1%}")

# %% [markdown]
# The head that reads only the last state, as BEiT's does, falls short of a table of the most frequent code at each
# place. The states of all blocks together do better than the table: some information about its neighbours reaches a
# masked patch even without pre-training. Closing the rest of the gap is what pre-training is for.
#
# The fitted numbers are the weights of an ordinary model, `BeitForMaskedImageModeling`. Below are the first eight test
# images, filled in by the head that reads all blocks:

# %%
arrays["lm_head.weight"], arrays["lm_head.bias"] = (a.astype(np.float32) for a in lm_head)
masked_model = BeitForMaskedImageModeling(masked_config, arrays=arrays, backend="numpy")
guess = masked_model(pixels[many_test], bool_masked_pos=masks_test).logits  # (B, P, V)
by_model = (guess.argmax(axis=-1)[masks_test] == target_test).mean()
print(f"by the model's own logits: {by_model:.1%}")
assert abs(by_model - scores["fitted head on the last state"]) < 1e-3
usual_right = scores["the most frequent code at this place"]
assert scores["fitted head on the last state"] < usual_right < scores["fitted head on the states of all blocks"]

every_guess = np.zeros(masks_test.shape, int)
every_guess[masks_test] = read(every_test, every_head).argmax(axis=1)
figure, axes = plt.subplots(3, 8, figsize=(8, 3.4), layout="constrained")
for column, i in enumerate(range(8)):
    covered = masks_test[i]
    hidden = np.repeat(np.repeat(covered.reshape(4, 4), 2, axis=0), 2, axis=1)
    axes[0, column].imshow(drawn_with(codes[many_test[i]]), vmin=0, vmax=1)
    seen = np.ma.masked_array(images[many_test[i]] / 255, hidden)
    axes[1, column].imshow(seen, cmap=plt.get_cmap("gray").with_extremes(bad="tab:orange"), vmin=0, vmax=1)
    axes[2, column].imshow(drawn_with(np.where(covered, every_guess[i], codes[many_test[i]])), vmin=0, vmax=1)
for line, name in zip(axes, ("in codes", "what it sees", "filled in"), strict=True):
    line[0].set_ylabel(name)
    for axis in line:
        axis.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## 3. Segmentation: a class for every pixel
#
# The real head is UPerNet. It reads four hidden states as maps of (gh, gw), brings them to 4, 2, 1 and 1/2 times that
# resolution (a small pyramid), adds global context (means over a few large cells), and fuses everything at the finest
# level: [`minibeit/model/segmentation.py`](../minibeit/model/segmentation.py). We load the digits checkpoint into that
# task. The encoder's weights are loaded; the head's, which the checkpoint does not have, are drawn at random, and
# minibeit warns about it. So this is for the shapes only: such a head knows nothing.

# %%
classes = {0: "paper", **{k + 1: f"ink of a {k}" for k in range(10)}}
changes = {"id2label": classes, "out_indices": [0, 1, 2, 3], "feature_convention": "unilm"}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    upernet = BeitForSemanticSegmentation.from_pretrained(digits, backend="numpy", **changes)
taken = [name for name in upernet.arrays if name.startswith("beit.")]
print(f"warnings: {len(caught)}; tensors loaded: {len(taken)}, drawn at random: {len(upernet.arrays) - len(taken)}")
assert caught and all(np.array_equal(upernet.arrays[name], model.arrays[name]) for name in taken)

trace = Trace()
out = upernet(pixels[:1], trace=trace)
for name in trace:
    if not name.startswith(("encoder", "embeddings")):
        print(f"{name:32} {trace[name].shape}")
encoder_size = sum(upernet.arrays[name].size for name in taken)
print(f"parameters: encoder {encoder_size:,}, both heads {upernet.num_parameters() - encoder_size:,}")
assert out.logits.shape == (1, 11, 16, 16)

# %% [markdown]
# Now a fitted one. The task: classify each of the 8 x 8 original pixels as *paper* or *ink of a 0, ..., ink of a 9*, K
# = 11 classes. Paper and ink can be told apart by the pixel alone. *Which digit the ink belongs to* cannot: that takes
# the whole image, so each patch must have learned about the others.
#
# The head is linear: from the D numbers of one patch token to K numbers for each of the four pixels under it. It sees
# one token and nothing else. We fit it to the pixels of the patch alone, to each hidden state, and to the states of all
# blocks together, in the spirit of UPerNet, which reads several.

# %%
K = len(classes)
ink = images >= 128
truth = np.where(ink, labels[:, None, None] + 1, 0)  # (B, 8, 8)
target = patches_of(truth)  # (B, P, 4)


def segment(features):
    """features (B, P, n) -> class of every pixel of the test images, (B, P, 4), by a head fitted to the others"""
    wanted = np.eye(K)[target[fit]].reshape(-1, 4 * K)
    head = ridge(features[fit].reshape(-1, features.shape[-1]), wanted)
    return read(features[test], head).reshape(-1, 16, 4, K).argmax(axis=-1)


scaled = [state / state.std() for state in states]
pixel_patches = pixels[:, 0].reshape(-1, 4, 8, 4, 8).transpose(0, 1, 3, 2, 4).reshape(-1, 16, 64)
features = {
    "pixels of the patch": pixel_patches,
    **dict(zip(names, scaled, strict=True)),
    "all blocks": np.concatenate(scaled[1:], axis=-1),
}
found = {name: segment(x) for name, x in features.items()}  # (B, P, 4) each

wanted = target[test]
print(f"{'fitted to':22}{'paper or ink':>14}{'digit of ink':>14}{'all pixels':>12}{'mean IoU':>10}")
table = {}
for name, classed in found.items():
    overlap = [((classed == k) & (wanted == k)).sum() / ((classed == k) | (wanted == k)).sum() for k in range(K)]
    table[name] = (
        ((classed > 0) == (wanted > 0)).mean(),
        (classed == wanted)[wanted > 0].mean(),
        (classed == wanted).mean(),
        np.mean(overlap),
    )
    print("{:22}{:14.1%}{:14.1%}{:12.1%}{:10.1%}".format(name, *table[name]))

# %% [markdown]
# *digit of ink*: the share of ink pixels that get the right class. *mean IoU*, the usual metric: for each class, the
# number of pixels that both the head and the truth assign to it, divided by the number that either does, averaged over
# classes.
#
# A patch by itself can tell ink from paper (not always: a linear function is not a threshold) and knows next to nothing
# about the digit. Block by block, the tokens learn about the whole image. All blocks together do clearly better than
# the last one alone, in both columns: they hold different information. This is why the segmentation head of BEiT reads
# four states rather than one.

# %%
figure, axis = plt.subplots(figsize=(6, 2.8), layout="constrained")
places = range(len(table))
axis.plot(places, [row[0] for row in table.values()], "s--", label="paper or ink")
axis.plot(places, [row[1] for row in table.values()], "o-", label="digit of ink")
axis.set_xticks(places, [name.replace(" of the ", "\nof the ") for name in table], fontsize=8)
axis.set(ylabel="share of pixels right", ylim=(0, 1))
axis.grid(alpha=0.3)
axis.legend()
plt.show()


def as_map(classed):
    """(P, 4) -> (8, 8)"""
    return classed.reshape(4, 4, 2, 2).transpose(0, 2, 1, 3).reshape(8, 8)


palette = np.concatenate([[[0.1, 0.1, 0.1]], plt.get_cmap("tab10").colors])  # (K, 3)
rows = ("picture", "truth", "pixels of the patch", "block 1", "block 3", "all blocks")
figure, axes = plt.subplots(len(rows), 10, figsize=(8, 5.2), layout="constrained")
for k in range(10):
    i = int(np.flatnonzero(labels[test] == k)[0])
    axes[0, k].imshow(images[test[i]])
    axes[1, k].imshow(palette[truth[test[i]]])
    for line, name in zip(axes[2:], rows[2:], strict=True):
        line[k].imshow(palette[as_map(found[name][i])])
for line, name in zip(axes, rows, strict=True):
    line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    for axis in line:
        axis.set(xticks=[], yticks=[])
plt.show()

digit_of_ink = [table[name][1] for name in names]
assert digit_of_ink == sorted(digit_of_ink) and table["all blocks"][1] > digit_of_ink[-1] + 0.05
assert table["all blocks"][1] > 0.8 and table["pixels of the patch"][1] < 0.3

# %% [markdown]
# Ten colours for ten digits, dark for paper. The images are the first of each digit among those that the head was not
# fitted to.
#
# ## Summary
#
# The encoder is the same in all three tasks: `model.params.beit`, computed by
# [`minibeit/model/encoder.py`](../minibeit/model/encoder.py). A task adds a head and says which hidden states it needs.
# A checkpoint for one task loads into another, with a randomly drawn head: that is where fine-tuning starts.

# %% [markdown]
# ## Exercises
#
# 1. BEiT's classifier reads the mean of the patch tokens and not `[CLS]`. What would a head know that is fitted to
#    `[CLS]`, after each block?
# 2. How many labelled images does the fitted head after the last block need? Fit it to 15, 30, 60, 120 and 240 of them.
#
# The next two cells have solutions.

# %% [solution]
# 1. The same loop as in section 1, with another token.
by_cls = []
for state in output.hidden_states:
    cls = state[:, 0] / state.std()  # (B, D)
    head = ridge(cls[fit], ten[fit])
    by_cls.append((read(cls[test], head).argmax(axis=1) == labels[test]).mean())
for name, mean_right, cls_right in zip(names, by_state, by_cls, strict=True):
    print(f"  {name:12} mean of the patches {mean_right:.1%}, [CLS] {cls_right:.1%}")
assert by_cls[0] < 0.2  # before the first block, [CLS] is the same for every image
assert by_cls[-1] > by_cls[0] + 0.2  # attention brings it what the patches know

# %% [solution]
# 2. The encoder has seen 1,437 digits with their labels, so the classes lie apart already, and few examples will do.
mean = states[-1].mean(axis=1) / states[-1].std()
by_count = {}
for count in (15, 30, 60, 120, 240):
    head = ridge(mean[fit[:count]], ten[fit[:count]])
    by_count[count] = (read(mean[test], head).argmax(axis=1) == labels[test]).mean()
    print(f"  {count:3} images: {by_count[count]:.1%}")
assert by_count[240] > by_count[15]
assert by_count[30] > 0.5
