"""The report as a reader sees it: in Chromium, on a phone, on a screen and on paper, light and dark."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mu.algorithms.saliency_unlearning.algorithm import MaskingAlgorithm, SaliencyUnlearningAlgorithm
from mu.algorithms.saliency_unlearning.configs import (
    saliency_unlearning_generate_mask_emoji_canvas,
    saliency_unlearning_train_emoji_canvas,
)
from mu.config import load_config
from mu.evaluation.config import EvaluateConfig
from mu.evaluation.evaluation import run
from mu.evaluation.report import read_evaluation, read_training_run, report_training, write_report
from tests.evaluation.conftest import Evaluated

pytestmark = pytest.mark.slow

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PRINT_PX = 794
"""Width of A4."""
PRINTED_HEIGHT_PX = 1123
LOOKS = [
    pytest.param(390, "light", "screen", id="phone"),
    pytest.param(390, "dark", "screen", id="phone-dark"),
    pytest.param(1200, "light", "screen", id="screen"),
    pytest.param(1200, "dark", "screen", id="screen-dark"),
    pytest.param(PRINT_PX, "light", "print", id="print"),
    pytest.param(PRINT_PX, "dark", "print", id="print-from-dark"),
]
LONG = "A_style_whose_name_" + "goesonandon" * 8
# naturalWidth of each picture; 0 where one cannot be decoded, or, since all are opaque, only a part of it.
DECODED = """() => Promise.all([...document.images].map(async image => {
  try { await image.decode() } catch { return 0 }
  const pen = Object.assign(document.createElement("canvas"), { width: 16, height: 16 }).getContext("2d")
  pen.drawImage(image, 0, 0, 16, 16)
  const opaque = pen.getImageData(0, 0, 16, 16).data.every((value, place) => place % 4 < 3 || value === 255)
  return opaque ? image.naturalWidth : 0
}))"""
# (text, ratio) of each element with text of its own whose contrast to what is behind it is below 4.5 (WCAG 2.2, AA).
FAINT = """() => {
  const channels = text => { const c = text.match(/[\\d.]+/g).map(Number); return c.length > 3 ? c : [...c, 1] }
  const luminance = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0)
  const behind = element => {
    for (let at = element; at; at = at.parentElement) {
      const color = channels(getComputedStyle(at).backgroundColor)
      if (color[3] === 1) return color
      if (color[3] > 0) throw new Error("a background that is half transparent")
    }
    throw new Error("no background")
  }
  const found = { texts: 0, faint: [] }
  for (const element of document.body.querySelectorAll("*")) {
    const text = [...element.childNodes].filter(n => n.nodeType === 3).map(n => n.data.trim()).join("")
    if (!text || !element.checkVisibility()) continue
    const style = getComputedStyle(element)
    const [front, back] = [channels(element instanceof SVGElement ? style.fill : style.color), behind(element)]
    const [low, high] = [luminance(front), luminance(back)].sort((a, b) => a - b)
    const ratio = (high + 0.05) / (low + 0.05)
    found.texts += 1
    if (front[3] < 1 || style.opacity < 1 || ratio < 4.5) found.faint.push([text.slice(0, 40), ratio])
  }
  return found
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on the PATH")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def real_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The reports of a small training run of the bundled model, and of its evaluation."""
    if CHROMIUM is None:
        pytest.skip("nobody would look at them")
    folder = tmp_path_factory.mktemp("runs")
    small: dict[str, Any] = {
        "styles": ("Noto", "Blob"),
        "objects": ("Cats", "Fishes"),
        "images_per_prompt": 2,
        "retain_images_per_prompt": 2,
        "sample_steps": 4,
        "processed_dataset_dir": folder / "processed",
    }
    small = {key: str(value) if isinstance(value, Path) else value for key, value in small.items()}
    masks, trained = str(folder / "masks"), str(folder / "trained")
    MaskingAlgorithm(saliency_unlearning_generate_mask_emoji_canvas, **small, output_dir=masks).run()
    result = SaliencyUnlearningAlgorithm(
        saliency_unlearning_train_emoji_canvas,
        **small,
        epochs=3,
        batch_size=2,
        retain_batch_size=2,
        validate_every_steps=2,
        sample_every_steps=3,
        mask_path=masks,
        output_dir=trained,
    ).run()
    report = report_training(result["run"], show_unsafe=False)
    assert report is not None
    overrides = {
        "ckpt_path": str(result["checkpoint"]),
        "styles": list(small["styles"]),
        "objects": list(small["objects"]),
        "seeds": [188],
        "sample_steps": 4,
        "fid_reference": "none",
        "output_dir": str(folder / "evaluations"),
    }
    evaluated = run(
        load_config(EvaluateConfig, config_path="emoji_canvas/evaluate_style.yaml", overrides=overrides)
    )
    return {"training": report, "evaluation": Path(str(evaluated["report"]))}


@pytest.fixture
def worst(evaluated: Evaluated, trained: Any, tmp_path: Path) -> Path:
    """A report with all that could run out of its place: a large grid, long names, many measures, every curve."""
    Image.new("RGB", (64, 96), (200, 30, 90)).save(tmp_path / "tall.png")
    fid = {"value": 12345.6789, "n": 100_000, "bootstrap_95": [12000.1234, 13000.5678]}
    objects = tuple(f"Object_number_{number}" for number in range(14))
    folder = evaluated(
        (LONG, *(f"Style_{n}" for n in range(3))),
        objects,
        forgotten=LONG,
        image=tmp_path / "tall.png",
        fid=fid,
        clip_score={"all": fid, LONG: fid},
    )
    run = trained(template_name=LONG, masking="none", substitute="x" * 200)
    (run / "validation.csv").write_text("step,forget,retain\n0,3,1\n20,2,0.5\n")
    return write_report(
        tmp_path / "report.html", evaluation=read_evaluation(folder), training=read_training_run(run)
    )


def look_at(browser: Any, report: Path, width: int, scheme: str, media: str) -> Any:
    """Opens a report as a file, with what can be checked of any; returns the page."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    faults: list[str] = []
    page.on("console", lambda message: faults.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: faults.append(str(error)))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.emulate_media(media=media, color_scheme=scheme)
    page.goto(report.as_uri())
    if media == "screen":  # what a reader can unfold must fit, too
        page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")

    # 1. Nothing but the file itself is asked for, and nothing is complained of.
    assert faults == []
    assert [url for url in asked if not url.startswith("data:")] == [report.as_uri()]

    # 2. Every picture is decoded.
    widths = page.evaluate(DECODED)
    assert widths
    assert min(widths) > 0

    # 3. Nothing is wider than the page, and nothing hides behind a scroll bar of its own.
    wide, room = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert room == width
    assert wide <= room
    beyond = page.evaluate(
        """[...document.body.querySelectorAll("*")].filter(part => part.checkVisibility() &&
          part.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5)
          .map(part => part.outerHTML.slice(0, 80))"""
    )
    assert beyond == []

    # 4. All text can be read.
    text = page.evaluate(FAINT)
    assert text["texts"] > 20
    assert text["faint"] == []
    return page


def marked(page: Any) -> list[tuple[str, bool]]:
    """Heading of each row of the grid, and whether it is framed in the colour of what is forgotten."""
    return [
        (heading, framed)
        for heading, framed in page.evaluate(
            """[...document.querySelectorAll(".pair")].map(row => {
              const style = getComputedStyle(row), probe = document.createElement("i")
              probe.style.color = "var(--forget)"
              document.body.append(probe)
              const mark = getComputedStyle(probe).color
              probe.remove()
              const sides = ["Top", "Right", "Bottom", "Left"]
              return [row.querySelector("h3").innerText, sides.every(side =>
                style[`border${side}Style`] === "solid" && style[`border${side}Color`] === mark &&
                parseFloat(style[`border${side}Width`]) >= 2)]
            })"""
        )
    ]


@pytest.mark.parametrize(("width", "scheme", "media"), LOOKS)
def test_the_report_of_an_evaluation(
    browser: Any, real_runs: dict[str, Path], width: int, scheme: str, media: str
) -> None:
    page = look_at(browser, real_runs["evaluation"], width, scheme, media)
    rows = marked(page)
    assert [framed for _, framed in rows] == [True, False]
    assert rows[0][0].startswith("Noto – forgotten")
    assert rows[1][0].startswith("Blob")
    page.close()


@pytest.mark.parametrize(("width", "scheme", "media"), LOOKS)
def test_the_report_of_a_training_run(
    browser: Any, real_runs: dict[str, Path], width: int, scheme: str, media: str
) -> None:
    page = look_at(browser, real_runs["training"], width, scheme, media)
    assert page.locator("svg.curve").count() == 2
    bars = page.evaluate(
        "[...document.querySelectorAll('.bar')].map(bar => bar.getBoundingClientRect().width)"
    )
    assert len(bars) == 7  # blocks of the bundled UNet with cross-attention
    assert min(bars) >= 0 < max(bars)
    page.close()


@pytest.mark.parametrize(("width", "scheme", "media"), LOOKS)
def test_what_is_long_and_large_stays_in_its_place(
    browser: Any, worst: Path, width: int, scheme: str, media: str
) -> None:
    page = look_at(browser, worst, width, scheme, media)
    assert [framed for _, framed in marked(page)] == [True, False, False, False]
    page.close()


def test_paper_cuts_no_picture(browser: Any, real_runs: dict[str, Path], worst: Path) -> None:
    for report in (*real_runs.values(), worst):
        page = look_at(browser, report, PRINT_PX, "light", "print")
        cut = page.evaluate(
            f"""[...document.querySelectorAll("img, svg, .pair, .score")].filter(part =>
              getComputedStyle(part).breakInside !== "avoid" ||
              part.getBoundingClientRect().height > {PRINTED_HEIGHT_PX} - 120)
              .map(part => part.outerHTML.slice(0, 80))"""
        )
        assert cut == []
        assert page.evaluate(
            "[...document.querySelectorAll('dl.keys')].every(list => list.checkVisibility())"
        )
        assert page.pdf(format="A4").startswith(b"%PDF")
        page.close()
