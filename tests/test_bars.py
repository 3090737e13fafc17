"""What is said of progress: a bar on a terminal, lines elsewhere, nothing where it is not wanted."""

from __future__ import annotations

import io
import logging
import re
import sys
import time

import pytest

from mu import bars
from mu.run_folder import ConsoleHandler
from mu.verbosity import verbosity


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits until it speaks."""
    monkeypatch.setattr(bars, "_DELAY_SECONDS", 0.0)
    monkeypatch.setattr(bars, "_LINE_SECONDS", 0.0)


def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    made = Terminal()
    monkeypatch.setattr(sys, "stderr", made)
    return made


def work(steps: int = 4) -> None:
    with bars.bar("drawing images", total=steps, unit="images") as shown:
        for _ in range(steps):
            time.sleep(0.25)
            shown.update(0.5)
            shown.update(0.5)


@pytest.mark.usefixtures("at_once")
def test_on_a_terminal_a_bar_tells_what_how_far_and_how_long_and_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    console = terminal(monkeypatch)
    work()
    text = console.getvalue()
    assert re.search(r"\rdrawing images:  (38|62)%\|.*\| 2 of 4 images, 00:0\d left", text), text
    assert "\n" not in text
    assert text.rpartition("left")[2].strip() == "", "it is cleared"


def test_what_is_soon_done_is_not_spoken_of(monkeypatch: pytest.MonkeyPatch) -> None:
    console = terminal(monkeypatch)
    with bars.bar("hashing", total=1000, unit="images") as shown:
        for _ in range(1000):
            shown.update()
    with bars.waiting("reading"):
        pass
    assert console.getvalue() == ""


@pytest.mark.usefixtures("at_once")
def test_elsewhere_lines_tell_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    work()
    printed, said = capsys.readouterr()
    assert printed == ""
    lines = said.splitlines()
    assert any(
        re.fullmatch(r"drawing images: 2 of 4 images in 00:00, about 00:00 left", line) for line in lines
    ), said
    assert "\r" not in said
    monkeypatch.setattr(bars, "_LINE_SECONDS", 30.0)
    work()
    assert capsys.readouterr().err == "", "a line every half minute, not one a step"


@pytest.mark.usefixtures("at_once")
def test_nothing_is_said_where_it_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    console = terminal(monkeypatch)
    for quiet, json in ((True, False), (False, True)):
        with verbosity(quiet=quiet, json=json):
            work(1)
    together = {
        "TORCHELASTIC_RUN_ID": "1",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "RANK": "1",
        "LOCAL_RANK": "1",
    }
    for name, value in together.items():
        monkeypatch.setenv(name, value)
    work(1)
    assert console.getvalue() == ""


def test_a_wait_that_cannot_be_counted_tells_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bars, "_DELAY_SECONDS", 0.05)
    console = terminal(monkeypatch)
    with bars.waiting("reading model.ckpt"):
        time.sleep(0.3)
    assert "reading model.ckpt: 00:00" in console.getvalue()
    assert re.fullmatch(r"\r {20,}\r", console.getvalue().rpartition("00:00")[2]), "it is cleared"


@pytest.mark.usefixtures("at_once")
def test_a_log_line_stands_alone_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    console = terminal(monkeypatch)
    with bars.bar("training", total=3, unit="steps") as shown:
        time.sleep(0.25)
        shown.update()
        ConsoleHandler().handle(logging.makeLogRecord({"msg": "a checkpoint is written"}))
        shown.update()
    assert re.search(r"\r *\ra checkpoint is written\n", console.getvalue()), repr(console.getvalue())


def test_a_log_line_brings_no_bar_out_that_is_soon_done(monkeypatch: pytest.MonkeyPatch) -> None:
    console = terminal(monkeypatch)
    with bars.waiting("reading"):
        ConsoleHandler().handle(logging.makeLogRecord({"msg": "it is a checkpoint"}))
    assert console.getvalue().strip("\r") == "it is a checkpoint\n"


@pytest.mark.usefixtures("at_once")
def test_without_a_console_nothing_is_said_and_nothing_breaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """sys.stderr is None under pythonw, and where it was closed; what is printed to None would go to stdout."""
    monkeypatch.setattr(sys, "stderr", None)
    work(1)
    with bars.waiting("reading model.ckpt"):
        time.sleep(0.1)
    ConsoleHandler().handle(logging.makeLogRecord({"msg": "it is a checkpoint"}))
    assert capsys.readouterr().out == ""


def test_items_are_counted_one_by_one() -> None:
    assert list(bars.counted([3, 1, 2], "comparing", unit="tensors")) == [3, 1, 2]
