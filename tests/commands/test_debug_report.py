"""The debug report: what a bug report needs, and nothing that is nobody's business."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from mu.commands import debug_report
from mu.commands.redaction import HIDDEN, redacted
from mu.run_folder import RunFolder

SECRETS = {
    "HF_TOKEN": "hf_" + "aB3" * 11,
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "MY_PASSWORD": "correct horse battery",
    "UNRELATED": "visible only as a variable",
}


def fail(folder: RunFolder) -> None:
    with folder:
        for number in range(200):
            folder.logger.info("line %d", number)
        folder.logger.info("keys %s, %s and %s", *list(SECRETS.values())[:3])
        raise ZeroDivisionError("so it ended")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that failed, on a machine with secrets; its log holds some."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "somebody"))
    folder = RunFolder.create(tmp_path, "style-Noto")
    (folder.path / "config.yaml").write_text(f"ckpt_path: {Path.home()}/model.ckpt\nlr: 1.0e-05\n")
    with pytest.raises(ZeroDivisionError):
        fail(folder)
    return folder.path


def test_a_report_has_versions_config_and_the_end_of_the_log(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert debug_report.main([str(run), "--lines", "50"]) == 0
    text = capsys.readouterr().out
    for expected in ('"torch": "', "ckpt_path: ~/model.ckpt", "lr: 1.0e-05", "log.txt", "line 199"):
        assert expected in text
    assert "line 100" not in text
    assert "ended by ZeroDivisionError: so it ended" in text
    assert "test_debug_report.py" in text  # the traceback is in the log


def test_promise_26_a_report_shows_no_secret(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.md"
    assert debug_report.main([str(run), "--output", str(path)]) == 0
    text = path.read_text()
    assert [value for value in SECRETS.values() if value in text] == []
    assert str(Path.home()) not in text
    assert text.count(HIDDEN) >= 3


def test_a_tilde_is_the_home_folder(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(run.parent))
    assert debug_report.main([f"~/{run.name}", "--output=~/report.md"]) == 0
    assert "lr: 1.0e-05" in (run.parent / "report.md").read_text()


def test_a_path_that_no_file_can_have_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        debug_report.main(["x" * 300])
    told = capsys.readouterr().err
    assert "cannot be looked for (File name too long)" in told
    assert "x" * 100 not in told


def test_what_is_no_run_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert debug_report.main([str(tmp_path / "absent")]) == 1
    assert "there is no such folder" in capsys.readouterr().err
    assert debug_report.main([str(tmp_path)]) == 1
    assert "is not the folder of a run" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        debug_report.main(["--lines", "0"])
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pass@host/x?sig=abc&y=1", f"https://{HIDDEN}@host/x?{HIDDEN}"),
        ("Authorization: Bearer abc.def", f"Authorization: Bearer {HIDDEN}"),
        ("api_key=abc lr=0.5", f"api_key={HIDDEN} lr=0.5"),
        ('{"hf_token": "abc"}', f'{{"hf_token": "{HIDDEN}"}}'),
        ("hf_abcdefghijklmnop.", HIDDEN),
        ("ghp_abcdefghijklmnop", HIDDEN),
        ("AKIAABCDEFGHIJKLMNOP", HIDDEN),
        ("a" * 40, HIDDEN),
        ("sha256:" + "a" * 64, "sha256:" + "a" * 64),
        ("/home/jane/x.ckpt and /Users/jane/y", "~/x.ckpt and ~/y"),
        ("C:\\Users\\jane\\x", "~\\x"),
        ("/data/model.ckpt lr: 1e-05 concept: Van_Gogh", "/data/model.ckpt lr: 1e-05 concept: Van_Gogh"),
    ],
)
def test_what_is_taken_out_of_a_text(text: str, shown: str) -> None:
    assert redacted(text) == shown


def test_the_log_of_a_run_tells_how_it_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the file alone: the console hears of it from the command."""
    folder = RunFolder.create(tmp_path, "run")

    def interrupted() -> None:
        with folder:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "ERROR ended by KeyboardInterrupt" in (folder.path / "log.txt").read_text()
    assert capsys.readouterr().err == ""
    assert logging.getLogger("mu").handlers == []
