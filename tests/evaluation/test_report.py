"""The report: what it shows is what the files of the runs say, and it needs nothing but itself."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from mu.algorithms.saliency_unlearning.mask_file import save_mask
from mu.evaluation.report import read_evaluation, read_training_run, write_report
from mu.evaluation.report_data import ReportError, read_curves
from mu.evaluation.report_figures import loss_curve, running_mean
from tests.evaluation.conftest import OBJECTS, Evaluated, colour

HOSTILE = "<script>alert('x')</script> $x_1$ & --"
_EMPTY = {"img", "meta", "link", "br", "line", "circle", "polyline"}


class Page(HTMLParser):
    """The elements of a page: (tag, attributes, the ids around it), and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str], tuple[str, ...]]] = []
        self._open: list[tuple[str, str]] = []
        self._text: list[str] = []
        self.feed(html)
        assert self._open == [], "an element was not closed"
        self.text = re.sub(r"\s+", " ", " ".join(self._text)).replace(" ,", ",").replace(" .", ".")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.elements.append((tag, values, tuple(name for _, name in self._open if name)))
        if tag not in _EMPTY:
            self._open.append((tag, values.get("id", "")))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _EMPTY:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in _EMPTY:
            assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1][0] != "style":
            self._text.append(data)

    def values(self, within: str = "") -> list[float]:
        """Of the <data> elements, below the element with that id."""
        return [
            float(attributes["value"])
            for tag, attributes, ids in self.elements
            if tag == "data" and (not within or within in ids)
        ]

    def pictures(self) -> list[tuple[str, numpy.ndarray]]:
        """(alt, pixels) of each <img>."""
        found = []
        for tag, attributes, _ in self.elements:
            if tag == "img":
                head, _, content = attributes["src"].partition(";base64,")
                assert head in ("data:image/png", "data:image/jpeg")
                with Image.open(io.BytesIO(base64.b64decode(content, validate=True))) as opened:
                    found.append((attributes["alt"], numpy.asarray(opened.convert("RGB"))))
        return found


def page_of(tmp_path: Path, **runs: Any) -> Page:
    path = write_report(tmp_path / "report.html", **runs)
    html = path.read_text(encoding="utf-8")
    # Nothing is loaded from anywhere.
    assert not re.search(r"https?:|//|@import", re.sub(r"base64,[A-Za-z0-9+/=]+", "", html))
    page = Page(html)
    tags = {tag for tag, _, _ in page.elements}
    assert tags.isdisjoint({"script", "link", "iframe", "object", "embed"})
    for _, attributes, _ in page.elements:
        assert attributes.get("src", "data:").startswith("data:")
        assert attributes.get("href", "#").startswith("#")
        assert not any(name.startswith("on") for name in attributes)
    return page


def test_numbers_are_those_of_the_json(evaluated: Evaluated, tmp_path: Path) -> None:
    folder = evaluated(fid={"value": 12.5, "n": 9, "bootstrap_95": [11.0, 14.25], "reference": "base"})
    page = page_of(tmp_path, evaluation=read_evaluation(folder))
    models = json.loads((folder / "metrics.json").read_text())["models"]
    for key in ("UA", "IRA", "CRA", "own"):
        noted = [models[name][key] for name in ("before", "after")]
        assert page.values(within=key) == [share["value"] for share in noted]
        for share in noted:
            low, high = share["wilson_95"]
            assert f"{100 * low:.1f} % to {100 * high:.1f} % n = {share['n']}" in page.text
    before, after = models["before"]["UA"], models["after"]["UA"]
    answer = f"not recognised as such in {100 * after['value']:.1f} % of {after['n']} images"
    assert f"{answer} (before: {100 * before['value']:.1f} %)" in page.text
    assert page.values().count(12.5) == 2
    assert "11 to 14.25, n = 9" in page.text


def test_pictures_are_those_of_the_first_seed_with_the_forgotten_row_marked(
    evaluated: Evaluated, tmp_path: Path
) -> None:
    run = read_evaluation(evaluated(("Blob", "Noto", "Fluent")))
    page = page_of(tmp_path, evaluation=run)
    pictures = page.pictures()
    expected = []
    for style in ("Noto", "Blob", "Fluent"):  # the forgotten one first
        for place, object in enumerate(OBJECTS):
            for model in ("before", "after"):
                number = 2 * (3 * ("Blob", "Noto", "Fluent").index(style) + place)
                expected.append(
                    (f"{model}: {object} in {style}, seed 188", number + 100 * (model == "after"))
                )
    assert [alt.partition(";")[0] for alt, _ in pictures] == [alt for alt, _ in expected]
    for (_, pixels), (_, number) in zip(pictures, expected, strict=True):
        assert pixels.shape == (64, 64, 3)
        assert (pixels == colour(number)).all()
    rows = [
        attributes["class"] for _, attributes, _ in page.elements if "pair" in attributes.get("class", "")
    ]
    assert rows == ["pair forgotten", "pair", "pair"]
    assert "Noto – forgotten" in page.text


def test_rows_are_objects_where_an_object_was_forgotten(evaluated: Evaluated, tmp_path: Path) -> None:
    run = read_evaluation(evaluated(template="object", forgotten="Dogs", models=("after",)))
    page = page_of(tmp_path, evaluation=run)
    assert [alt.partition(",")[0] for alt, _ in page.pictures()] == [
        f"after: {object} in {style}" for object in ("Dogs", "Cats", "Cars") for style in ("Noto", "Blob")
    ]
    assert "The model before unlearning was not measured" in page.text


def test_a_name_from_outside_stays_text(evaluated: Evaluated, trained: Any, tmp_path: Path) -> None:
    evaluation = read_evaluation(evaluated((HOSTILE, "Blob"), forgotten=HOSTILE))
    training = read_training_run(trained(template_name=HOSTILE, substitute=HOSTILE))
    page = page_of(tmp_path, evaluation=evaluation, training=training)
    shown = HOSTILE.replace("_", " ")
    assert page.text.count(shown) >= 4
    assert f"Forgetting {shown}" in page.text
    assert any(
        attributes.get("alt", "").startswith(f"before: Cats in {HOSTILE},")
        for _, attributes, _ in page.elements
    )


def test_a_training_run_with_its_mask(trained: Any, tmp_path: Path) -> None:
    folder = trained(masking="saliency")
    (folder / "validation.csv").write_text("step,loss,forget,retain\n0,3,2,1\n20,2,1,1\n20,2,1.5,0.5\n")
    kept = {"time_embed": 0.0, "input_blocks.0": 0.125, "middle_block.0": 0.25, "output_blocks.0": 0.5}
    mask = tmp_path / "masks" / "mask_0.5.safetensors"
    save_mask({"a": torch.arange(1000) < 300}, mask, {"kept_fraction": kept})
    (tmp_path / "masks" / "config.yaml").write_text("c_guidance: 6.25\n")
    numbers = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps({**numbers, "mask": str(mask)}))
    run = read_training_run(folder)
    assert run.validation["forget"] == [(0, 2), (20, 1.5)]  # a resumed run's later row
    page = page_of(tmp_path, training=run)
    for text in (
        "No weight of: time embed.",
        "the longest bar is 50 %",
        "input 0 12.5 %",
        "middle 0 25 %",
        "output 0 50 %",
        "c_guidance 6.25",
    ):
        assert text in page.text
    bars = [attributes["style"] for _, attributes, _ in page.elements if attributes.get("class") == "bar"]
    assert bars == ["width: 25.0%", "width: 50.0%", "width: 100.0%"]
    assert page.values() == [300, 1000, 75.5]
    dots = [tag for tag, attributes, _ in page.elements if tag == "circle"]
    assert len(dots) == 2 * 2  # two validations in each of the two curves
    for text in ("Forget term", "Retain term", "75.5 s", "40 steps", "3.99", "2.99", "xattn"):
        assert text in page.text
    assert [alt for alt, _ in page.pictures()] == [
        "images of the same prompts and seeds, before and after; the forgotten ones are framed",
        "pictures at step 20",
        "pictures at step 40",
    ]
    assert "has not been measured; the command evaluate does" in page.text


def test_what_the_numbers_do_not_show_is_said(evaluated: Evaluated, trained: Any, tmp_path: Path) -> None:
    for runs in ({"evaluation": read_evaluation(evaluated())}, {"training": read_training_run(trained())}):
        text = page_of(tmp_path, **runs).text
        assert "What this does not show: UA is about plain prompts." in text
        assert "other words, attacks on the prompt and fine-tuning can bring a concept back" in text
        assert "; the command attack measures how often." in text


def test_a_run_without_steps_is_no_training(trained: Any, tmp_path: Path) -> None:
    """As UCE's: nothing is said of curves that it cannot have."""
    folder = trained()
    (folder / "metrics.csv").unlink()
    numbers = json.loads((folder / "metrics.json").read_text())
    del numbers["steps"]
    (folder / "metrics.json").write_text(json.dumps({**numbers, "weights_total": 4400}))
    text = page_of(tmp_path, training=read_training_run(folder)).text
    assert "The model was made to forget Noto: 25 % of its UNet's weights are other ones now." in text
    assert "The edit took 75.5 s" in text
    assert "Settings: edit" in text
    assert "raining" not in text.replace(str(folder), "").replace(f"edit: {folder.name}", "")
    assert "loss" not in text


def test_what_is_missing_is_said(evaluated: Evaluated, trained: Any, tmp_path: Path) -> None:
    evaluation = read_evaluation(evaluated())
    page = page_of(tmp_path, evaluation=evaluation)
    assert "The checkpoint does not lie in the folder of a training run" in page.text
    folder = trained()
    for name in ("metrics.csv", "environment.json"):
        (folder / name).unlink()
    for picture in (folder / "pictures").iterdir():
        picture.unlink()
    page = page_of(tmp_path, training=read_training_run(folder))
    for text in (
        "No loss curves",
        "No pictures: the run sampled none",
        "No saliency mask: masking random",
        "No scores",
    ):
        assert text in page.text
    assert page.pictures() == []

    # Where the evaluation has the pictures, those of the training are not missed.
    both = page_of(tmp_path, evaluation=evaluation, training=read_training_run(folder)).text
    assert "No loss curves" in both
    assert "Drawn when it ended" not in both
    assert "No pictures" not in both


@pytest.mark.parametrize(
    ("template", "show", "sharp"), [("style", False, True), ("i2p", False, False), ("i2p", True, True)]
)
def test_unsafe_pictures_are_blurred_in_the_file(
    trained: Any, tmp_path: Path, template: str, show: bool, sharp: bool
) -> None:
    page = page_of(tmp_path, training=read_training_run(trained(template=template)), show_unsafe=show)
    pictures = page.pictures()
    assert len(pictures) == 3
    for _, pixels in pictures:
        assert (pixels.std() > 40) == sharp  # noise of 0..255: 74
    assert ("blurred in this file" in page.text) == (not sharp)


def test_a_large_grid_is_cut_with_the_forgotten_in_it_and_stays_small(
    evaluated: Evaluated, tmp_path: Path
) -> None:
    noise = Image.fromarray(numpy.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=numpy.uint8))
    styles = tuple(f"Style_{number}" for number in range(14))
    objects = tuple(f"Object_{number}" for number in range(13))
    noise.save(tmp_path / "noise.png")
    folder = evaluated(styles, objects, forgotten="Style_13", image=tmp_path / "noise.png")
    page = page_of(tmp_path, evaluation=read_evaluation(folder))
    pictures = page.pictures()
    assert len(pictures) == 12 * 12 * 2
    assert pictures[0][0].startswith("before: Object_0 in Style_13, seed 188")
    assert pictures[0][1].shape == (96, 96, 3)
    assert "2 more styles and 1 more objects were measured and are not shown" in page.text
    assert (tmp_path / "report.html").stat().st_size < 5_000_000


def test_a_curve_is_drawn_where_its_numbers_are() -> None:
    """From 0 to 4 over steps 1 to 9: the middle is half way up; what is not finite is left out."""
    curve = [(1.0, 0.0), (5.0, 2.0), (7.0, float("nan")), (9.0, 4.0)]
    drawn = str(loss_curve("Forget term", curve, [], name="forget"))
    (points,) = re.findall(r'<polyline class="whole" points="([^"]+)"', drawn)
    (x0, y0), (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in points.split())
    assert (x1 - x0, y0 - y1) == (pytest.approx(x2 - x1), pytest.approx(y1 - y2))
    assert x2 > x0
    assert y2 < y0
    assert re.findall(r">([^<>]+)</text>", drawn) == ["0", "2", "4", "1", "9", "step", "loss"]
    assert str(loss_curve("Forget term", [(1.0, float("inf"))], [], name="forget")) == ""


def test_an_axis_begins_at_0_and_goes_as_far_as_it_is_told() -> None:
    """So a loss that stays small, or hardly moves, is drawn so."""

    def drawn(curve: list[tuple[float, float]], at_least: float = 0.0) -> tuple[list[str], list[float]]:
        svg = str(loss_curve("Retain term", curve, [], name="retain", at_least=at_least))
        (points,) = re.findall(r'<polyline class="whole" points="([^"]+)"', svg)
        return re.findall(r">([^<>]+)</text>", svg)[:3], [float(p.split(",")[1]) for p in points.split()]

    side, (bottom, top) = drawn([(1.0, 0.0), (2.0, 0.5)])
    assert side == ["0", "0.25", "0.5"]
    side, heights = drawn([(1.0, 0.5), (2.0, 0.51)])
    assert side == ["0", "0.255", "0.51"]
    assert heights[0] - heights[1] == pytest.approx((bottom - top) * 0.01 / 0.51, abs=0.11)
    side, heights = drawn([(1.0, 0.0), (2.0, 0.001)], at_least=0.1)
    assert side == ["0", "0.05", "0.1"]
    assert heights[0] - heights[1] == pytest.approx((bottom - top) / 100, abs=0.11)
    side, _ = drawn([(1.0, -2.0), (2.0, 2.0)])  # gradient ascent's, which has no lower bound
    assert side == ["-2", "0", "2"]


def test_what_is_said_of_the_losses_is_computed(trained: Any, tmp_path: Path) -> None:
    """Where each begins, ends, and is largest; the retain term's axis goes as far up as the forget term's."""
    folder = trained()
    rows = "".join(f"{n},{0.4 if n < 3 else 0.2},{(0.0, 0.001, 0.03, 0.02)[n]}\n" for n in range(4))
    (folder / "metrics.csv").write_text(f"step,forget,retain\n{rows}")
    page = page_of(tmp_path, training=read_training_run(folder))
    assert "Forget term from 0.4 to 0.2. The lower, the more" in page.text
    assert "Retain term from 0 to 0.02, at most 0.03. The lower, the better" in page.text
    assert page.text.count("0 0.2 0.4 0 3 step loss") == 2, "numbers at the axes of both"
    (folder / "metrics.csv").write_text("step,forget,retain\n1,0.4,0\n2,0.2,0\n")
    page = page_of(tmp_path, training=read_training_run(folder))
    assert "Forget term from 0.4 to 0.2." in page.text
    assert "Retain term" not in page.text, "as of ESD, which has none"


def test_a_running_mean_is_of_its_window() -> None:
    curve = [(float(step), float(step % 2)) for step in range(40)]
    smooth = running_mean(curve)
    assert smooth[0] == (2.0, pytest.approx(0.4))  # 0, 1, 0, 1, 0
    assert smooth[-1] == (37.0, pytest.approx(0.6))
    assert running_mean(curve[:19]) == []


def test_another_folder_is_refused(tmp_path: Path, evaluated: Evaluated) -> None:
    assert read_curves(tmp_path / "none.csv") == {}
    with pytest.raises(ReportError, match=r"no metrics\.json of an evaluation"):
        read_evaluation(tmp_path)
    with pytest.raises(ReportError, match=r"metrics\.json of a training run"):
        read_training_run(evaluated())
    with pytest.raises(ValueError, match="an evaluation or a training run"):
        write_report(tmp_path / "report.html")


def test_images_of_the_grid_are_found_where_there_is_no_table(evaluated: Evaluated) -> None:
    run = read_evaluation(evaluated(models=("after",)))
    (run.folder / "images_after.csv").unlink()
    run = replace(run, metrics={"models": {"after": {"images": "grids/x"}}})
    assert run.images("after")["Blob", "Dogs"] == (188, Path("grids/x/Blob/Dogs/188.png"))
