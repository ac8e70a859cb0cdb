"""The programs in docs/examples do what they say, with the included model of handwritten digits."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minibeit.catalogue import weights_folder
from minibeit.cli import main as minibeit

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "examples"
DIGITS = weights_folder() / "digits"


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """Files of features as `minibeit features` writes them: of held-out digits to learn from, and of others."""
    folder = tmp_path_factory.mktemp("digits")
    held_out = np.load(DIGITS / "held_out.npz")
    for i, (image, label) in enumerate(zip(held_out["images"], held_out["labels"])):
        place = folder / ("train" if i < 240 else "val") / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{i:03}.png")
    for part in ("train", "val"):
        words = ["features", str(folder / part), "--recursive", "--model", str(DIGITS), "--layer", "3", "--quiet"]
        assert minibeit([*words, "--backend", "numpy", "--output", str(folder / f"{part}.npz")]) == 0
    return folder


def test_linear_probe(features, capsys):
    pytest.importorskip("sklearn", reason='the example needs: pip install "minibeit[examples]"')
    share = load("linear_probe").main([str(features / "train.npz"), str(features / "val.npz")])
    assert share > 0.95
    assert "precision" in capsys.readouterr().out


def test_search_finds_images_of_the_same_kind(features, capsys):
    search = load("search")
    with np.load(features / "train.npz") as file:
        rows, files = file["features"], file["files"]
    right = []
    for query in sorted((features / "val").glob("*/*.png"))[::12]:
        search.main([str(features / "train.npz"), str(query), "--count", "3"])
        found = capsys.readouterr().out.splitlines()
        lines = [line for line in found if line.endswith(".png")]
        assert len(lines) == 3
        right += [Path(line.split()[-1]).parent.name == query.parent.name for line in lines]
    assert len(right) == 30 and np.mean(right) > 0.9
    best = search.nearest(rows[7], rows, 2)
    assert best[0] == (7, pytest.approx(1, abs=1e-5)) and best[1][1] < 1
    assert files[7] in [files[i] for i, _ in best]


@pytest.fixture
def client(monkeypatch):
    pytest.importorskip("fastapi", reason='the example needs: pip install "minibeit[examples]"')
    pytest.importorskip("python_multipart", reason='the example needs: pip install "minibeit[examples]"')
    testclient = pytest.importorskip("fastapi.testclient", reason='the example needs: pip install "minibeit[examples]"')
    monkeypatch.setenv("MINIBEIT_BACKEND", "numpy")
    monkeypatch.delenv("MODEL", raising=False)
    return testclient.TestClient(load("service").app)


@pytest.mark.parametrize("digit", range(10))
def test_service_says_what_an_image_shows(client, digit):
    (file,) = (DIGITS / "images").glob(f"digit_{digit}_*.png")
    answer = client.post("/classify?top=2", files={"image": file.read_bytes()})
    assert answer.status_code == 200
    first, second = answer.json()
    assert first["label"] == str(digit) and second["probability"] < first["probability"] < 1


def test_service_refuses_what_is_no_image(client):
    answer = client.post("/classify", files={"image": b"not an image"})
    assert answer.status_code == 422 and "format that Pillow reads" in answer.json()["detail"]
    file = io.BytesIO()
    Image.effect_noise((40, 40), 90).save(file, "PNG")
    assert client.post("/classify", files={"image": file.getvalue()[:300]}).status_code == 422
    assert client.post("/classify", files={"image": bytes(20_000_001)}).status_code == 413
    assert client.post("/classify").status_code == 422
