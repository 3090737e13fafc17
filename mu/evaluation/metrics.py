"""What was forgotten and what was kept, counted from a classifier's answers. Nothing here imports torch.

The scores are those of UnlearnCanvas (Zhang et al., 2024, arXiv 2402.11846, section 4): UA, IRA and CRA. The
classifier's two heads answer every image; "the same kind" is the kind of the forgotten concept (style or object),
"the other kind" the other one.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, fields

import numpy

from mu.datasets.index import concept_label, concept_names
from mu.errors import MuError
from mu.evaluation.intervals import PERCENTILES, RESAMPLES, Estimate, mean_estimate

KINDS = ("style", "object")
CRA_PROMPTS = ("retained", "all")
_Z95 = 1.959964  # of the normal distribution's central 95 %


class MetricsError(MuError, ValueError):
    """Predictions from which a score cannot be counted."""


@dataclass(frozen=True)
class Prediction:
    """The image (style, object, seed) as it was asked for, and what a classifier sees in it.

    Attributes:
        style_probability, object_probability: what it gives the style (object) that was asked for; None in tables of
            earlier releases. Two predictions that differ in these alone are equal.
    """

    style: str
    object: str
    seed: int
    predicted_style: str
    predicted_object: str
    style_probability: float | None = field(default=None, compare=False)
    object_probability: float | None = field(default=None, compare=False)

    def asked(self, kind: str) -> str:
        """The style or the object that the prompt named."""
        return self.style if kind == "style" else self.object

    def seen(self, kind: str) -> str:
        """The style or the object that the classifier sees."""
        return self.predicted_style if kind == "style" else self.predicted_object

    def confidence(self, kind: str) -> float | None:
        """The probability of the style or of the object that the prompt named."""
        return self.style_probability if kind == "style" else self.object_probability

    def is_right(self, kind: str) -> bool:
        """Whether the classifier sees the style (or object) that the prompt named."""
        return self.asked(kind) == self.seen(kind)


@dataclass(frozen=True)
class Share:
    """A part of n images, in [0, 1], with two 95 % intervals of it.

    Attributes:
        value: the part; None of no images.
        n: how many images there were.
        bootstrap_95: percentiles of the part among images drawn anew from these. Of width 0 where all agree.
        wilson_95: Wilson's score interval (1927), which says how little few images tell, also where all agree.
    """

    value: float | None
    n: int
    bootstrap_95: tuple[float, float] | None
    wilson_95: tuple[float, float] | None


@dataclass(frozen=True)
class UnlearningScores:
    """The scores of one model for one forgotten concept.

    Attributes:
        UA: unlearning accuracy, images of the concept's own prompts that are *not* seen as the concept.
        IRA: in-domain retain accuracy, images of the other concepts of its kind that are seen as theirs.
        CRA: cross-domain retain accuracy, images whose concept of the other kind is seen; of which prompts, says
            `cra_prompts`.
        own: the same on the forgotten concept's own prompts: what is drawn there instead still has its object
            (style). Noise would have a perfect UA and fail here.
        style_accuracy, object_accuracy: of all images, whatever was forgotten.
    """

    template: str
    template_name: str
    cra_prompts: str
    left_out: tuple[str, ...]
    UA: Share
    IRA: Share
    CRA: Share
    own: Share
    style_accuracy: Share
    object_accuracy: Share

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()
        }


def unlearning_scores(
    predictions: Sequence[Prediction],
    *,
    template: str,
    template_name: str | Sequence[str],
    cra_prompts: str = "retained",
    left_out: Collection[str] = (),
) -> UnlearningScores:
    """Counts UA, IRA, CRA and the rest.

    Each is a part of all images that it speaks of; on a full grid that is also the mean over the concepts. Of several
    concepts that were forgotten together, UA counts the images that are seen as none of them.

    Args:
        template: kind of the forgotten concept, "style" or "object"; `template_name` names it.
        cra_prompts: of which prompts CRA is counted: "retained", all but the forgotten concept's, or "all".
        left_out: styles or objects that do not count at all, as `Seed_Images` in some readings of the protocol.

    Raises:
        MetricsError: an unknown option, no image of the forgotten concept, or an image that is there twice.
    """
    if template not in KINDS:
        raise MetricsError(f"template: {template!r} is not one of: {', '.join(KINDS)}")
    if cra_prompts not in CRA_PROMPTS:
        raise MetricsError(f"cra_prompts: {cra_prompts!r} is not one of: {', '.join(CRA_PROMPTS)}")
    targets = concept_names(template_name)
    for name in targets:
        if name in left_out:
            raise MetricsError(f"left_out: {name!r} is the {template} to forget; it cannot be left out")
    _check_distinct(predictions)
    other = "object" if template == "style" else "style"
    counted = [row for row in predictions if row.style not in left_out and row.object not in left_out]
    target = [row for row in counted if row.asked(template) in targets]
    retained = [row for row in counted if row.asked(template) not in targets]
    asked = {row.asked(template) for row in counted}
    for name in targets:
        if name not in asked:
            names = ", ".join(sorted(asked)) or "nothing"
            raise MetricsError(
                f"template_name: no image was asked for in {template} {name!r}, but in: {names}"
            )
    return UnlearningScores(
        template=template,
        template_name=concept_label(targets),
        cra_prompts=cra_prompts,
        left_out=tuple(sorted(left_out)),
        UA=_share(target, lambda row: row.seen(template) not in targets),
        IRA=_share(retained, lambda row: row.is_right(template)),
        CRA=_share(retained if cra_prompts == "retained" else counted, lambda row: row.is_right(other)),
        own=_share(target, lambda row: row.is_right(other)),
        style_accuracy=_share(counted, lambda row: row.is_right("style")),
        object_accuracy=_share(counted, lambda row: row.is_right("object")),
    )


@dataclass(frozen=True)
class Memorised:
    """Whether the forgotten concept is still there, by the classifier's confidence on the concept's own prompts.

    Attributes:
        confidence: mean probability of the concept that the prompt named, in [0, 1].
        share: part of the images in which it is at least `threshold`.
    """

    threshold: float
    confidence: Estimate
    share: Share


def memorised(
    predictions: Sequence[Prediction],
    *,
    template: str,
    template_name: str | Sequence[str],
    threshold: float,
    left_out: Collection[str] = (),
) -> Memorised:
    """How sure the classifier still is of the forgotten concept. Raises MetricsError without probabilities.

    UA counts an image as forgotten as soon as another class is a little likelier; this tells how far.
    """
    targets = concept_names(template_name)
    found = []
    for row in predictions:
        if row.asked(template) in targets and row.style not in left_out and row.object not in left_out:
            confidence = row.confidence(template)
            if confidence is None:
                raise MetricsError("these predictions have no probabilities; classify the images again")
            found.append(confidence)
    sure = sum(confidence >= threshold for confidence in found)
    return Memorised(threshold, mean_estimate(found), count_share(sure, len(found)))


def accuracy_by_class(predictions: Sequence[Prediction], kind: str) -> dict[str, Share]:
    """Style (or object) -> the part of the images asked for in it that are seen as it, in the rows' order."""
    groups: dict[str, list[Prediction]] = {}
    for row in predictions:
        groups.setdefault(row.asked(kind), []).append(row)
    return {name: _share(rows, lambda row: row.is_right(kind)) for name, rows in groups.items()}


def count_share(right: int, n: int) -> Share:
    """`right` of `n` images, with intervals; the same numbers give the same intervals."""
    if n == 0:
        return Share(None, 0, None, None)
    part = right / n
    # Drawing n images anew and counting the right ones is one draw of a binomial distribution.
    parts = numpy.random.default_rng(0).binomial(n, part, RESAMPLES) / n
    low, high = numpy.percentile(parts, PERCENTILES)
    middle = (part + _Z95**2 / (2 * n)) / (1 + _Z95**2 / n)
    reach = _Z95 / (1 + _Z95**2 / n) * math.sqrt(part * (1 - part) / n + _Z95**2 / (4 * n**2))
    wilson = (max(0.0, middle - reach), min(1.0, middle + reach))
    return Share(part, n, (float(low), float(high)), wilson)


def predictions_csv(predictions: Sequence[Prediction]) -> bytes:
    """The predictions as CSV (UTF-8), a row an image, for `read_predictions`."""
    return table_csv(_COLUMNS, [astuple(row) for row in predictions])


def table_csv(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> bytes:
    """A table as CSV (UTF-8)."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    return text.getvalue().encode()


def read_predictions(content: bytes) -> list[Prediction]:
    """What `predictions_csv` wrote. Raises MetricsError for any other table."""
    try:
        rows = list(csv.DictReader(io.StringIO(content.decode(), newline="")))
        return [_prediction(row) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise MetricsError(
            f"this is no table of predictions with the columns {', '.join(_COLUMNS)}"
        ) from error


_COLUMNS = tuple(field.name for field in fields(Prediction))


def _prediction(row: Mapping[str, str]) -> Prediction:
    if None in row.values():
        raise ValueError("a row is too short")
    return Prediction(
        row["style"],
        row["object"],
        int(row["seed"]),
        row["predicted_style"],
        row["predicted_object"],
        *(float(row[name]) if row.get(name) else None for name in _COLUMNS[5:]),
    )


def _share(rows: Sequence[Prediction], is_hit: Callable[[Prediction], bool]) -> Share:
    return count_share(sum(map(is_hit, rows)), len(rows))


def _check_distinct(predictions: Sequence[Prediction]) -> None:
    seen: set[tuple[str, str, int]] = set()
    for row in predictions:
        image = (row.style, row.object, row.seed)
        if image in seen:
            raise MetricsError(f"the image {row.style}, {row.object}, seed {row.seed} is there twice")
        seen.add(image)
