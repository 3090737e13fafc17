from __future__ import annotations

import csv
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mu.atomic import WriteError
from mu.config import Config, load_config, setting
from mu.errors import MuError
from mu.run_folder import (
    ConsoleHandler,
    MetricsCsv,
    RunFolder,
    RunFolderError,
    space_problem,
    writable_problem,
)


class Toy(Config):
    lr: float = setting(1e-5, "step size", gt=0)


def test_each_run_has_its_own_folder(tmp_path):
    paths = []

    def make():
        with RunFolder.create(tmp_path / "out", "Noto") as run:
            paths.append(run.path)

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 8
    assert sorted(paths) == sorted((tmp_path / "out").iterdir())
    assert all(re.fullmatch(r"Noto-\d{8}-\d{6}(-\d)?", path.name) for path in paths)


def test_its_path_can_be_copied_into_a_command(tmp_path):
    with RunFolder.create(tmp_path, "style-High Contrast") as run:
        assert re.fullmatch(r"style-High_Contrast-\d{8}-\d{6}", run.path.name)
    (tmp_path / "style-High Contrast-20250101-000000").mkdir()  # of an earlier version
    with RunFolder.go_on(tmp_path, "style-High Contrast-20250101-000000") as run:
        assert run.path.name == "style-High Contrast-20250101-000000"


@pytest.mark.parametrize("name", ["a/b", "..", "", "/abs"])
def test_a_name_stays_in_its_folder(tmp_path, name):
    with pytest.raises(ValueError, match="cannot be part"):
        RunFolder.create(tmp_path, name)
    assert list(tmp_path.iterdir()) == []


def test_where_no_folder_can_be_made_the_error_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"output_dir: no run folder can be made in .*file") as caught:
        RunFolder.create(tmp_path / "file", "Noto")
    assert isinstance(caught.value, MuError)


def test_the_saved_config_is_the_config(tmp_path):
    with RunFolder.create(tmp_path, "x") as run:
        path = run.save_config(Toy(lr=0.125))
    assert path == run.path / "config.yaml"
    assert f"all settings: {path}\n" in (run.path / "log.txt").read_text()
    assert load_config(Toy, config_path=path) == Toy(lr=0.125)


def test_what_the_package_logs_goes_to_the_log_of_the_open_runs(tmp_path, capsys):
    logger = logging.getLogger("mu.some.module")
    with RunFolder.create(tmp_path, "outer") as outer:
        logger.info("first")
        with RunFolder.create(tmp_path, "inner") as inner:
            logger.info("second")
            consoles = [h for h in logging.getLogger("mu").handlers if isinstance(h, ConsoleHandler)]
            assert len(consoles) == 1
        logger.info("third")
    logger.info("fourth")
    lines = [line.split(" ", 3)[-1] for line in (outer.path / "log.txt").read_text().splitlines()]
    assert lines == ["first", "second", "third"]
    assert (inner.path / "log.txt").read_text().splitlines()[0].endswith("INFO second")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert [line.rsplit(" ", 1)[-1] for line in printed.err.splitlines()] == ["first", "second", "third"]
    assert logging.getLogger("mu").handlers == []


def test_metrics_are_rows_under_one_header(tmp_path):
    with RunFolder.create(tmp_path, "x") as run:
        run.metrics_csv.append(1, loss=0.5, retain=0.25)
        run.metrics_csv.append(2, loss=0.125)
        with pytest.raises(ValueError, match="no column lss; it has step, loss, retain"):
            run.metrics_csv.append(3, lss=1.0)
    with open(run.path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"step": "1", "loss": "0.5", "retain": "0.25"},
        {"step": "2", "loss": "0.125", "retain": ""},
    ]


def test_json_is_json(tmp_path):
    with RunFolder.create(tmp_path, "x") as run:
        path = run.save_json("metrics.json", {"UA": 0.5, "concept": "é"})
        assert json.loads(path.read_text(encoding="utf-8")) == {"UA": 0.5, "concept": "é"}
        with pytest.raises(ValueError, match="NaN or Inf cannot"):
            run.save_json("metrics.json", {"UA": float("nan")})
        assert json.loads(path.read_text(encoding="utf-8"))["UA"] == 0.5


def test_a_named_folder_is_gone_on_with(tmp_path):
    with RunFolder.go_on(tmp_path / "runs", "mine") as run:
        run.logger.info("first")
    with RunFolder.go_on(tmp_path / "runs", "mine") as again:
        again.logger.info("second")
    assert run.path == again.path == tmp_path / "runs" / "mine"
    assert [line.rpartition(" ")[2] for line in (run.path / "log.txt").read_text().splitlines()] == [
        "first",
        "second",
    ]
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="no run folder can be made"):
        RunFolder.go_on(tmp_path, "file")
    for wrong in ("../up", "a/b", ""):
        with pytest.raises(ValueError, match="cannot be part of a run folder's name"):
            RunFolder.go_on(tmp_path, wrong)


def test_the_environment_names_versions_but_neither_host_nor_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret-0123456789")
    with RunFolder.create(tmp_path, "x") as run:
        text = run.save_environment().read_text()
    found = json.loads(text)
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["packages"]["torch"] is not None
    assert "secret" not in text
    assert socket.gethostname() not in text
    assert str(Path.home()) not in text


def test_a_killed_run_keeps_the_rows_it_wrote(tmp_path):
    code = (
        "import os, signal, sys; from mu.run_folder import RunFolder; run = RunFolder.create(sys.argv[1], 'x')\n"
        "for step in range(5): run.metrics_csv.append(step, loss=0.5); run.logger.info('step %d', step)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True)
    assert done.returncode == -9
    (run,) = tmp_path.iterdir()
    assert len((run / "metrics.csv").read_text().splitlines()) == 6
    assert len((run / "log.txt").read_text().splitlines()) == 5


def test_promise_17_space_and_permission_are_found_before_a_run(tmp_path):
    assert space_problem(tmp_path / "not" / "yet", 1) is None
    assert "MB are needed" in str(space_problem(tmp_path / "not" / "yet", 10**18))
    assert writable_problem(tmp_path / "not" / "yet") is None
    (tmp_path / "file").write_text("")
    assert "is a file" in str(writable_problem(tmp_path / "file" / "below"))
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for below in ("link", "link/deeper"):
        assert f"link is a link to {tmp_path / 'gone'}, which is not there" in str(
            writable_problem(tmp_path / below)
        )
    (tmp_path / "good").symlink_to(tmp_path)
    assert writable_problem(tmp_path / "good" / "deeper") is None
    assert space_problem(tmp_path / "link" / "deeper", 1) is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_found(tmp_path):
    tmp_path.chmod(0o500)
    assert "cannot be written to" in str(writable_problem(tmp_path / "x"))


def test_promise_27_a_header_that_could_not_be_written_is_written_with_the_next_row(tmp_path: Path) -> None:
    metrics = MetricsCsv(tmp_path / "run" / "metrics.csv")
    with pytest.raises(WriteError, match=r"metrics\.csv: the row of a step could not be written"):
        metrics.append(1, loss=0.5)
    metrics.path.parent.mkdir()
    metrics.append(2, loss=0.25)
    assert metrics.path.read_bytes() == b"step,loss\r\n2,0.25\r\n"


def test_promise_27_of_a_row_that_is_cut_off_by_a_full_disk_nothing_stays(tmp_path: Path) -> None:
    """RLIMIT_FSIZE cuts the second row in the middle, as a full disk would."""
    program = """
import resource, signal, sys
from pathlib import Path
from mu.atomic import WriteError
from mu.run_folder import MetricsCsv
metrics = MetricsCsv(Path(sys.argv[1]))
metrics.append(1, loss=0.5)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
try:
    metrics.append(2, loss=0.25)
except WriteError as error:
    assert "metrics.csv: the row of a step could not be written (File too large)" in str(error), error
else:
    raise SystemExit("not refused")
"""
    path = tmp_path / "metrics.csv"
    subprocess.run([sys.executable, "-c", program, str(path)], check=True)
    assert path.read_bytes() == b"step,loss\r\n1,0.5\r\n"
