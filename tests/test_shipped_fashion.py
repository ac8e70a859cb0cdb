"""The included tokenizer of clothes and the model that was pre-trained on its tokens without labels."""

import numpy as np

from minibeit import BeitForMaskedImageModeling, BeitImageProcessor, DalleTokenizer
from minibeit.masking import block_mask
from minibeit.weights import path

IMAGES = sorted((path("fashion") / "images").glob("*.png"))  # test images: neither was trained on them
TOKENIZER = DalleTokenizer.from_pretrained(path("fashion-tokenizer"))


def test_the_tokenizer_draws_clothes_from_tokens():
    pixels = TOKENIZER.preprocess(IMAGES)
    tokens = TOKENIZER.encode(pixels)
    assert tokens.shape == (10, 7, 7)
    assert len(np.unique(tokens)) >= 30
    images = (pixels - 0.1) / 0.8  # preprocess maps 0 ... 1 to 0.1 ... 0.9
    assert np.abs(TOKENIZER.decode(tokens) - images).mean() < 0.06


def test_the_model_predicts_tokens_of_masked_patches():
    model = BeitForMaskedImageModeling.from_pretrained(path("fashion"))
    processor = BeitImageProcessor.from_pretrained(path("fashion"))
    tokens = TOKENIZER.encode(TOKENIZER.preprocess(IMAGES)).reshape(10, 49)
    mask = np.stack([block_mask((7, 7), 19, np.random.default_rng(i)).reshape(49) for i in range(10)])
    guessed = model(processor(IMAGES).pixel_values, bool_masked_pos=mask).logits.argmax(-1)
    right = (guessed == tokens)[mask].mean()
    most_frequent = np.bincount(tokens[mask]).max() / mask.sum()  # as good as a constant answer can be
    assert right > most_frequent + 0.05


def test_they_are_small():
    files = [*path("fashion").rglob("*"), *path("fashion-tokenizer").rglob("*")]
    assert sum(file.stat().st_size for file in files if file.is_file()) < 3e6
