"""What fp32 means during a run, whatever the caller has set, and how deterministic kernels are asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mu.arithmetic import CUBLAS_WORKSPACE, DeterminismError, products, run_arithmetic
from mu.launch import on_ranks

NAMES = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")
HAS_NEWER = hasattr(torch.backends.cuda.matmul, "fp32_precision")
newer_only = pytest.mark.skipif(not HAS_NEWER, reason="this torch has the older interface alone")


@pytest.fixture(autouse=True)
def switches_of_torch() -> Iterator[None]:
    """As they are in a new process, also after a caller of these tests."""
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    if HAS_NEWER:
        torch.backends.fp32_precision = "none"  # type: ignore[attr-defined]
        for name in NAMES:
            attrgetter(name)(torch.backends).fp32_precision = "tf32" if name.startswith("cudnn") else "none"


def newer() -> list[str]:
    return [attrgetter(name)(torch.backends).fp32_precision for name in NAMES] if HAS_NEWER else []


def older() -> tuple[Any, ...] | None:
    """None where torch refuses to tell, because the newer interface contradicts it."""
    try:
        return (
            torch.get_float32_matmul_precision(),
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
        )
    except RuntimeError:
        return None


def newer_global() -> None:
    torch.backends.fp32_precision = "tf32"  # type: ignore[attr-defined]


def newer_matmul() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def newer_conv() -> None:
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]


def newer_cpu() -> None:
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]


@newer_only
def test_after_a_run_the_setting_for_all_of_torch_still_counts() -> None:
    newer_global()
    with run_arithmetic():
        pass
    torch.backends.fp32_precision = "ieee"  # type: ignore[attr-defined]
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"


@pytest.mark.parametrize(
    "caller",
    [
        lambda: None,
        lambda: torch.set_float32_matmul_precision("high"),
        lambda: torch.set_float32_matmul_precision("medium"),
        lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
        *(
            pytest.param(call, marks=newer_only)
            for call in (newer_global, newer_matmul, newer_conv, newer_cpu)
        ),
    ],
)
def test_fp32_is_fp32_in_a_run_whatever_the_caller_has_set(caller: Callable[[], Any]) -> None:
    caller()
    before = older(), newer()
    exact = ("highest", False, False), ["ieee"] * len(newer())
    with run_arithmetic():
        assert (older(), newer()) == exact
        with products(tf32=True):
            rounded = ["tf32"] * 3 + ["ieee"] * 3 if HAS_NEWER else []
            assert (older(), newer()) == (("high", True, True), rounded)
            with products(tf32=False):
                assert (older(), newer()) == exact
            assert newer() == rounded
        assert (older(), newer()) == exact
    assert (older(), newer()) == before
    with pytest.raises(ZeroDivisionError), run_arithmetic():
        raise ZeroDivisionError
    assert (older(), newer()) == before


# ---- deterministic kernels


def kernels() -> tuple[bool, ...]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
    )


def test_promise_24_deterministic_kernels_are_asked_for_and_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(CUBLAS_WORKSPACE, "")
    monkeypatch.delenv(CUBLAS_WORKSPACE)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = kernels()
    assert not before[0]
    with run_arithmetic():
        assert kernels() == before
        assert CUBLAS_WORKSPACE not in os.environ
    with run_arithmetic(deterministic=True):
        assert kernels() == (True, False, True, False)
        assert os.environ[CUBLAS_WORKSPACE] == ":4096:8"
    assert kernels() == before


def test_promise_24_too_late_for_deterministic_kernels_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA that has started cannot be had on every machine: only whether it has is stood in for."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setenv(CUBLAS_WORKSPACE, ":4096:2:16:8")
    before = kernels()
    with pytest.raises(DeterminismError, match=r"CUDA has started .*CUBLAS_WORKSPACE_CONFIG=:4096:8"):
        on_ranks(lambda _: None, SimpleNamespace(deterministic=True), "cpu")
    assert kernels() == before
    monkeypatch.setenv(CUBLAS_WORKSPACE, ":16:8")
    assert on_ranks(lambda _: kernels(), SimpleNamespace(deterministic=True), "cpu")[0]


def test_promise_24_every_run_takes_the_kernels_its_config_asks_for() -> None:
    assert on_ranks(lambda _: kernels(), SimpleNamespace(deterministic=True), "cpu") == (
        True,
        False,
        True,
        False,
    )
    assert not on_ranks(lambda _: kernels(), SimpleNamespace(deterministic=False), "cpu")[0]
    assert not on_ranks(lambda _: kernels(), None, "cpu")[0]
