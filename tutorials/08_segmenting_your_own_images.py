# %% [markdown]
# # 08 Segmenting your own images
#
# You have photographs, and for each a *mask*: an image of the same size whose numbers say what every pixel shows. Here
# we go from such a folder to a model that draws the masks itself, is measured on images that it has never seen, and is
# a folder that `minibeit segment` and transformers load.
#
# Photographs with exact masks are rare, so we make them of photographs that scikit-image brings: the night sky, stained
# tissue under a microscope and a brick wall lie side by side, and on them lie coins, cut out of a photograph of coins.
# Colour tells sky and tissue; coins and bricks are both gray, so there the model has to see texture and shape.
# [Tutorial 03](03_one_encoder_three_heads.ipynb) shows what UPerNet is.

# %%
import json
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from scipy import ndimage
from skimage import data, filters, measure

from minibeit import BeitForSemanticSegmentation, BeitImageProcessor
from minibeit.cli import main as minibeit
from minibeit.drawing import overlay
from minibeit.metrics import areas, class_iou, confusion_matrix, segmentation_scores
from minibeit.train.augment_maps import augmented
from minibeit.train.label_maps import read_pairs
from minibeit.train.loop import Trainer
from minibeit.train.segmentation import Segmentation, from_scratch, processor_for
from minibeit.train.segmentation_recipes import SEGMENTATION_RECIPES

plt.rcParams.update({"figure.dpi": 80, "font.size": 9})
NAMES = ("sky", "tissue", "brick", "coin")
COLOURS = [(40, 60, 200), (240, 150, 20), (200, 40, 120), (60, 210, 120), (0, 0, 0)]
SIZE, TRAIN, HELD_OUT = 64, 60, 20
os.chdir(tempfile.mkdtemp())

# %% [markdown]
# ## 1. A folder of photographs and masks
#
# The coins are found by a threshold; those that are round enough are taken. What we train with and what we judge by
# must not be the same piece of wall, so the left halves of the photographs and the first coins are for training, and
# the rest is for judging.

# %%
textures = [data.hubble_deep_field(), data.immunohistochemistry(), np.dstack([data.brick()] * 3)]
photo = data.coins()
smooth = filters.gaussian(photo, 1.5)
found = measure.label(ndimage.binary_fill_holes(smooth > filters.threshold_otsu(smooth)))
coins = []
for region in measure.regionprops(found):
    if 800 < region.area < 4000 and region.solidity > 0.93:
        alpha = (255 * region.image).astype(np.uint8)
        coins.append(Image.fromarray(np.dstack([photo[region.slice], alpha]), "LA"))
print(len(coins), "coins")


def scene(rng, held_out):
    """(photograph, mask), both (64, 64): two or three grounds, one to three coins."""
    points, kinds = rng.uniform(0, SIZE, (3, 2)), rng.permutation(3)[: rng.integers(2, 4)]
    y, x = np.mgrid[:SIZE, :SIZE]
    nearest = np.argmin([(y - py) ** 2 + (x - px) ** 2 for py, px in points[: len(kinds)]], axis=0)
    mask = kinds[nearest].astype(np.uint8)
    image = np.zeros((SIZE, SIZE, 3))
    for kind in kinds:
        half = np.array_split(textures[kind], 2, axis=1)[held_out]
        top, left = (rng.integers(0, side - SIZE) for side in half.shape[:2])
        patch = half[top : top + SIZE, left : left + SIZE] * rng.uniform(0.7, 1.3)
        image = np.where((mask == kind)[..., None], patch[:, :: rng.choice([-1, 1])], image)
    picture, mask = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)), Image.fromarray(mask)
    choice = coins[-5:] if held_out else coins[:-5]
    for _ in range(rng.integers(1, 4)):
        coin = choice[rng.integers(len(choice))].rotate(rng.uniform(0, 360), Image.Resampling.BILINEAR)
        side = int(rng.integers(20, 32))
        coin = coin.resize((side, side * coin.height // coin.width), Image.Resampling.BILINEAR)
        place = tuple(int(v) for v in rng.integers(0, SIZE - 20, 2))
        cut = coin.getchannel("A").point(lambda a: 255 * (a > 127))
        picture.paste(coin.getchannel("L").convert("RGB"), place, cut)
        mask.paste(3, place, cut)
    return picture, mask


for part, count, held_out in (("train", TRAIN, 0), ("val", HELD_OUT, 1)):
    for kind in ("images", "masks"):
        Path("scenes", part, kind).mkdir(parents=True)
    for i in range(count):
        picture, mask = scene(np.random.default_rng([held_out, i]), held_out)
        picture.save(f"scenes/{part}/images/{i:02}.png")
        mask.save(f"scenes/{part}/masks/{i:02}.png")
Path("names.txt").write_text("\n".join(NAMES))


def show(rows, titles=()):
    """Rows of images."""
    figure, axes = plt.subplots(len(rows), len(rows[0]), figsize=(1.25 * len(rows[0]), 1.3 * len(rows)), squeeze=False)
    for line, row in zip(axes, rows):
        for axis, image in zip(line, row):
            axis.imshow(image, cmap="gray", vmin=0, vmax=255)
            axis.axis("off")
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=8)
    figure.tight_layout(pad=0.3)
    plt.show()


def tinted(image, labels):
    """A photograph under the colours of its classes; ignored pixels are black."""
    gray = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    return np.asarray(overlay(gray, np.where(labels == 255, 4, labels), COLOURS))


some = [Image.open(f"scenes/train/images/{i:02}.png") for i in range(8)]
their = [np.asarray(Image.open(f"scenes/train/masks/{i:02}.png")) for i in range(8)]
show([some, [tinted(image, labels) for image, labels in zip(some, their)]])

# %% [markdown]
# ## 2. What training sees
#
# `read_pairs` looks at every file once: it would name a mask of another size, one in JPEG, or a number that is no
# class. Then each image is changed anew every time it is seen, as the authors of BEiT did it: another size, a crop that
# no class fills alone, mirrored or not, darker or paler. The mask follows. What lies outside of the image is 255, which
# the loss leaves out (black below).

# %%
pairs = read_pairs("scenes", names=NAMES)
recipe = SEGMENTATION_RECIPES["tiny"].changed(epochs=15)
print(f"{len(pairs.train)} to learn from, {len(pairs.held_out)} held out; {', '.join(pairs.names)}")
rows = [[], []]
for seed in range(8):
    image = Image.open(pairs.train[0].path).convert("RGB")
    pixels, labels = augmented(image, pairs.read_map(pairs.train[0].map), (64, 64), recipe, np.random.default_rng(seed))
    outside = [(0, 64 - pixels.shape[0]), (0, 64 - pixels.shape[1])]
    pixels, labels = np.pad(pixels, [*outside, (0, 0)]), np.pad(labels, outside, constant_values=255)
    rows[0].append(pixels)
    rows[1].append(tinted(pixels, labels))
show(rows)

# %% [markdown]
# ## 3. Training
#
# A model of 64 x 64 pixels and random weights: five blocks of width 48 and UPerNet on top. It is small enough to learn
# in a minute or two. With a pre-trained BEiT one starts from its weights instead, by `from_checkpoint(folder, NAMES)`.
# The same on the command line:
#
# ```
# minibeit finetune scenes --task segmentation --labels names.txt --from-scratch tiny --recipe tiny --epochs 15 -o model
# ```

# %%
model = from_scratch("tiny", pairs.names, drop_path=recipe.drop_path)
folder = Path("model")
folder.mkdir()
processor = processor_for(model.config, None, recipe, reduce=False)
objective = Segmentation(pairs, processor, recipe, model.config)
history = Trainer(model, objective, recipe, folder).run()
print(f"{model.num_parameters():,} numbers, {history[-1]['step']} steps")

epochs = [row["epoch"] for row in history]
figure, axes = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
for name in ("train_loss", "held_out_loss"):
    axes[0].plot(epochs, [row[name] for row in history], label=name.replace("_", " "))
for name in ("held_out_mean_iou", "held_out_mean_accuracy", "held_out_pixel_accuracy"):
    axes[1].plot(epochs, [row[name] for row in history], label=name.replace("_", " "))
for axis in axes:
    axis.set_xlabel("epoch")
    axis.legend(fontsize=8)
plt.show()
best = next(row for row in reversed(history) if row["best"])
print(f"best epoch {best['epoch']}: mean IoU {best['held_out_mean_iou']:.3f}")

# %% [markdown]
# The training loss counts both of the model's heads, the second at 0.4, and images with changed colours, so it lies
# above the held-out one. The held-out curves jump: in training each batch norm uses the mean and variance of its batch,
# but when the model is judged, *running* averages of them, which wander with the batches of four.
#
# ## 4. How good is it?
#
# Now as a user would do it: the folder is loaded, each image is segmented at its own size, and all pixels of all
# held-out images are counted in one matrix. **IoU** of a class is the pixels that are it and are said to be it, divided
# by those that are it or are said to be it. Since the best epoch was chosen by these images, the number is a little too
# good: keep a third part aside if you need an honest one.

# %%
loaded = BeitForSemanticSegmentation.from_pretrained(folder)
processor = BeitImageProcessor.from_pretrained(folder)
confusion, said, shares = np.zeros((4, 4), np.int64), [], []
for pair in pairs.held_out:
    truth = pairs.read_map(pair.map)
    output = loaded(processor(pair.path).pixel_values)
    (labels,) = processor.post_process_semantic_segmentation(output, target_sizes=[truth.shape])
    confusion += confusion_matrix(truth, labels, 4, ignore_index=255)
    said.append(labels)
    shares.append((labels == truth).mean())
scores = segmentation_scores(areas(confusion))
for name, value in (*zip(NAMES, class_iou(areas(confusion))), *scores.items()):
    print(f"{name:16} {value:.3f}")
largest = confusion.sum(1).argmax()
print(f"always {NAMES[largest]}: mean IoU {confusion.sum(1)[largest] / confusion.sum() / 4:.3f}")

order = np.argsort(shares)[::-1]
chosen = [*order[:4], *order[-4:]]
images = [Image.open(pairs.held_out[i].path) for i in chosen]
truths = [pairs.read_map(pairs.held_out[i].map) for i in chosen]
show(
    [
        images,
        [tinted(image, truth) for image, truth in zip(images, truths)],
        [tinted(image, said[i]) for image, i in zip(images, chosen)],
    ],
    [f"{100 * shares[i]:.0f}%" for i in chosen],
)

# %% [markdown]
# The best four and the worst four: photograph, truth, and what the model says. Borders are blunt: the model sees
# patches of 8 x 8 pixels, and its finest map has 32 x 32 places for 64 x 64 pixels.
#
# ## 5. The folder
#
# is one as on the Hub. `minibeit segment` draws with it, and transformers loads it with
# `AutoModelForSemanticSegmentation.from_pretrained(folder)`; a test holds the logits of the two against each other.
# `minibeit evaluate` counts as we did, and adds intervals.

# %%
words = "segment scenes/val/images/00.png --model model --output drawn --overlay --quiet"
code = minibeit(words.split())
config = json.loads((folder / "config.json").read_text())
print("files:", ", ".join(sorted(path.name for path in folder.iterdir())))
print("classes:", config["id2label"])
show([[Image.open(f"drawn/00_{kind}.png").convert("RGB") for kind in ("labels", "overlay")]])

# %%
words = "evaluate scenes/val/images --maps scenes/val/masks --model model --json numbers.json --quiet"
code += minibeit(words.split())

# %%
assert code == 0
assert abs(json.loads(Path("numbers.json").read_text())["figures"]["mean_iou"]["value"] - scores["mean_iou"]) < 1e-9
assert scores["mean_iou"] > 0.6
assert scores["mean_iou"] > 3 * confusion.sum(1)[largest] / confusion.sum() / 4
assert abs(best["held_out_mean_iou"] - scores["mean_iou"]) < 0.1
assert history[-1]["train_loss"] < 0.6 * history[0]["train_loss"]

# %% [markdown]
# ## 6. With a pre-trained model
#
# ```
# minibeit finetune photos --task segmentation --labels names.txt \
#     --model microsoft/beit-base-patch16-224-pt22k-ft22k --crop-size 512 -o photos-beit
# ```
#
# Then the encoder knows textures and things already, so that some tens of images go a long way, and a map of 128 x 128
# places for 512 x 512 pixels. [docs/segmentation.md](../docs/segmentation.md) has the layouts of data, the recipes and
# the options.

# %% [markdown]
# ## Exercises
#
# 1. Where are the errors? Count the wrong pixels that lie within 3 pixels of a border between classes of the truth, and
#    compare with the share of such pixels.
# 2. Does it help to look twice? Measure the model once more with the mirror image of each scene averaged in: `--flip`
#    of `minibeit evaluate`.
#
# The next two cells have solutions.

# %% [solution]
# 1. A border is where the largest and the smallest class of a neighbourhood differ.
near, wrong = [], []
for pair, labels in zip(pairs.held_out, said):
    truth = pairs.read_map(pair.map)
    near.append(ndimage.maximum_filter(truth, 7) != ndimage.minimum_filter(truth, 7))
    wrong.append(labels != truth)
near, wrong = np.stack(near), np.stack(wrong)
print(f"{near.mean():.0%} of the pixels lie near a border, and {near[wrong].mean():.0%} of the errors")
print(f"wrong near a border: {wrong[near].mean():.0%}, elsewhere: {wrong[~near].mean():.0%}")
assert near[wrong].mean() > near.mean()

# %% [solution]
# 2. The probabilities of both views are averaged before the class is chosen. The interval says how far such a figure
# would move with other images: with twenty of them, a small difference says little.
words = "evaluate scenes/val/images --maps scenes/val/masks --model model --whole --flip --json twice.json --quiet"
assert minibeit(words.split()) == 0
once, twice = (json.loads(Path(f"{name}.json").read_text())["figures"]["mean_iou"] for name in ("numbers", "twice"))
print(f"mean IoU {once['value']:.3f} with one view, {twice['value']:.3f} with two")
print(f"95% interval of the latter: {twice['low']:.3f} to {twice['high']:.3f}")
assert abs(once["value"] - twice["value"]) < 0.2
