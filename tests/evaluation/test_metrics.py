"""Scores counted by hand on a small grid: 2 styles x 2 objects x 2 seeds, and a third style."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

from mu.evaluation.metrics import (
    MetricsError,
    Prediction,
    accuracy_by_class,
    count_share,
    memorised,
    predictions_csv,
    read_predictions,
    unlearning_scores,
)

# Asked for style, object, seed; seen style, object.
TABLE = [
    Prediction("Noto", "Cats", 1, "Blob", "Cats"),  # forgotten, object kept
    Prediction("Noto", "Cats", 2, "Blob", "Dogs"),  # forgotten, object lost
    Prediction("Noto", "Dogs", 1, "Noto", "Dogs"),  # not forgotten
    Prediction("Noto", "Dogs", 2, "Twemoji", "Dogs"),  # forgotten, object kept
    Prediction("Blob", "Cats", 1, "Blob", "Cats"),
    Prediction("Blob", "Cats", 2, "Noto", "Cats"),  # style lost
    Prediction("Blob", "Dogs", 1, "Blob", "Cats"),  # object lost
    Prediction("Blob", "Dogs", 2, "Blob", "Dogs"),
    Prediction("Twemoji", "Cats", 1, "Twemoji", "Dogs"),  # object lost
    Prediction("Twemoji", "Cats", 2, "Twemoji", "Cats"),
    Prediction("Twemoji", "Dogs", 1, "Twemoji", "Cats"),  # object lost
    Prediction("Twemoji", "Dogs", 2, "Twemoji", "Dogs"),
]


def test_scores_of_a_forgotten_style() -> None:
    scores = unlearning_scores(TABLE, template="style", template_name="Noto")
    assert (scores.UA.value, scores.UA.n) == (3 / 4, 4)
    assert (scores.IRA.value, scores.IRA.n) == (7 / 8, 8)
    assert (scores.CRA.value, scores.CRA.n) == (5 / 8, 8)
    assert (scores.own.value, scores.own.n) == (3 / 4, 4)
    assert (scores.style_accuracy.value, scores.style_accuracy.n) == (8 / 12, 12)
    assert (scores.object_accuracy.value, scores.object_accuracy.n) == (8 / 12, 12)


def test_scores_of_a_forgotten_object() -> None:
    scores = unlearning_scores(TABLE, template="object", template_name="Cats")
    assert (scores.UA.value, scores.UA.n) == (2 / 6, 6)  # seen as Dogs: Noto 2, Twemoji 1
    assert (scores.IRA.value, scores.IRA.n) == (4 / 6, 6)  # Dogs seen as Dogs
    assert (scores.CRA.value, scores.CRA.n) == (5 / 6, 6)  # the style on prompts of Dogs
    assert (scores.own.value, scores.own.n) == (3 / 6, 6)  # the style on prompts of Cats


def test_of_several_forgotten_styles_none_may_be_seen() -> None:
    scores = unlearning_scores(TABLE, template="style", template_name=("Noto", "Blob"))
    assert (scores.UA.value, scores.UA.n) == (1 / 8, 8)  # Noto seen as Blob is not forgotten
    assert (scores.IRA.value, scores.IRA.n) == (4 / 4, 4)
    assert (scores.CRA.value, scores.CRA.n) == (2 / 4, 4)
    assert scores.template_name == "Noto+Blob"
    one = unlearning_scores(TABLE, template="style", template_name=("Noto",))
    assert one == unlearning_scores(TABLE, template="style", template_name="Noto")
    with pytest.raises(MetricsError, match="in style 'Fluent', but in: Blob, Noto, Twemoji"):
        unlearning_scores(TABLE, template="style", template_name=("Noto", "Fluent"))


def test_cra_may_count_the_forgotten_prompts_too() -> None:
    scores = unlearning_scores(TABLE, template="style", template_name="Noto", cra_prompts="all")
    assert (scores.CRA.value, scores.CRA.n) == (8 / 12, 12)
    assert scores.cra_prompts == "all"
    assert (scores.UA.value, scores.IRA.value, scores.own.value) == (3 / 4, 7 / 8, 3 / 4)


def test_what_is_left_out_does_not_count() -> None:
    scores = unlearning_scores(TABLE, template="style", template_name="Noto", left_out=["Twemoji"])
    assert (scores.IRA.value, scores.IRA.n) == (3 / 4, 4)
    assert (scores.CRA.value, scores.CRA.n) == (3 / 4, 4)
    assert (scores.UA.value, scores.UA.n) == (3 / 4, 4)  # Twemoji as an answer still counts


def test_nothing_retained_has_no_accuracy() -> None:
    scores = unlearning_scores(TABLE[:4], template="style", template_name="Noto")
    assert scores.IRA.value is None
    assert scores.IRA.n == scores.CRA.n == 0
    assert json.loads(json.dumps(scores.as_dict(), allow_nan=False))["UA"]["value"] == 0.75


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "styles"}, "template: 'styles' is not one of: style, object"),
        ({"template_name": "Fluent"}, "'Fluent', but in: Blob, Noto, Twemoji"),
        ({"cra_prompts": "both"}, "retained, all"),
        ({"left_out": ["Noto"]}, "cannot be left out"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, object], message: str) -> None:
    wanted = {"template": "style", "template_name": "Noto"} | options
    with pytest.raises(MetricsError, match=message):
        unlearning_scores(TABLE, **wanted)  # type: ignore[arg-type]


def test_an_image_counted_twice_is_refused() -> None:
    with pytest.raises(MetricsError, match="Noto, Cats, seed 1 is there twice"):
        unlearning_scores([*TABLE, TABLE[0]], template="style", template_name="Noto")


def test_accuracy_by_class() -> None:
    styles = accuracy_by_class(TABLE, "style")
    assert {name: share.value for name, share in styles.items()} == {
        "Noto": 1 / 4,
        "Blob": 3 / 4,
        "Twemoji": 1.0,
    }
    objects = accuracy_by_class(TABLE, "object")
    assert {name: share.value for name, share in objects.items()} == {"Cats": 4 / 6, "Dogs": 4 / 6}


def test_wilson_interval_is_that_of_the_books() -> None:
    share = count_share(81, 263)  # Newcombe (1998), table I
    assert share.wilson_95 == pytest.approx((0.2553, 0.3662), abs=5e-5)
    low, high = count_share(20, 20).wilson_95 or (0, 0)
    assert low == pytest.approx(0.8389, abs=5e-5)
    assert high == pytest.approx(1.0)


def test_bootstrap_interval_has_the_width_of_a_proportion() -> None:
    share = count_share(700, 1000)
    reach = 1.96 * math.sqrt(0.7 * 0.3 / 1000)
    assert share.bootstrap_95 == pytest.approx((0.7 - reach, 0.7 + reach), abs=0.003)
    assert count_share(700, 1000) == share  # drawn from a fixed seed
    assert count_share(20, 20).bootstrap_95 == (1.0, 1.0)


def test_predictions_are_read_as_they_were_written() -> None:
    content = predictions_csv(TABLE)
    assert content.decode().splitlines()[0] == (
        "style,object,seed,predicted_style,predicted_object,style_probability,object_probability"
    )
    assert read_predictions(content) == TABLE
    with pytest.raises(MetricsError, match="columns style, object, seed"):
        read_predictions(b"style,object\nNoto,Cats\n")
    with pytest.raises(MetricsError, match="columns"):
        read_predictions(content[:-10])  # cut off within a row


def test_probabilities_are_read_as_they_were_written() -> None:
    row = Prediction("Noto", "Cats", 1, "Blob", "Cats", 0.25, 1.0)
    (found,) = read_predictions(predictions_csv([row]))
    assert (found.style_probability, found.object_probability) == (0.25, 1.0)
    earlier = b"style,object,seed,predicted_style,predicted_object\nNoto,Cats,1,Blob,Cats\n"
    (found,) = read_predictions(earlier)  # a table of a release that kept none
    assert (found, found.style_probability) == (row, None)


def test_a_memorised_concept_is_counted_on_its_own_prompts() -> None:
    table = [
        Prediction("Noto", "Cats", 1, "Blob", "Cats", 0.5, 1.0),
        Prediction("Noto", "Cats", 2, "Noto", "Cats", 0.9, 1.0),
        Prediction("Noto", "Dogs", 1, "Blob", "Dogs", 0.1, 1.0),
        Prediction("Noto", "Cars", 1, "Noto", "Cars", 1.0, 1.0),  # left out
        Prediction("Blob", "Cats", 1, "Noto", "Cats", 0.0, 0.8),  # another prompt
    ]
    options = {"template": "style", "template_name": "Noto", "left_out": ("Cars",)}
    found = memorised(table, threshold=0.5, **options)  # type: ignore[arg-type]
    assert (found.confidence.value, found.confidence.n) == (pytest.approx(0.5), 3)
    assert (found.share.value, found.share.n) == (pytest.approx(2 / 3), 3)
    assert memorised(table, threshold=0.6, **options).share.value == pytest.approx(1 / 3)  # type: ignore[arg-type]
    with pytest.raises(MetricsError, match="have no probabilities"):
        memorised(TABLE, threshold=0.5, template="style", template_name="Noto")


def test_counting_needs_no_torch() -> None:
    program = "import sys, mu.evaluation.metrics; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
