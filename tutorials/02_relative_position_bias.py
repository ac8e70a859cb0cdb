# %% [markdown]
# # 02 Relative position bias
#
# Attention compares tokens by their content; nothing in it says where they are. BEiT supplies that with a small table
# of learned numbers: for each head and each *offset* between two patches, a number that is added to the score. This
# tutorial shows the table, what a trained one looks like, what it does to attention, how it is transferred to another
# grid of patches, and where transformers reads it wrongly.
#
# Letters: **P** patches in a grid of **(gh, gw)**, **N** = 1 + P tokens (the first is `[CLS]`), **H** heads, **R** rows
# of the table, **L** blocks. [Tutorial 01](01_from_pixels_to_a_label.ipynb) explains tokens and scores.
#
# The code: [`minibeit/model/position_bias.py`](../minibeit/model/position_bias.py).

# %%
import matplotlib.pyplot as plt
import numpy as np
from skimage import data

from minibeit import BeitForImageClassification, BeitImageProcessor
from minibeit.catalogue import weights_folder
from minibeit.checkpoint.resize import geometric_positions, resize_arrays, resize_stored_table
from minibeit.model.position_bias import resize_table
from minibeit.ops import get_ops
from minibeit.params import table_rows

digits = weights_folder() / "digits"
ops = get_ops("numpy")
plt.rcParams.update({"figure.dpi": 80, "font.size": 9})

# %% [markdown]
# ## 1. Which row of the table?
#
# Two patches of a grid of gh rows and gw columns are at most gh - 1 rows and gw - 1 columns apart, in either direction:
# (2 gh - 1)(2 gw - 1) possible offsets. Three more rows are for pairs with `[CLS]`, which has no position: `[CLS]`
# looking at a patch, a patch looking at `[CLS]`, and `[CLS]` looking at itself. That makes
#
# $$R = (2\,gh - 1)(2\,gw - 1) + 3$$
#
# rows, with a column for each head. The index says for token a (looking) and token b (looked at) which row to read. For
# two patches it depends on the differences of their rows and columns, Δrow = row of a - row of b and
# Δcolumn = column of a - column of b:
#
# $$\text{index} = (\Delta\text{row} + gh - 1)(2\,gw - 1) + (\Delta\text{column} + gw - 1)$$
#
# Mind the sign: it is a minus b. A patch b to the *right* of a has Δcolumn = -1, one *below* a has Δrow = -1. So the
# rows of the table begin with the patch b that is farthest down and to the right, seen from a.


# %%
def draw_index(axis, grid):
    index = ops.relative_position_index(grid)  # (N, N)
    axis.imshow(index, cmap="viridis", alpha=0.7)
    for a, row in enumerate(index):
        for b, number in enumerate(row):
            axis.text(b, a, number, ha="center", va="center", fontsize=8)
    names = ["[CLS]", *(f"{i // grid[1]},{i % grid[1]}" for i in range(grid[0] * grid[1]))]
    axis.set_xticks(range(len(names)), names, fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set(title=f"grid {grid[0]} x {grid[1]}, R = {table_rows(grid)}", xlabel="looked at: token b")


figure, axes = plt.subplots(1, 2, figsize=(8, 3.9), layout="constrained")
draw_index(axes[0], (2, 2))
draw_index(axes[1], (2, 3))
axes[0].set_ylabel("looking: token a")
plt.show()

small = ops.relative_position_index((2, 2))
assert small[0].tolist() == [11, 9, 9, 9, 9]  # [CLS] to itself is the last row, to any patch the third last
assert small[1].tolist() == [10, 4, 3, 1, 0]
assert small[1, 1] == small[2, 2] == small[3, 3] == small[4, 4]  # offset 0, 0
assert small[1, 2] == small[3, 4]  # b one to the right of a, in the upper row and in the lower one
assert small[1, 4] == 0  # b one down and one to the right: the first row of the table

# %% [markdown]
# Pairs with the same offset read the same row: diagonals repeat. The bias of a pair is then
# `bias[h, a, b] = table[index[a, b], h]`. It depends on the grid and on the weights, never on the image.
#
# ## 2. A trained table
#
# The digits checkpoint has a grid of 4 x 4, hence R = 7 * 7 + 3 = 52, and a table of its own in each of its L = 4
# blocks (in pre-training, BEiT has one that all blocks share). Training starts from zeros. Without the last three rows,
# a column of the table is a map of 7 x 7 offsets, with Δrow and Δcolumn from -3 to 3. Since these are a minus b, the
# map as stored has the patches *below* a at its top and those to the *right* of a at its left. We turn it by 180
# degrees: now the centre is the looking patch itself, and the cell to the right of the centre is the patch to its
# right.

# %%
processor = BeitImageProcessor.from_pretrained(digits)
model = BeitForImageClassification.from_pretrained(digits, backend="numpy")
config = model.config
L, H, grid = config.num_hidden_layers, config.num_attention_heads, config.grid
tables = np.stack([block.bias_table for block in model.params.beit.encoder])  # (L, R, H)


def offset_map(column, grid):
    """A column (R,) of a table -> (2 gh - 1, 2 gw - 1), as seen from the looking patch: down is b below a."""
    return column[:-3].reshape(2 * grid[0] - 1, 2 * grid[1] - 1)[::-1, ::-1]  # from a minus b to b minus a


figure, axes = plt.subplots(L, H, figsize=(7.4, 7), layout="constrained")
limit = np.abs(tables[:, :-3]).max()
for i in range(L):
    for h in range(H):
        axis = axes[i, h]
        shown = axis.imshow(
            offset_map(tables[i, :, h], grid), cmap="RdBu_r", vmin=-limit, vmax=limit, extent=(-3.5, 3.5, 3.5, -3.5)
        )
        axis.plot(0, 0, "k+", markersize=6)
        axis.set(xticks=(-3, 0, 3), yticks=(-3, 0, 3))
        axis.set_title(f"block {i}, head {h}", fontsize=8)
figure.supxlabel("columns from the looking patch to the one looked at")
figure.supylabel("rows from the looking patch to the one looked at")
figure.colorbar(shown, ax=axes, shrink=0.6, label="added to the score")
plt.show()

centre = offset_map(np.arange(table_rows(grid)), grid)[2:5, 2:5]  # row numbers of the nearest offsets
index = ops.relative_position_index(grid)
assert index[1 + 5, 1 + 6] == centre[1, 2] and index[1 + 5, 1 + 9] == centre[2, 1]  # patch 5 to 6: right; to 9: down
favourite = {}  # (block, head) -> how many rows below, and columns to the right of, the looking patch
for i in (0, L - 1):
    for h in range(H):
        offsets = offset_map(tables[i, :, h], grid)
        y, x = np.unravel_index(offsets.argmax(), offsets.shape)
        favourite[i, h] = int(y) - 3, int(x) - 3
        print(f"block {i}, head {h}: largest is {offsets.max():.1f}, for the patch {y - 3:+d} down, {x - 3:+d} right")
print(f"all blocks: from {tables.min():.1f} to {tables.max():.1f}")
assert limit > 4
assert all(max(map(abs, favourite[0, h])) == 1 for h in range(H))
assert max(max(map(abs, favourite[L - 1, h])) for h in range(H)) == 3

# %% [markdown]
# A score with bias s counts exp(s) times as much in the softmax as one with bias 0, and exp(4) is 55: these are strong
# preferences. In the first block every head has its largest bias at a neighbour of the looking patch; in the last block
# some have it as far away as the grid allows.
#
# The same numbers by distance, and the three rows of `[CLS]`:

# %%
down, right = np.mgrid[-3:4, -3:4]
distance = np.sqrt(down**2 + right**2).ravel()
rings = np.unique(distance.round(6))


def ring_means(column):
    """The mean bias at every distance, from a column (R,) of a table."""
    column = offset_map(column, grid).ravel()
    return np.array([column[np.isclose(distance, ring)].mean() for ring in rings])


figure, axes = plt.subplots(1, 2, figsize=(9, 3), width_ratios=[1.3, 1], layout="constrained")
for h in range(H):
    axes[0].plot(rings, ring_means(tables[0, :, h]), "o-", markersize=4, label=f"head {h}")
axes[0].set(title="block 0: mean bias by distance", xlabel="distance in patches", ylabel="bias")
axes[0].legend()
axes[0].grid(alpha=0.3)
extra = tables[:, -3:].transpose(0, 2, 1).reshape(L * H, 3)  # (L H, 3)
shown = axes[1].imshow(extra.T, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
axes[1].set_yticks(range(3), ["[CLS] to patch", "patch to [CLS]", "[CLS] to [CLS]"])
axes[1].set_xticks(np.arange(L) * H + 1.5, [f"block {i}" for i in range(L)])
axes[1].set_title("the three rows of [CLS], a column per head")
figure.colorbar(shown, ax=axes[1])
plt.show()

ring_of = np.abs(distance[:, None] - rings).argmin(axis=1)
columns = [tables[i, :, h] for i in range(L) for h in range(H)]
explained = [ring_means(c)[ring_of].var() / offset_map(c, grid).var() for c in columns]
print(f"distance explains {np.mean(explained):.0%} of a head's variance on average")
assert np.mean(explained) < 0.5

# %% [markdown]
# Distance alone explains less than half of what a head has learned: direction matters.
#
# ## 3. What it does: attention
#
# Where does patch 5 (second row, second column) look, in each head of block 0? Below is the attention with its bias,
# and what would be left of it if the bias were zero. The redder a patch, the larger its share.

# %%
held_out = np.load(digits / "held_out.npz")
images, labels = held_out["images"], held_out["labels"]
pixels = processor(list(images))["pixel_values"]  # (360, C, 32, 32)
three = pixels[list(labels).index(3)][None]

zeros = {name: np.zeros_like(a) if name.endswith("bias_table") else a for name, a in model.arrays.items()}
without = BeitForImageClassification(config, arrays=zeros, backend="numpy")
attention = {
    "with bias": model(three, output_attentions=True).attentions[0][0],  # (H, N, N)
    "without": without(three, output_attentions=True).attentions[0][0],
}


def overlay(axis, image, row, grid):
    """Shares (P,) of the patches over the image (C, height, width): the redder, the larger; the largest is opaque."""
    height, width = image.shape[1:]
    axis.imshow((image.mean(axis=0) + 1) / 2, cmap="gray", vmin=-0.3, vmax=1)
    shares = row.reshape(grid) / row.max()
    red = np.ones(grid)
    axis.imshow(red, cmap="Reds", vmin=0, vmax=1.4, alpha=shares, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    axis.set(xticks=[], yticks=[])


def mark(axis, patch, size, grid):
    top, left = patch // grid[1] * size, patch % grid[1] * size
    axis.add_patch(plt.Rectangle((left - 0.5, top - 0.5), size, size, fill=False, edgecolor="cyan", linewidth=1.5))


figure, axes = plt.subplots(2, H, figsize=(7, 3.9), layout="constrained")
for line, (name, probs) in zip(axes, attention.items(), strict=True):
    for h, axis in enumerate(line):
        overlay(axis, three[0], probs[h, 1 + 5, 1:], grid)
        mark(axis, 5, 8, grid)
        axis.set_title(f"head {h}", fontsize=8)
    line[0].set_ylabel(name)
plt.show()

# %%
right_with = int((model(pixels).logits.argmax(1) == labels).sum())
right_without = int((without(pixels).logits.argmax(1) == labels).sum())
print(f"held-out digits read correctly: {right_with} of {len(labels)} with the bias, {right_without} without")

rng = np.random.default_rng(0)
order = rng.permutation(16)
patches = three.reshape(1, 3, 4, 8, 4, 8).transpose(0, 2, 4, 1, 3, 5).reshape(1, 16, 3, 8, 8)
shuffled = patches[:, order].reshape(1, 4, 4, 3, 8, 8).transpose(0, 3, 1, 4, 2, 5).reshape(three.shape)
change = {
    name: np.abs(m(shuffled).logits - m(three).logits).max() for name, m in (("with", model), ("without", without))
}
print(f"patches shuffled: the logits change by {change['with']:.1f} with the bias, {change['without']:.0e} without")
assert right_with == 360 and right_without < 300
assert change["without"] < 1e-4 < 1 < change["with"]

# %% [markdown]
# Without the bias BEiT is blind to position: the same patches in any order are the same image to it. The bias is all it
# has. (DiT has no bias and adds learned absolute positions to the tokens instead.)
#
# ## 4. Another grid
#
# Published models take images of 224 x 224 pixels, or 384, 512 or 640 on a side. Patches stay 16 x 16, so a larger
# image has more of them, and the table has no rows for the new offsets. So it is stretched: the map of offsets shown
# above is resized from (2 gh - 1) x (2 gw - 1) to the size for the new grid; the three rows of `[CLS]` stay. Two
# methods are in use.
#
# * **transformers: bilinear**, whenever an image has another size. The *ends* of the old table are aligned with those
#   of the new one: an offset of 1 in the old grid becomes one of about 2 in a grid twice as fine. minibeit does the
#   same when a model is given such an image, so that the results agree.
# * **The authors: a cubic spline on geometric positions**, once, before they fine-tune. Near offsets keep their meaning
#   (1 stays at 1), and only far ones are spread out: the old offsets 0, 1, 2, 3, ... move to 0, 1, 1 + q,
#   1 + q + q², ... in the new grid, with q such that the ends meet. timm uses the same positions, with linear
#   interpolation between them.
#
# The code: [`minibeit/checkpoint/resize.py`](../minibeit/checkpoint/resize.py), also on the command line as
# `minibeit convert`.

# %%
old, new = 27, 47  # offsets per axis for 14 and for 24 patches: 224 and 384 pixels
stretched = ((np.arange(old) + 0.5) * new / old - 0.5) - new // 2  # where bilinear puts them
geometric = geometric_positions(old, new)
figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
offsets = np.arange(old) - old // 2
axes[0].plot(offsets, stretched, "o-", markersize=3, label="bilinear")
axes[0].plot(offsets, geometric, "s-", markersize=3, label="geometric")
axes[0].plot(offsets, offsets, "k:", label="the same offset")
axes[0].set(title="224 to 384 pixels", xlabel="offset in the old grid", ylabel="offset in the new grid")
axes[0].legend()
axes[0].grid(alpha=0.3)
axes[1].plot(offsets[13:20], stretched[13:20], "o-", markersize=4)
axes[1].plot(offsets[13:20], geometric[13:20], "s-", markersize=4)
axes[1].plot(offsets[13:20], offsets[13:20], "k:")
axes[1].set(title="the same, near 0", xlabel="offset in the old grid")
axes[1].grid(alpha=0.3)
plt.show()
q = geometric[15] - geometric[14]
print(f"old offset 1 goes to {stretched[14]:.2f} (bilinear) and {geometric[14]:.2f} (geometric, q = {q:.4f})")
assert abs(q - 1.0903) < 1e-4  # the constant that the authors' code names for this case
assert abs(geometric[-1] - 23) < 1e-3

# %% [markdown]
# Now our own table, from 4 x 4 patches to 8 x 8, again seen from the looking patch:

# %%
bigger = (8, 8)
column = tables[0, :, 0]
drawn = {"as trained, 4 x 4": (column, grid)}
for method in ("transformers", "timm", "unilm"):
    drawn[f"{method}, 8 x 8"] = (resize_stored_table(tables[0], grid, bigger, method)[:, 0], bigger)
figure, axes = plt.subplots(1, 4, figsize=(9, 2.6), layout="constrained")
for axis, (title, (col, g)) in zip(axes, drawn.items(), strict=True):
    reach = g[0] - 0.5
    shown = axis.imshow(
        offset_map(col, g), cmap="RdBu_r", vmin=-limit, vmax=limit, extent=(-reach, reach, reach, -reach)
    )
    axis.set_title(title, fontsize=9)
figure.colorbar(shown, ax=axes, shrink=0.8)
plt.show()
on_the_fly = resize_table(ops, tables[0], grid, bigger)  # what the model does by itself
stored = resize_stored_table(tables[0], grid, bigger, "transformers")
assert np.abs(on_the_fly - stored).max() < 1e-5

reach = geometric_positions(7, 15)[-1]
swing = np.abs(resize_stored_table(tables[0], grid, bigger, "unilm")[:-3]).max() / np.abs(tables[0, :-3]).max()
print(f"the outermost old offset, 3, goes to {reach:.2f}; the spline's largest number is {swing:.1f} times the table's")
assert reach == geometric_positions(7, 15).max() < 7 and swing > 1

# %% [markdown]
# Three offsets to a side are too few for the geometric positions: q is searched only up to 1.5, so the ends do not meet
# (3 goes to 4.75 instead of 7, and everything beyond gets the outermost number), and here the spline overshoots the
# numbers it passes through by far. With the 13 offsets of the published models, above, the ends do meet.
#
# Which method is right? That depends on what a larger image shows. Two experiments with the held-out digits, without
# any training in between: the same digits *magnified*, so that a stroke crosses more patches; and the same digits at
# their original size on a *wider* sheet, so that a stroke crosses as many patches as before. (The spline is defined for
# square grids only.)


# %%
def read_rightly(arrays, config, pixels):
    """How many of the held-out digits get the right label."""
    model = BeitForImageClassification(config, arrays=arrays, backend="numpy")
    return int((model(pixels).logits.argmax(1) == labels).sum())


def wider(height, width):
    """The digits in the middle of an empty sheet."""
    sheet = np.full((len(pixels), 3, height, width), -1, np.float32)
    top, left = (height - 32) // 2, (width - 32) // 2
    sheet[:, :, top : top + 32, left : left + 32] = pixels
    return sheet


trials = {
    "magnified to 48 x 48": (48, processor(list(images), size=48)["pixel_values"]),
    "magnified to 64 x 64": (64, processor(list(images), size=64)["pixel_values"]),
    "on a sheet of 32 x 48": ((32, 48), wider(32, 48)),
    "on a sheet of 32 x 64": ((32, 64), wider(32, 64)),
}
counts = {}
print(f"{'right of 360':24}{'transformers':>14}{'timm':>8}{'unilm':>8}")
for name, (size, batch) in trials.items():
    for method in ("transformers", "timm", "unilm"):
        if isinstance(size, int) or method != "unilm":
            resized_config, resized = resize_arrays(model.arrays, config, size, method)
            counts[name, method] = read_rightly(resized, resized_config, batch)
    row = [counts.get((name, method), "-") for method in ("transformers", "timm", "unilm")]
    print(f"{name:24}{row[0]:>14}{row[1]:>8}{row[2]:>8}")
assert counts["magnified to 64 x 64", "transformers"] > 300 > 250 > counts["magnified to 64 x 64", "unilm"]
assert counts["on a sheet of 32 x 64", "timm"] > counts["on a sheet of 32 x 64", "transformers"]

# %% [markdown]
# Where strokes are magnified, stretched offsets fit; on the widest sheet, offsets that keep their meaning fit better.
# This is a toy: a 4 x 4 grid, and no fine-tuning after the change. The authors do fine-tune, and report that plain
# linear interpolation hurt their segmentation model (issue 376 of microsoft/unilm). So to reproduce transformers, do as
# transformers does; to start fine-tuning, do as the authors do; and where it matters, measure.
#
# ## 5. Attention over a photo
#
# A larger grid needs nothing but a larger table. Here is the digits network on a photo of 128 x 128 pixels, with 16 x
# 16 patches: where do `[CLS]` and two of the patches look, in the last block? The network was trained on digits, so
# this shows the mechanism, not any understanding of the image.

# %%
photo = processor(data.astronaut(), size=128)["pixel_values"]  # (1, C, 128, 128)
probs = model(photo, output_attentions=True).attentions[L - 1][0]  # (H, N, N), N = 257
fine = (16, 16)
queries = {"[CLS]": 0, "patch (3, 7): face": 1 + 3 * 16 + 7, "patch (12, 3): suit": 1 + 12 * 16 + 3}

figure, axes = plt.subplots(len(queries), H, figsize=(7.4, 5.8), layout="constrained")
for line, (name, token) in zip(axes, queries.items(), strict=True):
    for h, axis in enumerate(line):
        overlay(axis, photo[0], probs[h, token, 1:], fine)
        if token:
            mark(axis, token - 1, 8, fine)
        axis.set_title(f"head {h}", fontsize=8)
    line[0].set_ylabel(name, fontsize=8)
plt.show()
assert probs.shape == (H, 257, 257) and np.allclose(probs.sum(-1), 1, atol=1e-5)

# %% [markdown]
# ## 6. Where transformers reads the table wrongly
#
# The rows of the table are ordered by (Δrow, Δcolumn): 2 gh - 1 times 2 gw - 1 of them. When transformers resizes the
# table, it takes these two sides for (width, height). On a square grid nobody notices. On any other grid the numbers
# end up at the wrong offsets, and since transformers resizes in every forward pass, this happens even to an image of
# exactly the size in the config. Here is a table whose entries *are* Δcolumn, drawn as it is stored:

# %%
wide = (4, 6)
R = table_rows(wide)
column_difference = np.concatenate([np.tile(np.arange(-5.0, 6.0), 7), np.zeros(3)])[:, None]  # (R, 1)
views = {
    "as it is stored": column_difference,
    "minibeit": resize_table(ops, column_difference, wide, wide),
    "transformers": resize_table(ops, column_difference, wide, wide, compat="transformers"),
}
figure, axes = plt.subplots(1, 3, figsize=(9, 2.3), layout="constrained")
for axis, (title, table) in zip(axes, views.items(), strict=True):
    shown = axis.imshow(table[:-3, 0].reshape(7, 11), cmap="RdBu_r", vmin=-5, vmax=5)
    axis.set(title=title, xticks=[0, 5, 10], yticks=[0, 3, 6])
    axis.set_xticklabels([-5, 0, 5])
    axis.set_yticklabels([-3, 0, 3])
    axis.set_xlabel("Δcolumn")
axes[0].set_ylabel("Δrow")
figure.colorbar(shown, ax=axes)
plt.show()
assert np.array_equal(views["minibeit"], column_difference)
assert not np.allclose(views["transformers"], column_difference)

# %% [markdown]
# What does it cost here? A digits checkpoint made for images of 32 x 48 (grid 4 x 6), read both ways.
# `compat="transformers"` reproduces the results of transformers when that is what you need.

# %%
wide_config, wide_arrays = resize_arrays(model.arrays, config, (32, 48), "timm")
sheet = wider(32, 48)
as_defined = read_rightly(wide_arrays, wide_config, sheet)
as_transformers = read_rightly(wide_arrays, wide_config.replace(compat="transformers"), sheet)
print(f"right of {len(labels)}: {as_defined} as defined, {as_transformers} with compat='transformers'")
assert as_defined > as_transformers

on_square = BeitForImageClassification(config.replace(compat="transformers"), arrays=model.arrays, backend="numpy")
assert np.array_equal(on_square(three).logits, model(three).logits)  # on a square grid there is no difference

# %% [markdown]
# Next: [03, one encoder, three heads](03_one_encoder_three_heads.ipynb).

# %% [markdown]
# ## Exercises
#
# 1. How many rows has the table of a model for 384 x 384 pixels with patches of 16 x 16? Find the number by the formula
#    and from the index.
# 2. Build a network that sees the world in a mirror: change tables and weights of the digits network so that its
#    logits for a mirrored image are those of the original for the image itself.
#
# The next two cells have solutions.

# %% [solution]
# 1. 24 x 24 patches. The index names each row at least once, and the last one is [CLS] to itself.
rows = (2 * 24 - 1) ** 2 + 3
print(f"{rows} rows: {rows - 3} offsets and 3 for [CLS]")
assert rows == table_rows((24, 24)) == ops.relative_position_index((24, 24)).max() + 1

# %% [solution]
# 2. Positions are in the tables alone, so the offsets to the right and to the left change places; and within a patch,
# the columns of the patch embedding do.
mirrored = {}
for name, array in model.arrays.items():
    if name.endswith("bias_table"):
        offsets = array[:-3].reshape(2 * grid[0] - 1, 2 * grid[1] - 1, H)[:, ::-1].reshape(-1, H)
        mirrored[name] = np.concatenate([offsets, array[-3:]])
    elif name.endswith("patch.weight"):
        mirrored[name] = np.ascontiguousarray(array[..., ::-1])  # (D, C, 8, 8)
    else:
        mirrored[name] = array
in_the_mirror = BeitForImageClassification(config, arrays=mirrored, backend="numpy")
flipped = np.ascontiguousarray(pixels[..., ::-1])
difference = np.abs(in_the_mirror(flipped).logits - model(pixels).logits).max()
right_flipped = int((model(flipped).logits.argmax(1) == labels).sum())
print(f"largest difference of a logit: {difference:.0e}; the original reads {right_flipped} of 360 mirrored digits")
assert difference < 1e-4
assert right_flipped < 300
