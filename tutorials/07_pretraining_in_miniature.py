# %% [markdown]
# # 07 Pre-training in miniature
#
# BEiT learns without labels in two steps: a *tokenizer* turns squares of an image into words of a visual vocabulary;
# then patches are masked, and the model learns to say which words were there. The paper does this with 14 million
# photographs and weeks of GPU time. Here the images are the 1,797 handwritten digits that scikit-learn brings, and each
# step takes a minute on two cores.
#
# With published weights the first two steps are one command each: `minibeit tokenize photo.jpg --tokenizer dall-e/` and
# `minibeit mask photo.jpg --model microsoft/beit-base-patch16-224-pt22k --tokenizer dall-e/ --output guessed.png`. See
# [the guide to pre-training](../docs/pretraining.md) for the commands that do what this page does.

# %%
import dataclasses
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from minibeit import BeitConfig, BeitForMaskedImageModeling, DalleTokenizer, DalleTokenizerConfig
from minibeit.masking import block_mask
from minibeit.train.discrete_vae import DiscreteVae, ImageReconstruction
from minibeit.train.examples import read_images
from minibeit.train.loop import Trainer
from minibeit.train.pretraining import MaskedModeling, initial_arrays, processor_for
from minibeit.train.recipes import PRETRAINING, PRETRAINING_PRESETS, TOKENIZERS

plt.rcParams.update({"figure.dpi": 80, "font.size": 9, "image.cmap": "gray"})
os.chdir(tempfile.mkdtemp())
SIDE = 16  # the digits are enlarged to 16x16 pixels: 4x4 patches of 4x4 pixels

digits = load_digits()
for i, (image, label) in enumerate(zip(digits.images, digits.target)):
    part = "val" if i % 5 == 0 else "train"  # a fifth is for judging
    file = Path("digits") / part / str(label) / f"{i:04}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((image * 255 / 16).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file)


def train(model, objective, recipe, folder):
    """The log of a training, which writes its best model into the folder."""
    Path(folder).mkdir()
    return Trainer(model, objective, recipe, folder).run()


# %% [markdown]
# ## 1. A vocabulary
#
# The tokenizer is a discrete variational autoencoder. Its encoder gives each square of 4x4 pixels a score for each of
# 64 words; its decoder draws the image from the words alone. Choosing a word is a step that no gradient passes, so in
# training the choice is softened: noise is added to the scores (so that words are *drawn*, not always the best taken),
# and a softmax with a falling temperature mixes the few best words. The colder it is, the closer is the mixture to a
# choice, and the noisier are the gradients. A second term of the loss pulls the encoder towards using all words alike.

# %%
# Labels are not looked at, and the images that we judge by are not learned from.
unlabelled = dataclasses.replace(read_images("digits/train"), held_out=read_images("digits/val").train)
config = DalleTokenizerConfig(
    num_groups=3, num_blocks_per_group=1, hidden_size=24, vocab_size=64, n_init=16, input_channels=1, image_size=SIDE
)
recipe = TOKENIZERS["tiny"].changed(epochs=12)
vae = DiscreteVae(DalleTokenizer(config))
log = train(vae, ImageReconstruction(unlabelled, recipe, config, (SIDE, SIDE)), recipe, "tokenizer")
tokenizer = DalleTokenizer.from_pretrained("tokenizer")
for row in log[::4] + log[-1:]:
    print(
        f"epoch {row['epoch']:2}: loss {row['held_out_loss']:6.3f}, {64 * row['held_out_tokens_used']:.0f} words in "
        f"use, as varied as {row['held_out_token_perplexity']:.1f} that are equally frequent"
    )

# %%
shown = [example.path for example in unlabelled.held_out[::36][:10]]
pixels = tokenizer.preprocess(shown)  # (10, 1, 16, 16)
words = tokenizer.encode(pixels)  # (10, 4, 4)
drawn = tokenizer.decode(words)  # (10, 1, 16, 16)
error = np.abs(drawn - np.stack([np.asarray(Image.open(path)) / 255 for path in shown])[:, None]).mean()
print(words[0])
print(f"mean difference of a pixel: {error:.3f}")

figure, axes = plt.subplots(2, 10, figsize=(9, 2.1), layout="constrained")
for column, path in enumerate(shown):
    axes[0, column].imshow(Image.open(path))
    axes[1, column].imshow(drawn[column, 0], vmin=0, vmax=1)
for axis, title in zip(axes[:, 0], ("image", "drawn from\n16 words")):
    axis.set_ylabel(title)
for axis in axes.flat:
    axis.set(xticks=[], yticks=[])

# %% [markdown]
# Each image of 256 pixels has become 16 words, and what comes back is blurred but mostly the same digit. That details
# are gone is no fault: the model that is to predict these words need not care about every pixel, which is the paper's
# reason for predicting words and not pixels.
#
# ## 2. Masked image modelling
#
# A small BEiT sees a digit with blocks of its patches masked. For each masked patch it says which word the tokenizer
# gave to that place. To do so it has to know what digits look like, and nobody has told it which digit is which.

# %%
settings = dict(image_size=SIDE, num_channels=1, vocab_size=64, intermediate_size=128, drop_path_rate=0.0)
beit = BeitConfig(**{**PRETRAINING_PRESETS["tiny"], **settings})
recipe = PRETRAINING["tiny"].changed(epochs=30)
model = BeitForMaskedImageModeling(beit, arrays=initial_arrays(beit, seed=0))
objective = MaskedModeling(unlabelled, processor_for(beit, recipe), recipe, beit, tokenizer)
log = train(model, objective, recipe, "pretrained")
everything = tokenizer.encode(tokenizer.preprocess([example.path for example in unlabelled.held_out]))
common = np.bincount(everything.ravel()).max() / everything.size
print(f"always the most frequent word: {common:.1%} right")

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.6), layout="constrained")
epochs = [row["epoch"] for row in log]
for part in ("train", "held_out"):
    left.plot(epochs, [row[f"{part}_loss"] for row in log], label=part.replace("_", " "))
    right.plot(epochs, [100 * row[f"{part}_accuracy"] for row in log], label=part.replace("_", " "))
left.set(xlabel="epoch", ylabel="loss of masked patches")
right.set(xlabel="epoch", ylabel="words predicted, %")
right.legend()
print(
    f"held out: loss {log[-1]['held_out_loss']:.3f}, {log[-1]['held_out_accuracy']:.1%} of the masked words predicted"
)

# %% [markdown]
# Since the tokenizer has a decoder, we can look at what the model believes: the words that it predicts for masked
# patches, among the image's own words everywhere else, drawn as an image.

# %%
model = BeitForMaskedImageModeling.from_pretrained("pretrained")
processor = processor_for(beit, recipe)
mask = np.stack([block_mask((4, 4), 6, np.random.default_rng(i)) for i in range(10)]).reshape(10, 16)
logits = model(processor(shown).pixel_values, bool_masked_pos=mask).logits  # (10, 16, 64)
guessed = np.where(mask, logits.argmax(-1), words.reshape(10, 16)).reshape(10, 4, 4)
believed = tokenizer.decode(guessed)

figure, axes = plt.subplots(3, 10, figsize=(9, 3.1), layout="constrained")
for column, path in enumerate(shown):
    image = np.asarray(Image.open(path)) / 255
    hidden = mask[column].reshape(4, 4).repeat(4, 0).repeat(4, 1)
    axes[0, column].imshow(image)
    axes[1, column].imshow(np.where(hidden, 0.5, image), vmin=0, vmax=1)
    axes[2, column].imshow(believed[column, 0], vmin=0, vmax=1)
for axis, title in zip(axes[:, 0], ("image", "what the\nmodel sees", "what it\nbelieves")):
    axis.set_ylabel(title)
for axis in axes.flat:
    axis.set(xticks=[], yticks=[])

# %% [markdown]
# The model is right more than twice as often as one that always says the most frequent word. That may look like
# little, but many words mean almost the same, and what is drawn from wrong ones is often close: the model has learned
# how strokes go on and where the background is. No label was needed for it.
#
# ## And then?
#
# `minibeit finetune DATA --model pretrained` goes on from here with labels. So short a pre-training brings little
# yet. With 20 epochs for the tokenizer and 60 for the model, which takes six minutes, and then five labels of each
# digit, 69, 68 and 72 % of the held-out digits were read right (three draws of the labels), and 63, 66 and 64 % from
# random weights. `weights/study_pretraining.py` asks the question properly, with 60,000 images of clothes, four
# numbers of labels and three seeds; its table is in [the guide](../docs/pretraining.md#what-it-brings).

# %%
assert log[-1]["held_out_accuracy"] > 1.3 * common
assert error < 0.12

# %% [markdown]
# ## Exercises
#
# 1. How does the share of predicted words fall when more patches are masked? Try 2, 6, 10 and 14 of the 16.
# 2. How many bits does the tokenizer need for an image? A word of 64 takes at most 6; take into account that some words
#    are more frequent than others. The image itself has 256 bytes.
#
# The next two cells have solutions.

# %% [solution]
# 1. The fewer words are visible, the less there is to go by; with two in sixteen left, little but the background.
paths = [example.path for example in unlabelled.held_out]
inputs, wanted = processor(paths).pixel_values, everything.reshape(-1, 16)
by_masked = {}
for count in (2, 6, 10, 14):
    rng = np.random.default_rng(count)
    masks = np.stack([rng.permutation(16) < count for _ in paths])  # (B, P), patches drawn one by one
    found = model(inputs, bool_masked_pos=masks).logits.argmax(-1)
    by_masked[count] = (found == wanted)[masks].mean()
    print(f"{count:2} of 16 masked: {by_masked[count]:.1%} of their words predicted")
assert by_masked[6] > by_masked[14]

# %% [solution]
# 2. The entropy of the words, if each is stored without looking at the others. Looking at them saves more: that is what
# the model has learned.
frequency = np.bincount(everything.ravel(), minlength=64) / everything.size
entropy = -(frequency[frequency > 0] * np.log2(frequency[frequency > 0])).sum()
print(f"{entropy:.2f} bits per word, {16 * entropy:.0f} per image: {128 / entropy:.0f} times less than its pixels")
assert 0 < entropy < 6
assert 16 * entropy < 96 < 256 * 8
