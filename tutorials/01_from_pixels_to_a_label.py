# %% [markdown]
# # 01 From pixels to a label
#
# An image goes in, a word comes out. This tutorial follows one image through BEiT, step by step. One block of the
# network is computed by hand, in NumPy, and compared with what minibeit computed. You need to know what a matrix
# product is; no knowledge of transformers is assumed.
#
# The network is the one that comes with minibeit: a small one, trained to read handwritten digits.
#
# The letters are those used throughout the package: **B** images in a batch, **C** colour channels, **P** patches of an
# image, **N** = 1 + P tokens, **D** elements of a token (the width), **H** heads, **d** = D / H elements per head,
# **F** width inside the MLP, **L** blocks, **K** classes. A note such as `(B, N, D)` after a line is the shape of its
# result.

# %%
import math

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from skimage import data

from minibeit import BeitConfig, BeitForImageClassification, BeitImageProcessor, Trace
from minibeit.catalogue import weights_folder

digits = weights_folder() / "digits"
plt.rcParams.update({"figure.dpi": 80, "image.cmap": "gray", "font.size": 9})

# %% [markdown]
# ## 1. The image processor: from any image to an array of fixed shape
#
# The network expects images of one size, so an image is first resized. Then each of its bytes, 0 to 255, is mapped to
# a number between -1 and 1: divide by 255, subtract 0.5, divide by 0.5. The file `preprocessor_config.json` of a
# checkpoint holds these settings. Most published BEiTs take 224 x 224 pixels, ours takes 32 x 32.
#
# The code: [`minibeit/image_processor.py`](../minibeit/image_processor.py).

# %%
photo = data.chelsea()  # the cat of scikit-image, (300, 451, 3) bytes
digit = np.asarray(Image.open(digits / "images" / "digit_3_0045.png"))  # a 3, written by hand: 8 x 8 bytes

photo_pixels = BeitImageProcessor(size=224)(photo)["pixel_values"]  # (1, C, 224, 224)
pixels = BeitImageProcessor.from_pretrained(digits)(digit)["pixel_values"]  # (1, C, 32, 32)
print("photo", photo.shape, photo.dtype, "->", photo_pixels.shape, photo_pixels.dtype)
print("digit", digit.shape, digit.dtype, "  ->", pixels.shape, pixels.dtype)
print(f"the digit's values now lie between {pixels.min():.2f} and {pixels.max():.2f}")


def picture(pixel_values):
    """pixel_values (1, C, height, width) as an image (height, width, C) between 0 and 1."""
    return (pixel_values[0].transpose(1, 2, 0) + 1) / 2


figure, axes = plt.subplots(1, 4, figsize=(9, 2.6), width_ratios=[1.5, 1, 1, 1], layout="constrained")
for axis, image, title in (
    (axes[0], photo, "photo as it came"),
    (axes[1], picture(photo_pixels), "resized to 224 x 224"),
    (axes[2], digit, "digit as it came"),
    (axes[3], picture(pixels), "resized to 32 x 32"),
):
    axis.imshow(image)
    axis.set(title=title, xticks=[], yticks=[])
plt.show()

# %% [markdown]
# The cat got slimmer: BEiT's preprocessing does not preserve the aspect ratio. And the grayscale digit now has three
# identical channels, because the network expects three. (In this data ink is white and paper is black.)
#
# ## 2. Patches
#
# BEiT does not look at single pixels. It cuts the image into squares, the patches; a patch is to BEiT what a word is to
# a language model. A photo of 224 x 224 pixels gives a grid of 14 x 14 patches of 16 x 16 pixels; our digit gives a
# grid of 4 x 4 patches of 8 x 8. Patches are numbered row by row.

# %%


def cut(pixel_values, size):
    """(1, C, height, width) -> (P, C * size * size): the patches row by row, each flattened."""
    _, C, height, width = pixel_values.shape
    patches = []
    for top in range(0, height, size):
        for left in range(0, width, size):
            patches.append(pixel_values[0, :, top : top + size, left : left + size].reshape(-1))
    return np.array(patches)


def draw_patches(figure, pixel_values, size, numbers):
    patches = cut(pixel_values, size)
    side = math.isqrt(len(patches))
    axes = figure.subplots(side, side, gridspec_kw={"wspace": 0.12, "hspace": 0.4 if numbers else 0.12})
    for p, axis in enumerate(axes.flat):
        patch = patches[p].reshape(3, size, size).transpose(1, 2, 0)
        axis.imshow((patch + 1) / 2, vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
        if numbers:
            axis.set_title(f"{p}", fontsize=8, pad=2)


left, right = plt.figure(figsize=(9, 4.4)).subfigures(1, 2, width_ratios=[1, 0.85])
draw_patches(left, photo_pixels, 16, numbers=False)
draw_patches(right, pixels, 8, numbers=True)
left.suptitle(f"{len(cut(photo_pixels, 16))} patches of 16 x 16 pixels", y=0.96)
right.suptitle(f"{len(cut(pixels, 8))} patches of 8 x 8 pixels", y=0.98)
plt.show()

# %% [markdown]
# ## 3. Tokens
#
# Each flattened patch, C * 8 * 8 = 192 numbers here, is multiplied by one learned matrix and becomes D = 64 numbers: a
# **token**. The same matrix is used for all patches, so a token does not say where its patch was. (Position comes in
# later, through the bias of the attention.) In front of the P = 16 patch tokens goes one more, `[CLS]`, which belongs
# to no patch: it is learned, and the same for every image. So there are N = 17 tokens, and they are all the network
# sees from here on.
#
# The code: [`minibeit/model/embeddings.py`](../minibeit/model/embeddings.py).
#
# We load the network in float64 so that two ways of computing the same number agree to about 15 digits, and we
# choose the NumPy backend, whose code is [`minibeit/ops/reference`](../minibeit/ops/reference/transformer.py).
# `Trace` records every array of a forward pass under its name.

# %%
model = BeitForImageClassification.from_pretrained(digits, dtype="float64", backend="numpy")
config = model.config
L, D, H, F = config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.intermediate_size
d = D // H
print(model)

trace = Trace()
output = model(pixels, trace=trace)
for name in list(trace)[:14]:
    print(f"{name:32} {trace[name].shape}")
print(f"... {len(trace)} arrays in all")

# %%
weights = model.params  # the learned numbers, under the names that param_shapes lists
embeddings = weights.beit.embeddings

matrix = embeddings.patch.weight.reshape(D, -1)  # (D, 192)
tokens = cut(pixels.astype(np.float64), 8) @ matrix.T + embeddings.patch.bias  # (P, D)
x = np.concatenate([embeddings.cls_token[0], tokens])  # (N, D)

print("tokens by hand", x.shape)
print("largest difference from minibeit:", np.abs(x - trace["embeddings"][0]).max())
assert np.abs(x - trace["embeddings"][0]).max() < 1e-12

figure, axis = plt.subplots(figsize=(9, 2.8), layout="constrained")
shown = axis.imshow(x, cmap="RdBu_r", vmin=-4, vmax=4, aspect="auto")
axis.set(xlabel="the D = 64 numbers of a token", ylabel="token", title="all the network sees of the digit")
axis.set_yticks(range(0, 17, 4), ["[CLS]", "patch 3", "patch 7", "patch 11", "patch 15"])
figure.colorbar(shown)
plt.show()

# %% [markdown]
# A row depends on what its patch shows, and on nothing else. This N x D array now passes through L = 4 **blocks** of
# the same structure. Each has two halves, and each half adds something to the array:
#
# $$x \leftarrow x + \lambda_1 \odot \text{attention}(\text{norm}_1(x)), \qquad
# x \leftarrow x + \lambda_2 \odot \text{mlp}(\text{norm}_2(x))$$
#
# In the first half tokens look at each other; in the second each token is processed on its own. We do the first block
# by hand. The code: [`minibeit/model/block.py`](../minibeit/model/block.py) and
# [`attention.py`](../minibeit/model/attention.py).
#
# ## 4. One block by hand
#
# **Layer norm.** Every token is shifted and scaled so that its D elements have mean 0 and variance 1; then each of the
# D columns gets a learned scale and shift. This keeps magnitudes in bounds, whatever came before.

# %%
block = weights.beit.encoder[0]


def layer_norm(x, norm):
    """(..., D) -> (..., D)"""
    mean = x.mean(axis=-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + config.layer_norm_eps) * norm.weight + norm.bias


def compare(name, by_hand):
    """Prints how far an array is from minibeit's, relative to its largest element."""
    theirs = trace[name][0]
    assert by_hand.shape == theirs.shape, (by_hand.shape, theirs.shape)
    difference = np.abs(by_hand - theirs).max() / np.abs(theirs).max()
    print(f"{name:32} {by_hand.shape!s:14} differs by {difference:.0e}")
    assert difference < 1e-13


y = layer_norm(x, block.norm1)  # (N, D)
compare("encoder.0.norm1", y)

# %% [markdown]
# **Queries, keys, values.** Three more learned matrices turn the one array into three. Think of a *query* as what a
# token asks for, of a *key* as what a token offers to those who ask, and of a *value* as what it hands over. The D = 64
# columns of each are then split into H = 4 **heads** of d = 16 columns, which work independently. Only the keys have no
# bias: it would add the same number to all scores of a query, which does not change the softmax below.

# %%
attention = block.attention


def heads(table):
    """(N, D) -> (H, N, d)"""
    return table.reshape(-1, H, d).transpose(1, 0, 2)


q = heads(y @ attention.query.weight.T + attention.query.bias)  # (H, N, d)
k = heads(y @ attention.key.weight.T)
v = heads(y @ attention.value.weight.T + attention.value.bias)
compare("encoder.0.attention.query", q)
compare("encoder.0.attention.key", k)
compare("encoder.0.attention.value", v)

# %% [markdown]
# **Scores.** How well does the query of token a match the key of token b? Their dot product says so, divided by the
# square root of d so that its magnitude does not grow with d. To this is added the **relative position bias**: a
# learned number for each head and each offset between two patches ("two to the right, one down"). It is the only place
# where the network learns where a patch is, and the subject of tutorial 02. `index[a, b]` says which row of the learned
# table belongs to the pair.

# %%
index = model.ops.relative_position_index(config.grid)  # (N, N) row numbers, from the grid alone
bias = block.bias_table[index].transpose(2, 0, 1)  # (R, H) -> (N, N, H) -> (H, N, N)
print("table", block.bias_table.shape, " index", index.shape, " bias", bias.shape)

scores = q @ k.transpose(0, 2, 1) / math.sqrt(d) + bias  # (H, N, N)

# %% [markdown]
# **Softmax** turns each row of scores into shares (probabilities) that are positive and add up to 1:
# $e^{s_b} / \sum_c e^{s_c}$. These N x N shares are the **attention** of a head: row a says how much token a takes from
# each token b.

# %%
shares = np.exp(scores - scores.max(axis=-1, keepdims=True))  # minus the largest, so that exp cannot overflow
shares = shares / shares.sum(axis=-1, keepdims=True)  # (H, N, N)
compare("encoder.0.attention.probs", shares)

figure, axes = plt.subplots(1, H, figsize=(9, 2.7), layout="constrained")
for h, axis in enumerate(axes):
    shown = axis.imshow(shares[h], cmap="magma", vmin=0, vmax=1)
    axis.set(title=f"head {h}", xlabel="looked at: token b", xticks=range(0, 17, 4), yticks=range(0, 17, 4))
axes[0].set_ylabel("looking: token a")
figure.colorbar(shown, ax=axes, shrink=0.8)
plt.show()

# %% [markdown]
# **Context.** Each token takes the mean of all values, weighted by its shares. The heads are concatenated again, one
# more matrix (the *output* projection) mixes them, a learned factor per column, the **layer scale** $\lambda_1$, says
# how much they count, and the result is *added* to what was there before.

# %%
context = (shares @ v).transpose(1, 0, 2).reshape(-1, D)  # (H, N, d) -> (N, D)
compare("encoder.0.attention.context", context)

projected = context @ attention.output.weight.T + attention.output.bias  # (N, D)
after_attention = x + block.lambda_1 * projected  # (N, D)
compare("encoder.0.attention.residual", after_attention)

# %% [markdown]
# **MLP.** The second half: a norm again, a matrix from D = 64 to F = 256 columns, a nonlinear function, a matrix back
# to
# 64. The function is the GELU, $\tfrac{z}{2}(1 + \text{erf}(z / \sqrt 2))$: large negative numbers become 0, large
# positive ones pass unchanged. Without a nonlinearity between them, the two matrices would collapse into one.

# %%
erf = np.vectorize(math.erf)


def gelu(z):
    return 0.5 * z * (1 + erf(z / math.sqrt(2)))


hidden = gelu(layer_norm(after_attention, block.norm2) @ block.fc1.weight.T + block.fc1.bias)  # (N, F)
compare("encoder.0.mlp.hidden", hidden)
after_block = after_attention + block.lambda_2 * (hidden @ block.fc2.weight.T + block.fc2.bias)  # (N, D)
compare("encoder.0.output", after_block)

figure, axis = plt.subplots(figsize=(4, 2), layout="constrained")
z = np.linspace(-4, 4, 200)
axis.plot(z, gelu(z))
axis.set(title="GELU", xlabel="z")
axis.grid(alpha=0.3)
plt.show()

# %% [markdown]
# That was one whole block, and every array in it agrees with minibeit's. The other three do the same with weights of
# their own. A block's output has the shape of its input, so blocks can be stacked: 12 of them in BEiT-base, 24 in
# large.
#
# ## 5. Pooling and label
#
# After the last block the P patch tokens are averaged, without `[CLS]`, and the mean is normalised once more. The
# result is the **pooled** vector: D numbers for the whole image. A last matrix turns it into K = 10 numbers, one per
# class: the **logits**. The largest one names the class; softmax turns them into shares.
#
# The code: `pool` in [`minibeit/model/encoder.py`](../minibeit/model/encoder.py), and
# [`minibeit/tasks/image_classification.py`](../minibeit/tasks/image_classification.py).

# %%
last = trace[f"encoder.{L - 1}.output"][0]  # (N, D)
pooled = layer_norm(last[1:].mean(axis=0), weights.beit.pooler)  # (D,)
logits = pooled @ weights.classifier.weight.T + weights.classifier.bias  # (K,)
compare("pooler", pooled)
compare("logits", logits)

share = np.exp(logits - logits.max())
share = share / share.sum()
label = config.id2label[int(logits.argmax())]
print(f"the network reads a {label}, with a share of {share.max():.1%}")
assert label == "3"

# %% [markdown]
# ## 6. All of it in three lines, and what a label is worth
#
# This is how to use it. The ten included digits were held out when the network was trained.

# %%
files = sorted((digits / "images").glob("*.png"))
batch = BeitImageProcessor.from_pretrained(digits)(files)["pixel_values"]  # (B, C, 32, 32)
logits = model(batch).logits  # (B, K)
found = [config.id2label[int(k)] for k in logits.argmax(axis=1)]

cat = BeitImageProcessor.from_pretrained(digits)(photo)["pixel_values"]
cat_logits = model(cat).logits[0]
cat_label = config.id2label[int(cat_logits.argmax())]

figure, axes = plt.subplots(1, 11, figsize=(9, 1.4), layout="constrained")
for axis, image, text in zip(axes, [*batch, cat[0]], [*found, cat_label], strict=True):
    axis.imshow(picture(image[None]))
    axis.set(title=text, xticks=[], yticks=[])
plt.show()
print("read:", " ".join(found), "  and the cat:", cat_label)
assert found == [str(k) for k in range(10)]

# %% [markdown]
# The cat is read as a digit too. The shares add up to 1 over the ten classes that the network knows, and it knows no
# others: a label says which class fits *best*, not that it fits.
#
# ## 7. How large the real ones are
#
# Nothing above depends on the size. BEiT-base has the same parts in larger sizes, which are the defaults of
# `BeitConfig`.

# %%
ours, base = config, BeitConfig(use_relative_position_bias=True, id2label={k: str(k) for k in range(1000)})
for name, c in (("digits", ours), ("BEiT-base", base)):
    P = c.grid[0] * c.grid[1]
    print(
        f"{name:10} pixels {c.image_size:4}  P {P:4}  N {P + 1:4}  D {c.hidden_size:4}  H {c.num_attention_heads:3}  "
        f"d {c.hidden_size // c.num_attention_heads:3}  F {c.intermediate_size:5}  L {c.num_hidden_layers:3}  "
        f"K {c.num_labels:5}"
    )
assert base.grid == (14, 14) and cut(photo_pixels, 16).shape == (196, 768)

# %% [markdown]
# Next: [02, the relative position bias](02_relative_position_bias.ipynb).

# %% [markdown]
# ## Exercises
#
# 1. The keys have no bias (section 4). Add one to the keys of the first block, any you like, and show that the shares
#    stay as they are.
# 2. Which patches does the network look at to read a 3? Replace one patch after the other by bare paper and draw how
#    far the logit of the 3 falls.
#
# The next two cells have solutions.

# %% [solution]
# 1. The bias adds the same number q . b to all scores of a query, and softmax does not see what all scores share.
key_bias = np.random.default_rng(0).standard_normal((H, 1, d))
moved = q @ (k + key_bias).transpose(0, 2, 1) / math.sqrt(d) + bias  # (H, N, N)
moved_shares = np.exp(moved - moved.max(axis=-1, keepdims=True))
moved_shares = moved_shares / moved_shares.sum(axis=-1, keepdims=True)
print("largest change of a score:", np.abs(moved - scores).max(), " of a share:", np.abs(moved_shares - shares).max())
assert np.abs(moved - scores).max() > 0.1
assert np.abs(moved_shares - shares).max() < 1e-12

# %% [solution]
# 2. Sixteen images, each with a hole; minibeit takes them as one batch.
holes = np.repeat(pixels, 16, axis=0)  # (16, C, 32, 32)
for p in range(16):
    top, left = p // 4 * 8, p % 4 * 8
    holes[p, :, top : top + 8, left : left + 8] = -1  # paper
fall = model(pixels).logits[0, 3] - model(holes).logits[:, 3]  # (16,)
figure, axes = plt.subplots(1, 2, figsize=(5, 2.4), layout="constrained")
axes[0].imshow(picture(pixels))
shown = axes[1].imshow(fall.reshape(4, 4), cmap="RdBu_r", vmin=-np.abs(fall).max(), vmax=np.abs(fall).max())
axes[1].set_title("fall of the logit", fontsize=9)
figure.colorbar(shown, ax=axes[1])
for axis in axes:
    axis.set(xticks=[], yticks=[])
plt.show()
still = [config.id2label[int(k)] for k in model(holes).logits.argmax(axis=1)]
print(f"it falls most, by {fall.max():.2f}, without patch {fall.argmax()}; read with a hole:", " ".join(still))
assert fall.max() > 0.5
assert np.abs(fall[[0, 3, 12]]).max() < 0.05  # corners without ink
assert set(still) == {"3"}  # no single patch decides
