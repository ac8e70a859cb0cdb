"""The explorer's page: what is in it is what the model computes."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from cli_helpers import config, run, save, save_pictures
from colour_tokenizer import colour_tokenizer
from cuda_on_cpu import kernels
from cuda_on_cpu.backend import cupy_backend
from page_reader import arrays_in, facts_in, probabilities_in, rollout_in, whole
from PIL import Image
from tolerances import EXPLORER_8_BITS, EXPLORER_16_BITS

import minibeit
from minibeit import (
    BeitBackbone,
    BeitForImageClassification,
    BeitForMaskedImageModeling,
    BeitForSemanticSegmentation,
    BeitImageProcessor,
    BeitModel,
    CheckpointError,
    Trace,
)
from minibeit.explorer import attention, pack
from minibeit.explorer.regions import WORK_IN_INT8, WORK_ON_GPU, Regions, covered, operations, regions_for
from minibeit.image_processor import default_processor
from minibeit.scores import scores

BIASED = {"use_relative_position_bias": True}


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def made(model_class=BeitForImageClassification, dtype="float32", **changes):
    """A model whose position bias, which starts at zero, is not zero."""
    model = model_class(config(**{**BIASED, **changes}), dtype=dtype)
    rng = np.random.default_rng(1)
    arrays = {
        name: rng.standard_normal(array.shape).astype(array.dtype) if name.endswith("bias_table") else array
        for name, array in model.arrays.items()
    }
    return model_class(model.config, arrays=arrays, dtype=dtype)


def pixels_of(model, image):
    return default_processor(model.config)(image).pixel_values


def without_bias(model, pixels):  # -> (L, H, N, N)
    """The probabilities of the model's own queries and keys alone."""
    trace = Trace(("*.query", "*.key"))
    model(pixels, trace=trace)
    found = []
    for i in range(model.config.num_hidden_layers):
        query, key = (trace[f"encoder.{i}.attention.{part}"][0].astype(np.float64) for part in ("query", "key"))
        found.append(np.exp(query @ key.swapaxes(1, 2) / np.sqrt(query.shape[-1])))
    powers = np.array(found)
    return powers / powers.sum(-1, keepdims=True)


@pytest.mark.parametrize("changes", [{}, {"image_size": [16, 24]}, {"use_shared_relative_position_bias": True}])
def test_probabilities_in_the_page_are_the_models(image, changes):
    model = made(**changes)
    page = minibeit.explore(model, image).html()
    pixels = pixels_of(model, image)
    truth = np.concatenate(model(pixels, output_attentions=True).attentions)
    assert facts_in(page)["bits"] == 16 and facts_in(page)["blocks"] == [0, 1, 2, 3]
    np.testing.assert_allclose(probabilities_in(page), truth, atol=EXPLORER_16_BITS, rtol=0)
    plain = without_bias(model, pixels)
    np.testing.assert_allclose(probabilities_in(page, bias=False), plain, atol=EXPLORER_16_BITS, rtol=0)
    assert np.abs(truth - plain).max() > 0.1  # the bias matters
    most = np.abs(probabilities_in(page) - truth).max()
    assert most / 2 <= facts_in(page)["difference"] <= most + 1e-7  # of some of the rows


def test_a_page_with_little_room_has_8_bits_and_fewer_blocks_and_says_so(image, monkeypatch):
    model, grid = made(), (4, 4)
    numbers = 2 * 17 * model.config.hidden_size
    monkeypatch.setattr(attention, "ROOM", numbers * 4 * pack.TEXT_PER_BYTE)
    page = minibeit.explore(model, image).html()
    truth = np.concatenate(model(pixels_of(model, image), output_attentions=True).attentions)
    assert facts_in(page)["bits"] == 8 and arrays_in(page)["query"].dtype == np.int8
    np.testing.assert_allclose(probabilities_in(page), truth, atol=EXPLORER_8_BITS, rtol=0)
    assert facts_in(page)["difference"] > EXPLORER_16_BITS
    monkeypatch.setattr(attention, "ROOM", numbers * 2 * pack.TEXT_PER_BYTE)
    monkeypatch.setattr(attention, "ROOM_FOR_ROLLOUTS", 17**2 * pack.TEXT_PER_BYTE)
    facts = facts_in(page := minibeit.explore(model, image).html())
    assert facts["grid"] == list(grid) and facts["blocks"] == [1, 3] and facts["rollout_blocks"] == [3]
    np.testing.assert_allclose(probabilities_in(page), truth[[1, 3]], atol=EXPLORER_8_BITS, rtol=0)
    assert arrays_in(page)["distance"].shape == (4, 2)  # of every block


def test_bias_tables_distances_and_rollout(image):
    model = made()
    arrays = arrays_in(minibeit.explore(model, image).html())
    pixels = pixels_of(model, image)
    truth = np.concatenate(model(pixels, output_attentions=True).attentions).astype(np.float64)
    table = np.stack([model.arrays[f"beit.encoder.{i}.bias_table"].T for i in range(4)])
    step = np.abs(table).max(-1, keepdims=True) / 32767
    assert (np.abs(whole(arrays, "table") - table) <= 0.51 * step).all()
    places = np.array([(i // 4, i % 4) for i in range(16)])
    for name, probs in (("", truth), ("_without", without_bias(model, pixels))):
        expected = np.zeros((4, 2))
        for block, head in np.ndindex(4, 2):
            for i in range(16):
                weights = probs[block, head, 1 + i, 1:]
                expected[block, head] += weights @ np.hypot(*(places - places[i]).T) / weights.sum() / 16
        np.testing.assert_allclose(arrays[f"distance{name}"], expected, rtol=1e-5)
        np.testing.assert_allclose(arrays[f"to_cls{name}"], probs[:, :, 1:, 0].mean(-1), rtol=1e-5)
    rolled = np.eye(17)
    for block in range(4):
        rolled = (truth[block].mean(0) + np.eye(17)) / 2 @ rolled
        found = rollout_in(arrays)[block]
        most = rolled.max(-1, keepdims=True)
        assert (np.abs(np.sqrt(found / most) - np.sqrt(rolled / most)) <= 0.51 / 255).all()
        np.testing.assert_allclose(rolled.sum(-1), 1)


def test_a_model_without_a_bias_has_none_in_its_page(image):
    model = BeitForImageClassification(config(use_relative_position_bias=False))
    page = minibeit.explore(model, image).html()
    truth = np.concatenate(model(pixels_of(model, image), output_attentions=True).attentions)
    np.testing.assert_allclose(probabilities_in(page), truth, atol=EXPLORER_16_BITS, rtol=0)
    assert not [name for name in arrays_in(page) if "table" in name or "without" in name]


@pytest.mark.parametrize("side", [1, 3])
def test_scores_are_those_with_each_square_covered(image, side):
    model = made()
    found = minibeit.explore(model, image, mask_side=side)
    facts, values = found.facts, found.arrays["class_values"]
    pixels = pixels_of(model, image)[0]
    count = 16 if side == 1 else 4
    assert facts["regions"] == {"side": side, "rows": 4 // side + (side > 1), "columns": 4 // side + (side > 1)}
    expected = [scores(model(pixels[None]).logits[0], None)]
    for region in range(count):
        row, column = (number * side * 4 for number in divmod(region, facts["regions"]["columns"]))
        masked = pixels.copy()
        masked[:, row : row + 4 * side, column : column + 4 * side] = pixels.mean((1, 2))[:, None, None]
        expected.append(scores(model(masked[None]).logits[0], None))
    assert facts["classes"]["names"] == ["ant", "bee", "cat", "dog"] and not facts["classes"]["regression"]
    np.testing.assert_allclose(values, np.array(expected), atol=1e-6)
    assert np.ptp(values[1:], axis=0).max() > 1e-3


def test_only_classes_that_some_answer_names_are_kept(image):
    model = made(id2label={i: f"class {i}" for i in range(300)})
    found = minibeit.explore(model, image)
    kept, values = found.facts["classes"]["numbers"], found.arrays["class_values"]
    assert 5 <= len(kept) < 100 and values.shape == (17, len(kept)) and values[0].sum() < 1
    logits = model(pixels_of(model, image)).logits[0]
    assert set(np.argsort(-logits)[:5]) <= set(kept)
    assert found.facts["classes"]["names"] == [f"class {i}" for i in kept]


def test_visual_tokens_are_those_predicted_where_the_image_is_masked(image):
    model = made(BeitForMaskedImageModeling, use_mask_token=True, vocab_size=64)
    tokenizer = colour_tokenizer()
    found = minibeit.explore(model, image, tokenizer=tokenizer, mask_side=2)
    arrays = found.arrays
    own = tokenizer.encode(tokenizer.preprocess(image, (16, 16)))[0].reshape(-1)
    np.testing.assert_array_equal(arrays["token_own"], own)
    for patch in range(16):
        mask = np.zeros((4, 4), bool)
        row, column = patch // 4 // 2 * 2, patch % 4 // 2 * 2
        mask[row : row + 2, column : column + 2] = True
        logits = model(pixels_of(model, image), bool_masked_pos=mask.reshape(1, -1)).logits[0, patch]
        probs = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        np.testing.assert_array_equal(arrays["token_best"][patch], np.argsort(-probs, kind="stable")[:5])
        np.testing.assert_allclose(arrays["token_chance"][patch], np.sort(probs)[::-1][:5], rtol=1e-4)
        np.testing.assert_allclose(arrays["token_own_chance"][patch], probs[own[patch]], rtol=1e-4)


@pytest.mark.parametrize(("side", "count"), [(2, 2), (1, 8)])
def test_decoded_patches_have_the_predicted_tokens_among_the_images_own(image, side, count):
    grid = side * count
    model = made(BeitForMaskedImageModeling, use_mask_token=True, vocab_size=64, image_size=4 * grid)
    tokenizer = colour_tokenizer()
    found = minibeit.explore(model, image, tokenizer=tokenizer, mask_side=side)
    drawn = {kind: pixels_in(found.facts["tokens"][f"{kind}_drawn"]) for kind in ("own", "predicted")}
    own = found.arrays["token_own"].reshape(grid, grid)
    best = found.arrays["token_best"][:, 0].reshape(grid, grid)
    plain = np.rint(255 * tokenizer.decode(own[None])[0].transpose(1, 2, 0))
    np.testing.assert_array_equal(drawn["own"], plain)
    for top, left in np.ndindex(count, count):
        tokens, pixels = (
            (slice(size * top, size * (top + 1)), slice(size * left, size * (left + 1))) for size in (side, 4 * side)
        )
        ids = own.copy()
        ids[tokens] = best[tokens]
        image_of_ids = np.rint(255 * tokenizer.decode(ids[None])[0].transpose(1, 2, 0))
        np.testing.assert_array_equal(drawn["predicted"][pixels], image_of_ids[pixels])
    assert (drawn["own"] != drawn["predicted"]).any()


def test_without_a_tokenizer_or_a_mask_token_there_is_less(image):
    found = minibeit.explore(made(BeitForMaskedImageModeling, use_mask_token=True), image)
    assert found.facts["tokens"] == {"vocabulary": 30, "own": False}
    assert {name for name in found.arrays if name.startswith("token")} == {"token_best", "token_chance"}
    blind = minibeit.explore(made(BeitForMaskedImageModeling, use_mask_token=False), image)
    assert "tokens" not in blind.facts and blind.facts["regions"] is None


def test_segmentation_has_the_class_of_every_pixel(image):
    model = made(BeitForSemanticSegmentation, out_indices=[1, 2, 3, 4])
    found = minibeit.explore(model, image)
    output = model(pixels_of(model, image))
    (labels,) = BeitImageProcessor().post_process_semantic_segmentation(output, [(16, 16)])
    np.testing.assert_array_equal(found.arrays["labels"], labels)
    classes = found.facts["segmentation"]["classes"]
    assert [one["name"] for one in classes] == [model.config.id2label[one["number"]] for one in classes]
    np.testing.assert_allclose([one["share"] for one in classes], [(labels == one["number"]).mean() for one in classes])
    assert sum(one["share"] for one in classes) == pytest.approx(1)


@pytest.mark.parametrize("model_class", [BeitModel, BeitBackbone])
def test_an_encoder_without_a_head_shows_its_attention(image, model_class):
    model = made(model_class)
    page = minibeit.explore(model, image).html()
    truth = np.concatenate(model(pixels_of(model, image), output_attentions=True).attentions)
    np.testing.assert_allclose(probabilities_in(page), truth, atol=EXPLORER_16_BITS, rtol=0)


def check_backend(image, backend):
    """The page of a fast backend is nearly that of the reference."""
    slow = made()
    fast = BeitForImageClassification(slow.config, arrays=slow.arrays, backend=backend)
    pages = [minibeit.explore(model, image).html() for model in (slow, fast)]
    np.testing.assert_allclose(*map(probabilities_in, pages), atol=2 * EXPLORER_16_BITS)
    for name in ("class_values", "distance", "distance_without", "to_cls"):
        np.testing.assert_allclose(*(arrays_in(page)[name] for page in pages), atol=1e-4)


def test_numba_gives_nearly_the_same_page(image):
    pytest.importorskip("numba")
    check_backend(image, "numba")


@pytest.mark.skipif(kernels.compiler() is None, reason="no g++ to compile CUDA C++ with")
def test_a_gpu_gives_nearly_the_same_page(image):
    with cupy_backend():
        check_backend(image, "cupy")


def test_regions_cover_every_patch_once_and_fit_the_work():
    for grid, side in (((4, 4), 3), ((5, 2), 2), ((1, 7), 7), ((3, 3), 1)):
        masks = Regions(grid, side).masks()
        assert masks.shape == (Regions(grid, side).count, grid[0] * grid[1])
        assert (masks.sum(0) == 1).all() and masks.sum(1).max() <= side * side
    together = Regions((8, 8), 1).apart(3)
    assert together.shape == (16, 64) and (together.sum(1) == 4).all() and (together.sum(0) == 1).all()
    assert Regions((14, 14), 2).apart(3).shape == (9, 196) and Regions((14, 14), 5).apart(3).shape == (4, 196)
    for mask in together.reshape(-1, 8, 8):
        places = np.argwhere(mask)
        assert min(np.abs(a - b).max() for a in places for b in places if (a != b).any()) == 4
    with pytest.raises(ValueError, match="mask_side: expected 1 to 4 patches"):
        regions_for((4, 3), 1.0, side=5)


def test_masking_of_base_takes_seconds():
    model = SimpleNamespace(
        config=minibeit.BeitConfig(use_relative_position_bias=True), num_parameters=lambda: 86_530_984, dtype="float32"
    )
    base224, base384 = operations(model, (14, 14)), operations(model, (24, 24))
    assert base224 == pytest.approx(35.1e9, rel=0.02)
    assert [regions_for(*pass_of).side for pass_of in (((14, 14), base224), ((24, 24), base384))] == [2, 6]
    assert regions_for((14, 14), base224, side=1).count == 196
    assert regions_for((14, 14), base224, most=WORK_IN_INT8).side == 1
    assert regions_for((24, 24), base384, most=WORK_IN_INT8).side == 4
    assert regions_for((24, 24), base384, most=WORK_ON_GPU).side == 1
    assert regions_for((14, 14), base224 / 500).side == 1 and regions_for((14, 14), 1e13).count == 1


def test_covered_pixels_are_the_mean_and_the_others_unchanged():
    pixels = np.random.default_rng(0).standard_normal((3, 4, 6)).astype(np.float32)
    masks = np.array([[True, False, False, False, False, False], [False] * 5 + [True]])
    first, second = covered(pixels, masks, (2, 3))
    np.testing.assert_allclose(first[:, :2, :2], np.broadcast_to(pixels.mean((1, 2))[:, None, None], (3, 2, 2)))
    np.testing.assert_array_equal(first[:, 2:], pixels[:, 2:])
    np.testing.assert_array_equal(second[:, :2], pixels[:, :2])


def test_rounding_stays_within_half_a_step():
    x = np.random.default_rng(0).standard_normal((5, 40))
    x[2] = 0
    for bits in (8, 16):
        integers, scale = pack.rounded(x, bits)
        assert integers.dtype == f"int{bits}"
        assert (np.abs(integers * scale[:, None] - x) <= 0.501 * scale[:, None]).all()
    assert pack.spaced(12, 4) == [2, 5, 8, 11] and pack.spaced(3, 9) == [0, 1, 2] and pack.spaced(5, 0) == [4]


class Outline(HTMLParser):
    """Addresses that a page would fetch, and elements that are left open."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href", "data", "action") and value]


def test_the_page_needs_nothing_else_and_no_name_gets_out_of_its_place(image):
    nasty = "</script><script>alert(1)</script><!--arrays-->&"
    model = made(id2label={0: nasty, 1: "bee", 2: "cat"})
    page = minibeit.explore(model, image, names=(nasty, nasty)).html()
    assert facts_in(page)["classes"]["names"][0] == nasty
    assert page.count("<script") == page.count("</script>") == 2 + len(arrays_in(page))
    assert "alert(1)</script>" not in page
    outline = Outline()
    outline.feed(page)
    assert not outline.addresses
    scripts = re.sub(r"data:image/png;base64,[\w+/=]+", "", page)
    assert set(re.findall(r"https?://[\w.]+", scripts)) <= {"http://www.w3.org"}  # SVG's name: not fetched


def test_a_notebook_shows_the_page_in_a_frame(image, tmp_path):
    found = minibeit.explore(made(), image)
    frame = found._repr_html_()
    outline = HTMLParser()
    seen = {}
    outline.handle_starttag = lambda tag, attributes: seen.update({tag: dict(attributes)})
    outline.feed(frame)
    assert list(seen) == ["iframe"] and seen["iframe"]["srcdoc"] == found.html()
    found.save(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == found.html()


def test_what_does_not_go_together_is_refused_in_a_sentence(image):
    with pytest.raises(ValueError, match=r"^image: expected one image, found 2$"):
        minibeit.explore(made(), [image, image])
    with pytest.raises(ValueError, match="tokenizer: is for masked image modeling"):
        minibeit.explore(made(), image, tokenizer=colour_tokenizer())
    with pytest.raises(CheckpointError, match="has 64 visual tokens, but the model predicts 30"):
        minibeit.explore(made(BeitForMaskedImageModeling, use_mask_token=True), image, tokenizer=colour_tokenizer())
    broken = made()
    arrays = {name: array * np.nan if name == "classifier.weight" else array for name, array in broken.arrays.items()}
    with pytest.raises(CheckpointError, match="NaN"):
        minibeit.explore(BeitForImageClassification(broken.config, arrays=arrays), image)


# The command ----------------------------------------------------------------------------------------------------------


def test_the_command_writes_the_page(capsys, tmp_path):
    (path,) = save_pictures(tmp_path, "a.png")
    output = tmp_path / "page.html"
    for kind, part in (("classify", "classes"), ("segment", "segmentation"), ("mask", "tokens"), ("bare", None)):
        model = save(tmp_path / kind, kind)
        code, out, _ = run(capsys, "explore", path, "-m", model, "-o", output, "-q")
        facts = facts_in(output.read_text(encoding="utf-8"))
        assert code == 0 and "a.png seen by " + kind in out and facts["title"] == f"a.png seen by {kind}"
        assert part is None or part in facts
    code, out, err = run(capsys, "explore", path, "-m", tmp_path / "classify", "-o", output, "--mask-side", 2)
    assert code == 0 and "masked in 4 squares of 2x2 patches" in err


def test_the_command_takes_a_tokenizer(capsys, tmp_path):
    (path,) = save_pictures(tmp_path, "a.png")
    model, output = save(tmp_path / "mask", "mask", vocab_size=64), tmp_path / "page.html"
    colour_tokenizer().save_pretrained(tmp_path / "tokenizer")
    words = ["explore", path, "-m", model, "-o", output, "--tokenizer", tmp_path / "tokenizer"]
    assert run(capsys, *words)[0] == 0
    assert {"own_drawn", "predicted_drawn"} <= set(facts_in(output.read_text(encoding="utf-8"))["tokens"])


def test_the_included_model_is_explored_without_a_model(capsys, tmp_path):
    from minibeit.catalogue import weights_folder

    output = tmp_path / "digit.html"
    assert run(capsys, "explore", weights_folder() / "digits" / "images" / "digit_3_0045.png", "-o", output)[0] == 0
    facts, arrays = (read(output.read_text(encoding="utf-8")) for read in (facts_in, arrays_in))
    best = facts["classes"]["names"][int(arrays["class_values"][0].argmax())]
    assert best == "3" and facts["regions"]["side"] == 1


def test_wrong_use_ends_in_a_sentence(capsys, tmp_path):
    (path,) = save_pictures(tmp_path, "a.png")
    model = save(tmp_path / "classify", "classify")
    for words, code, message in (
        ([path, "-o", tmp_path / "page.png"], 2, "ending in .html"),
        ([path, "-o", tmp_path / "none" / "page.html"], 2, "folder does not exist"),
        ([path, "-o", tmp_path / "p.html", "--mask-side", 0], 2, "--mask-side"),
        ([path, "-o", tmp_path / "p.html", "--mask-side", 9], 1, "mask_side: expected 1 to 4"),
        ([path, "-o", tmp_path / "p.html", "-t", "x"], 2, "--tokenizer: is for checkpoints of masked"),
        ([tmp_path / "gone.png", "-o", tmp_path / "p.html"], 1, "gone.png"),
    ):
        found, _, err = run(capsys, "explore", *words, "-m", model)
        assert found == code and message in err and "Traceback" not in err
    assert not (tmp_path / "p.html").exists()


def pixels_in(address: str) -> np.ndarray:
    """The pixels of an image within a page."""
    import base64
    import io

    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))))
