"""The explorer's page in Chromium: clicks, keys, what is drawn and said, and whether all can use it."""

from __future__ import annotations

import numpy as np
import pytest
from browser import axe_script, browser, opened
from colour_tokenizer import colour_tokenizer
from test_explorer import made, pixels_of, without_bias
from tolerances import EXPLORER_16_BITS

import minibeit
from minibeit import BeitForMaskedImageModeling, BeitForSemanticSegmentation, BeitModel
from minibeit.explorer import attention, pack

pytestmark = pytest.mark.slow

MODELS = {
    "classify": lambda: made(),
    "mask": lambda: made(BeitForMaskedImageModeling, use_mask_token=True, vocab_size=64),
    "segment": lambda: made(BeitForSemanticSegmentation, out_indices=[1, 2, 3, 4]),
    "wide": lambda: made(image_size=[16, 24]),
    "bare": lambda: made(BeitModel, use_relative_position_bias=False),
}


@pytest.fixture(scope="module")
def image():
    from PIL import Image

    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def found(image):
    tokenizer = {"mask": colour_tokenizer()}
    sides = {"classify": 1, "mask": 2}
    return {
        kind: minibeit.explore(make(), image, tokenizer=tokenizer.get(kind), mask_side=sides.get(kind))
        for kind, make in MODELS.items()
    }


@pytest.fixture(scope="module")
def files(found, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for kind, exploration in found.items():
        exploration.save(folder / f"{kind}.html")
    return {kind: folder / f"{kind}.html" for kind in found}


@pytest.fixture(scope="module")
def chromium():
    with browser() as started:
        yield started


def patch(page, row, column):
    return page.locator("#patches").get_by_role("gridcell", name=f"row {row}, column {column}", exact=True)


def computed(page, bias=True):
    """All probabilities that the page's script computes, for every query."""
    return np.array(
        page.evaluate(
            """bias => app.facts.blocks.map((_, place) => Array.from({length: app.facts.heads}, (_, head) =>
            Array.from({length: app.attention.tokens}, (_, token) =>
            [...app.attention.probabilities(place, head, token, bias)])))""",
            bias,
        )
    )


@pytest.mark.parametrize("kind", ["classify", "wide", "bare"])
def test_the_script_computes_the_models_probabilities(chromium, files, image, kind):
    model = MODELS[kind]()
    truth = np.concatenate(model(pixels_of(model, image), output_attentions=True).attentions)
    with opened(chromium, files[kind]) as page:
        np.testing.assert_allclose(computed(page), truth, atol=EXPLORER_16_BITS)
        plain = without_bias(model, pixels_of(model, image))
        np.testing.assert_allclose(computed(page, bias=False), plain, atol=EXPLORER_16_BITS)


def test_bias_by_offset_and_rollout_as_the_script_reads_them(chromium, files, found):
    arrays = found["classify"].arrays
    with opened(chromium, files["classify"]) as page:
        maps = np.array(page.evaluate("[...app.attention.biasMap(2, 1)]")).reshape(7, 7)
        table = arrays["table"][2, 1] * float(arrays["table_scale"][2, 1])
        for down, right in ((0, 0), (1, -2), (-3, 3)):  # key minus query; the table's rows are query minus key
            np.testing.assert_allclose(maps[3 + down, 3 + right], table[(3 - down) * 7 + 3 - right], rtol=1e-6)
        rolled = (arrays["rollout"][3, 5] / 255) ** 2 * arrays["rollout_scale"][3, 5]
        np.testing.assert_allclose(page.evaluate("[...app.attention.rollout(3, 5)]"), rolled, rtol=1e-5)


def test_a_click_chooses_a_patch_and_the_table_says_what_masking_it_changes(chromium, files, found):
    facts, values = found["classify"].facts, found["classify"].arrays["class_values"]
    names = facts["classes"]["names"]
    best = int(values[0].argmax())
    with opened(chromium, files["classify"]) as page:
        patch(page, 1, 2).click()
        assert patch(page, 1, 2).get_attribute("aria-selected") == "true"
        assert page.locator("[aria-selected=true]").count() == 2  # a patch and a head
        cells = page.locator("#classes-rows tr").nth(0).locator("td").all_inner_texts()
        assert cells[:3] == [names[best], f"{100 * values[0, best]:.1f}%", f"{100 * values[7, best]:.1f}%"]
        assert "row 1, column 2" in page.locator("#said").inner_text()
        page.get_by_role("button", name="Look from [CLS]").click()
        assert page.locator("#patches [aria-selected=true]").count() == 0
        assert page.locator("#cls").get_attribute("aria-pressed") == "true"
        assert page.locator("#classes-rows tr").nth(0).locator("td").nth(2).inner_text() == "–"


def test_arrow_keys_move_through_patches_and_heads(chromium, files):
    with opened(chromium, files["classify"]) as page:
        patch(page, 0, 0).click()
        for key, place in (("ArrowRight", (0, 1)), ("ArrowDown", (1, 1)), ("End", (1, 3)), ("ArrowRight", (1, 3)),
                           ("Home", (1, 0)), ("ArrowUp", (0, 0)), ("ArrowUp", (0, 0))):  # fmt: skip
            page.keyboard.press(key)
            assert patch(page, *place).get_attribute("aria-selected") == "true"
            assert patch(page, *place).evaluate("e => e === document.activeElement")
        assert page.locator("#patches [tabindex='0']").count() == 1
        page.locator("#heads [tabindex='0']").focus()
        page.keyboard.press("ArrowUp")
        page.keyboard.press("ArrowRight")
        assert page.locator("#head-title").inner_text() == "Block 2, head 1"


def test_the_tab_key_reaches_every_control(chromium, files):
    with opened(chromium, files["classify"]) as page:
        reached = set()
        for _ in range(14):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("(e => e.id || e.name || e.closest('[id]')?.id)(document.activeElement)"))
        assert {"patches", "cls", "overlay-kind", "opacity", "hide", "mode", "heads"} <= reached


def canvas(page, selector):
    return page.evaluate(
        """selector => { const c = document.querySelector(selector);
        return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data] }""",
        selector,
    )


def test_modes_overlays_opacity_and_cover(chromium, files):
    with opened(chromium, files["classify"]) as page:
        drawn = {}
        for mode in ("with", "without", "difference", "bias"):
            page.locator(f"input[name=mode][value={mode}]").check()
            drawn[mode] = canvas(page, "#heads canvas")
        page.locator("#roots").check()
        drawn["roots"] = canvas(page, "#heads canvas")
        assert len({tuple(pixels) for pixels in drawn.values()}) == 5
        assert len(drawn["with"]) == 4 * 4 * 4 and len(drawn["bias"]) == 7 * 7 * 4
        seen = set()
        for kind in ("attention", "mean", "rollout", "effect"):
            page.locator("#overlay-kind").select_option(kind)
            seen.add(tuple(canvas(page, "#overlay")))
        assert len(seen) == 4
        page.locator("#opacity").fill("30")
        assert page.locator("#overlay").evaluate("e => e.style.opacity") == "0.3"
        page.locator("#overlay-kind").select_option("none")
        assert not page.locator("#overlay").is_visible()
        patch(page, 2, 1).click()
        assert not page.locator("#cover").is_visible()
        page.locator("#hide").check()
        covered = np.array(canvas(page, "#cover")).reshape(4, 4, 4)[..., 3]
        assert page.locator("#cover").is_visible()
        assert np.argwhere(covered).tolist() == [[2, 1]]


def test_visual_tokens_and_what_they_stand_for(chromium, files, found):
    arrays = found["mask"].arrays
    with opened(chromium, files["mask"]) as page:
        patch(page, 3, 0).click()
        rows = [row.split("\t") for row in page.locator("#tokens-rows tr").all_inner_texts()]
        assert [int(row[0]) for row in rows[:5]] == arrays["token_best"][12].tolist()
        assert [row[0] for row in rows if "own" in row[2]] == [str(arrays["token_own"][12])]
        page.wait_for_selector("#drawn:not([hidden])")
        own, predicted = (np.array(canvas(page, f"#{name}-drawn")).reshape(16, 16, 4) for name in ("own", "predicted"))
        assert (own[8:, :8] != predicted[8:, :8]).any() and (own[:8] == predicted[:8]).all()
        assert "Hidden: token" in page.locator("#said").inner_text()


def test_classes_of_pixels_and_their_shares_in_a_patch(chromium, files, found):
    labels, classes = found["segment"].arrays["labels"], found["segment"].facts["segmentation"]["classes"]
    with opened(chromium, files["segment"]) as page:
        assert page.locator("#overlay-kind").input_value() == "labels"
        pixels = np.array(canvas(page, "#overlay")).reshape(16, 16, 4)
        for one in classes:
            np.testing.assert_array_equal(pixels[labels == one["number"]][0, :3], one["colour"])
        patch(page, 1, 1).click()
        within = labels[4:8, 4:8]
        for row, one in zip(page.locator("#segmentation-rows tr").all(), classes, strict=True):
            name, _, share = (cell.inner_text() for cell in row.locator("td").all())
            expected = (within == one["number"]).mean()
            assert name == one["name"] and share == (f"{100 * expected:.1f}%" if expected else "")


def test_a_regression_shows_values(chromium, image, tmp_path):
    found = minibeit.explore(made(id2label={0: "age"}), image)
    found.save(tmp_path / "page.html")
    whole, masked = found.arrays["class_values"][[0, 7], 0]
    with opened(chromium, tmp_path / "page.html") as page:
        patch(page, 1, 2).click()
        cells = page.locator("#classes-rows td").all_inner_texts()
    assert found.facts["classes"]["regression"] and cells[0] == "age" and "%" not in "".join(cells)
    np.testing.assert_allclose([float(cells[1]), float(cells[2])], [whole, masked], rtol=1e-3)
    np.testing.assert_allclose(float(cells[3].replace("−", "-")), masked - whole, rtol=1e-2)


def test_a_page_of_few_blocks_shows_those(chromium, image, tmp_path, monkeypatch):
    model = made()
    monkeypatch.setattr(attention, "ROOM", 2 * 17 * model.config.hidden_size * 2 * pack.TEXT_PER_BYTE)
    minibeit.explore(model, image).save(tmp_path / "page.html")
    with opened(chromium, tmp_path / "page.html") as page:
        assert page.locator("#heads [role=rowheader]").all_inner_texts() == ["block 1", "block 3"]
        assert "only 1, 3 can be looked into" in page.locator("#about").inner_text()
        assert page.locator("#head-title").inner_text() == "Block 3, head 0"


def test_a_frame_of_a_notebook_shows_it(chromium, found, tmp_path):
    (tmp_path / "frame.html").write_text(f"<!doctype html><title>x</title>{found['classify']._repr_html_()}")
    context = chromium.new_context(offline=True)
    page = context.new_page()
    page.goto((tmp_path / "frame.html").as_uri())
    frame = page.frame_locator("iframe")
    frame.locator("#patches [role=gridcell]").nth(3).click()
    assert "row 0, column 3" in frame.locator("#said").inner_text()
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", list(MODELS))
def test_axe_finds_nothing(chromium, files, tmp_path_factory, kind, scheme):
    script = axe(tmp_path_factory)
    with opened(chromium, files[kind], color_scheme=scheme) as page:
        page.locator("summary").click()
        page.evaluate(script)
        result = page.evaluate("axe.run()")
    assert len(result["passes"]) > 15
    assert [(one["id"], [node["html"][:200] for node in one["nodes"][:3]]) for one in result["violations"]] == []


AXES: list[str] = []


def axe(tmp_path_factory):
    if not AXES:
        AXES.append(axe_script(tmp_path_factory.mktemp("axe")))
    return AXES[0]
