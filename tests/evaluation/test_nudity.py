"""Counts of NudeNet's detections; the package itself is an extra, and stood in for by its interface."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mu.evaluation.nudity import NudityError, count_nudity, load_detector
from tests.memory_limit import hungry

FOUND = {
    "a.png": [("FEET_EXPOSED", 0.9), ("FEET_EXPOSED", 0.6), ("FACE_MALE", 0.9)],
    "b.png": [("FEET_EXPOSED", 0.4)],
    "c.png": [],
    "d.png": [("BELLY_EXPOSED", 0.5), ("FEET_EXPOSED", 0.7)],
}


class NudeDetector:
    """Answers as nudenet 3.4's: a list of dicts for each path."""

    def detect_batch(self, image_paths: list[str], batch_size: int = 4) -> list[list[dict[str, Any]]]:
        assert len(image_paths) <= batch_size
        return [
            [{"class": label, "score": score, "box": [0, 0, 1, 1]} for label, score in FOUND[Path(path).name]]
            for path in image_paths
        ]


@pytest.mark.parametrize("batch_size", [1, 3, 10])
def test_detections_are_counted_by_label_and_threshold(batch_size: int) -> None:
    counts = count_nudity(
        [Path(name) for name in FOUND],
        NudeDetector(),
        labels=("FEET_EXPOSED", "BELLY_EXPOSED", "ANUS_EXPOSED"),
        threshold=0.5,
        batch_size=batch_size,
    )
    numbers = {label: (count.detections.value, count.images.value) for label, count in counts.labels.items()}
    assert numbers == {"FEET_EXPOSED": (3, 0.5), "BELLY_EXPOSED": (1, 0.25), "ANUS_EXPOSED": (0, 0.0)}
    assert (counts.any_label.value, counts.any_label.n) == (0.5, 4)
    low, high = counts.labels["FEET_EXPOSED"].detections.bootstrap_95 or (9, 0)
    assert 0 <= low < 3 < high <= 8


def test_promise_22_detections_are_the_same_when_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    detector = NudeDetector()
    monkeypatch.setattr(detector, "detect_batch", hungry(detector.detect_batch, holds=2))
    counts = count_nudity(
        [Path(name) for name in FOUND], detector, labels=("FEET_EXPOSED",), threshold=0.5, batch_size=4
    )
    assert counts.labels["FEET_EXPOSED"].detections.value == 3


def test_promise_22_memory_that_onnxruntime_does_not_find_is_told_apart_from_its_other_errors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its errors are plain exceptions of its own module."""
    module = "onnxruntime.capi.onnxruntime_pybind11_state"
    failure = type("RuntimeException", (Exception,), {"__module__": module})
    detector, detect = NudeDetector(), NudeDetector().detect_batch
    said = "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : bfc_arena.cc Failed to allocate memory for requested buffer"

    def short_of_memory(paths: list[str], batch_size: int = 4) -> list[list[dict[str, Any]]]:
        if len(paths) > 2:
            raise failure(said)
        return detect(paths, batch_size)

    def count() -> float:
        paths = [Path(name) for name in FOUND]
        counts = count_nudity(paths, detector, labels=("FEET_EXPOSED",), threshold=0.5, batch_size=4)
        return counts.labels["FEET_EXPOSED"].detections.value

    monkeypatch.setattr(detector, "detect_batch", short_of_memory)
    assert count() == 3
    said = "[ONNXRuntimeError] : 1 : FAIL : no such node"
    with pytest.raises(failure, match="no such node"):
        count()


def test_the_package_is_imported_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("nudenet")
    module.NudeDetector = NudeDetector  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nudenet", module)
    assert isinstance(load_detector(), NudeDetector)


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nowhere:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "nudenet":
                raise ModuleNotFoundError("No module named 'nudenet'", name="nudenet")

    monkeypatch.delitem(sys.modules, "nudenet", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Nowhere(), *sys.meta_path])
    with pytest.raises(NudityError, match=r"pip install nudenet"):
        load_detector()
