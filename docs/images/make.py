"""Makes readme.webp: `python docs/images/make.py [MODEL]` (extras tutorials and verify; two minutes of one core).

Left: the model of tutorial 08, trained longer, segments a scene that it has not seen.  Right: `minibeit verify` on the
included model: minibeit, PyTorch, and a port whose third layer norm has the wrong epsilon.  MODEL is the folder `model`
that an earlier run has left behind; then nothing is trained.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
TUTORIALS = HERE.parents[1] / "tutorials"
EPOCHS = 30
SEED = 7  # of the scene; with 0 to 9, between 80 and 93 % of the pixels are right
HEIGHT, WIDTH = 176, 256  # of the scene; the model sees windows of 64 x 64
MOST_BYTES = 300_000


def trained(folder: str | None) -> tuple[dict[str, Any], str]:
    """The names of tutorial 08 up to its training, and the folder of the model, trained now unless it is there."""
    spec = importlib.util.spec_from_file_location("build_tutorials", TUTORIALS / "build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    names: dict[str, Any] = {"__name__": "tutorial"}
    for kind, text in build.cells(TUTORIALS / "08_segmenting_your_own_images.py"):
        if kind == "code" and not (folder and "Trainer(model" in text):
            exec(text.replace("epochs=15", f"epochs={EPOCHS}"), names)
        if "Trainer(model" in text:
            return names, folder or str(Path("model").resolve())
    raise RuntimeError("tutorial 08 no longer has a cell that trains")


def scene(names: dict[str, Any], seed: int) -> tuple[Image.Image, np.ndarray]:
    """A photograph (HEIGHT, WIDTH, 3) and its classes, of halves and coins that the training has not seen."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    points = np.stack([rng.uniform(0, HEIGHT, 7), rng.uniform(0, WIDTH, 7)], 1)
    kinds = np.array([0, 1, 2, 0, 1, 2, 1])
    labels = kinds[np.argmin([(y - py) ** 2 + (x - px) ** 2 for py, px in points], axis=0)].astype(np.uint8)
    image = np.zeros((HEIGHT, WIDTH, 3))
    for kind, texture in enumerate(names["textures"]):
        half = np.tile(np.array_split(texture, 2, axis=1)[1], (1, 2, 1))[:HEIGHT, :WIDTH]
        image = np.where((labels == kind)[..., None], half, image)
    photo, mask = Image.fromarray(image.astype(np.uint8)), Image.fromarray(labels)
    for i in range(16):
        coin = names["coins"][-5:][i % 5].rotate(rng.uniform(0, 360), Image.Resampling.BILINEAR)
        side = int(rng.integers(24, 34))
        coin = coin.resize((side, side * coin.height // coin.width), Image.Resampling.BILINEAR)
        place = (int((i % 6 + rng.uniform(0.1, 0.6)) * WIDTH / 6), int((i // 6 + rng.uniform(0.1, 0.6)) * HEIGHT / 3))
        cut = coin.getchannel("A").point(lambda a: 255 * (a > 127))
        photo.paste(coin.getchannel("L").convert("RGB"), place, cut)
        mask.paste(3, place, cut)
    return photo, np.asarray(mask)


def segmented(names: dict[str, Any], model: str, photo: Image.Image) -> np.ndarray:
    """What `minibeit segment --slide` makes of the photograph, in windows that overlap by three quarters."""
    photo.save("scene.png")
    words = "segment scene.png --output shown --slide --stride 16 --quiet --short-side"
    assert names["minibeit"]([*words.split(), str(HEIGHT), "--model", model]) == 0
    return np.asarray(Image.open("shown/scene_labels.png"))


def errors() -> tuple[list[str], dict[str, list[float]]]:
    """Names of arrays, and the total error of each by implementation."""
    from minibeit import BeitForImageClassification, BeitImageProcessor
    from minibeit.checkpoint.load import load_checkpoint
    from minibeit.ops import reference
    from minibeit.verify.lockstep import Job, check, model_source
    from minibeit.verify.torch_runner import torch_source
    from minibeit.weights import path

    config, weights = load_checkpoint(path("digits"), "image_classification")
    image = path("digits") / "images" / "digit_3_0045.png"
    pixels = BeitImageProcessor.from_pretrained(path("digits"))(image).pixel_values
    job = Job(config, "image_classification", weights, {"pixel_values": pixels})
    skipped = ("*.attention.probs",)
    ours = BeitForImageClassification(config, arrays=weights)
    good = check(job, model_source(job, ours, "minibeit", skipped), torch_source(job, skipped), leave_out=skipped)

    port, calls = BeitForImageClassification(config, arrays=weights, backend="numpy"), [0]

    def layer_norm(x: Any, norm: Any, eps: float) -> Any:
        calls[0] += 1
        return reference.layer_norm(x, norm, 1e-3 if calls[0] == 3 else eps)

    port.ops.layer_norm = layer_norm
    bad = check(job, model_source(job, port, "a port"), leave_out=skipped)
    assert good.ok and bad.guilty is not None and bad.guilty.name == "encoder.1.norm1"
    return [row.name for row in good.rows], {
        "a port with one mistake": [row.total.rms_rel for row in bad.rows],
        "PyTorch": [row.total_yard.shown for row in good.rows],
        "minibeit": [row.total.rms_rel for row in good.rows],
    }


def draw(photo: Image.Image, tinted: np.ndarray, legend: list[tuple[str, tuple]], found: tuple) -> None:
    """The figure, twice as fine as it is shown."""
    plt.rcParams.update({"font.size": 9.5, "font.family": "DejaVu Sans"})
    figure = plt.figure(figsize=(10.12, 2.6), dpi=200)
    for left, image, title in ((0.0, photo, "photographs"), (0.302, tinted, "minibeit segment --slide")):
        axis = figure.add_axes([left, 0.115, 0.296, 0.79])
        axis.imshow(image, interpolation="bicubic", aspect="auto")
        axis.set_title(title, fontsize=10, family="DejaVu Sans Mono" if "--" in title else None)
        axis.axis("off")
    for i, (name, colour) in enumerate(legend):
        figure.text(0.31 + 0.075 * i, 0.025, f"■ {name}", color=np.array(colour) / 255 * 0.7, weight="bold")
    axis = figure.add_axes([0.665, 0.115, 0.33, 0.79])
    names, series = found
    for (label, values), colour in zip(series.items(), ("#d1242f", "#d97706", "#1f6feb"), strict=True):
        values = np.array(values)
        axis.semilogy(np.where(values > 0, values, np.nan), ".-", ms=3, lw=1.2, color=colour, label=label)
    place = names.index("encoder.1.norm1")
    said, at = "encoder.1.norm1:\neps 0.001 instead of 1e-12", (place, series["a port with one mistake"][place])
    arrow = {"arrowstyle": "->", "color": "#d1242f"}
    axis.annotate(said, at, (0.42, 0.45), textcoords="axes fraction", fontsize=8, arrowprops=arrow)
    axis.set_title("minibeit verify", fontsize=10, family="DejaVu Sans Mono")
    axis.set_ylabel("distance from float64", fontsize=8)
    starts = [i for i, name in enumerate(names) if name.endswith(".norm1")]
    axis.set_xticks(starts, [f"block {i}" for i in range(len(starts))], fontsize=8)
    axis.tick_params(labelsize=8)
    axis.set_ylim(3e-8, 3e-3)
    axis.legend(fontsize=8, loc="upper left", ncols=1, frameon=False, handlelength=1.2, labelspacing=0.2)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig("figure.png", dpi=200, facecolor="white")
    plt.close(figure)


def main() -> None:
    names, model = trained(str(Path(sys.argv[1]).resolve()) if len(sys.argv) > 1 else None)
    photo, truth = scene(names, SEED)
    labels = segmented(names, model, photo)
    print(f"{model}: {(labels == truth).mean():.1%} of the pixels are right")
    colours = names["COLOURS"]
    draw(photo, names["tinted"](photo, labels), list(zip(names["NAMES"], colours)), errors())
    file = HERE / "readme.webp"
    Image.open("figure.png").convert("RGB").save(file, quality=88, method=6)
    print(f"{file.name}: {file.stat().st_size / 1e3:.0f} kB")
    assert file.stat().st_size < MOST_BYTES


if __name__ == "__main__":
    main()
