"""One folder per run, never overwritten: config, log, metrics and the machine's environment.

Files are written whole or not at all (`mu.atomic`). Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import io
import itertools
import json
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import IO, cast

from mu import ranks
from mu.atomic import WriteError, write_atomically
from mu.config import Config, dump
from mu.errors import MuError
from mu.verbosity import console_level

_DISTRIBUTIONS = (
    "unlearn_diff",
    "torch",
    "pytorch-lightning",
    "transformers",
    "safetensors",
    "einops",
    "numpy",
    "pillow",
)
RESULT = "metrics.json"
"""What a run writes last into its folder."""
_LOG = "log.txt"
_ROOT_LOGGER = logging.getLogger("mu")
_LINE = logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S")


class RunFolderError(MuError, OSError):
    """A run folder cannot be made."""


class RunFolder:
    """The folder of one run. While it is open, what the package logs goes to its `log.txt` and to the console.

    with RunFolder.create("outputs/masks", "Noto") as run:
        run.save_config(config)
        run.metrics_csv.append(1, loss=0.5)
        run.save_json("metrics.json", {"loss": 0.5})
    """

    def __init__(self, path: Path, *, rank: int = 0) -> None:
        self.path = path
        self.logger = _ROOT_LOGGER
        self.metrics_csv = MetricsCsv(path / "metrics.csv", writes=rank == 0)
        self._rank = rank
        self._handlers: list[logging.Handler] = []
        self._level = _ROOT_LOGGER.level

    @classmethod
    def create(cls, output_dir: str | Path, name: str) -> RunFolder:
        """Makes `<output_dir>/<name>-<YYYYmmdd-HHMMSS>`, with `-2`, `-3`, ... after it while that is taken.

        Blanks in the name become underscores, so that its path can be copied into a command.

        Raises RunFolderError when the folder cannot be made, ValueError for a name that is not one folder's.
        """
        _check_name(name)
        stem = f"{name.replace(' ', '_')}-{time.strftime('%Y%m%d-%H%M%S')}"
        try:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            for number in itertools.count(1):
                path = Path(output_dir) / (stem if number == 1 else f"{stem}-{number}")
                try:
                    path.mkdir()  # exclusive: of two runs in one second, each gets its own
                    break
                except FileExistsError:
                    continue
        except OSError as error:
            raise _not_made(output_dir, error) from error
        run = cls(path)
        run._open_log()
        return run

    @classmethod
    def go_on(cls, output_dir: str | Path, name: str) -> RunFolder:
        """The folder `<output_dir>/<name>`, made where there is none; its log is continued.

        Raises as `create`, and RunFolderError where another process is at work in it.
        """
        _check_name(name)
        path = Path(output_dir) / name
        try:
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path)
            run._open_log()
        except BlockingIOError as error:
            raise RunFolderError(f"{path}: another process is at work in this run folder") from error
        except OSError as error:
            raise _not_made(output_dir, error) from error
        return run

    @classmethod
    def beside(cls, path: Path, rank: int) -> RunFolder:
        """The folder that the main process of a run has made, in another one: it writes `log-<rank>.txt` alone."""
        run = cls(path, rank=rank)
        run._open_log()
        return run

    def save_config(self, config: Config) -> Path:
        """Writes `config.yaml`, which the same command takes as `--config_path`."""
        path = self._save("config.yaml", dump(config).encode())
        self.logger.info("all settings: %s", path)
        return path

    def save_environment(self) -> Path:
        """Writes `environment.json`, see `environment`."""
        return self.save_json("environment.json", environment())

    def save_json(self, name: str, value: object) -> Path:
        """Writes a value as JSON, atomically. Raises ValueError for NaN or Inf, which JSON does not have."""
        try:
            text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        except ValueError as error:
            raise ValueError(f"{name}: NaN or Inf cannot be written as JSON") from error
        return self._save(name, f"{text}\n".encode())

    def _save(self, name: str, content: bytes) -> Path:
        return write_atomically(self.path / name, content) if self._rank == 0 else self.path / name

    def close(self) -> None:
        """Stops logging into this folder. May be called twice."""
        for handler in self._handlers:
            _ROOT_LOGGER.removeHandler(handler)
            handler.close()
        if self._handlers:
            _ROOT_LOGGER.setLevel(self._level)
        self._handlers.clear()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._log_end(error)
        self.close()

    def _log_end(self, error: BaseException) -> None:
        """What ended the run, with its traceback, into `log.txt` alone: the console hears of it from the caller."""
        text = f"ended by {type(error).__name__}: {error}"
        record = logging.makeLogRecord({"levelno": logging.ERROR, "levelname": "ERROR", "msg": text})
        record.exc_info = (type(error), error, error.__traceback__)
        for handler in self._handlers:
            if isinstance(handler, logging.FileHandler):
                handler.handle(record)

    def _open_log(self) -> None:
        name = f"log-{self._rank}.txt" if self._rank else _LOG
        log = logging.FileHandler(self.path / name, encoding="utf-8")
        try:
            _lock(cast(IO[str], log.stream))  # for as long as the log is open; also a kill lets go of it
        except BlockingIOError:
            log.close()
            raise
        self._handlers.append(log)
        # One console for a run within a run.
        if not any(isinstance(handler, ConsoleHandler) for handler in _ROOT_LOGGER.handlers):
            self._handlers.append(ConsoleHandler(console_level()))
        for handler in self._handlers:
            handler.setFormatter(_LINE)
            _ROOT_LOGGER.addHandler(handler)
        wanted = min(logging.INFO, console_level())  # log.txt has it all, however little the console says
        if _ROOT_LOGGER.getEffectiveLevel() > wanted:
            _ROOT_LOGGER.setLevel(wanted)


def shared_folder(make: Callable[[], RunFolder]) -> RunFolder:
    """The folder that `make` opens in the main process of a run; in the others, that folder `beside` it."""
    opened: list[RunFolder] = []

    def path_of_made() -> Path:
        opened.append(make())
        return opened[0].path

    path = ranks.on_main(path_of_made)
    return opened[0] if opened else RunFolder.beside(path, ranks.rank())


class MetricsCsv:
    """Rows `step, name, ...` of numbers. The first row sets the columns; each row is on disk when it is appended.

    A file that is there already is continued.

    Args:
        writes: false: nothing is appended, as in processes that are not the main one of their run.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path = path
        self._writes = writes
        self._columns: tuple[str, ...] | None = None

    def append(self, step: int, **values: float) -> None:
        """Adds a row; a column without a value stays blank.

        Raises:
            ValueError: a column that the file has not.
            WriteError: it could not be written; of a row that was cut off, nothing stays.
        """
        if not self._writes:
            return
        if self._columns is None and self.path.exists():
            with open(self.path, newline="", encoding="utf-8") as file:
                self._columns = tuple(next(csv.reader(file), ())) or None
        if self._columns is None:
            columns = ("step", *values)
            self._write(columns)
            self._columns = columns  # only now: where it could not be written, the next row tries again
        unknown = sorted(set(values) - set(self._columns))
        if unknown:
            raise ValueError(
                f"{self.path.name} has no column {', '.join(unknown)}; it has {', '.join(self._columns)}"
            )
        row = {"step": step, **values}
        self._write([row.get(column, "") for column in self._columns])

    def read(self) -> list[dict[str, str]]:
        """The rows that are there, as text."""
        if not self.path.exists():
            return []
        with open(self.path, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def _write(self, row: Iterable[object]) -> None:
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "ab") as file:
                file.write(csv_bytes([row]))
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)
            raise WriteError(
                f"{self.path}: the row of a step could not be written ({error.strerror or error}); free some space, "
                "then go on with the run"
            ) from error


def csv_bytes(rows: Iterable[Iterable[object]]) -> bytes:
    """Rows as `MetricsCsv` writes them."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


class ConsoleHandler(logging.Handler):
    """Log lines to stderr, above the progress bars that are open."""

    def emit(self, record: logging.LogRecord) -> None:
        if sys.stderr is None:  # a program without a console; print and tqdm would take stdout
            return
        line = self.format(record)
        tqdm = sys.modules.get("tqdm")
        if tqdm is None:
            print(line, file=sys.stderr, flush=True)
        else:
            tqdm.tqdm.write(line, file=sys.stderr)


def environment() -> dict[str, object]:
    """Versions and kind of machine, as far as they may change a result; no host or user name, no variables."""
    versions: dict[str, str | None] = {}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    result: dict[str, object] = {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        "packages": versions,
    }
    torch = sys.modules.get("torch")  # only described where the run has loaded it
    if torch is not None:
        result["torch"] = {
            "version": torch.__version__,
            "cuda": torch.version.cuda,
            "threads": torch.get_num_threads(),
            "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        }
    return result


def is_finished(run: Path) -> bool:
    """Whether the run of a folder came to its end."""
    return (run / RESULT).exists()


def is_running(run: Path) -> bool:
    """Whether a process is at work in a run folder."""
    try:
        with open(run / _LOG, encoding="utf-8") as log:
            _lock(log)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def _lock(file: IO[str]) -> None:
    """Lock an open file until it is closed. Raises BlockingIOError where another process holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):  # a file system without locks
            raise


def _check_name(name: str) -> None:
    if name != Path(name).name or name in ("", ".", ".."):
        raise ValueError(f"{name!r} cannot be part of a run folder's name")


def _not_made(output_dir: str | Path, error: OSError) -> RunFolderError:
    return RunFolderError(f"output_dir: no run folder can be made in {output_dir} ({error.strerror})")


def writable_problem(folder: str | Path) -> str | None:
    """Why nothing could be written into `folder` (which need not exist yet), or None."""
    place = _nearest_existing(Path(folder))
    if place.is_symlink() and not place.exists():
        return f"{place} is a link to {os.readlink(place)}, which is not there; make that folder, or mend the link"
    if not place.is_dir():
        return f"{place} is a file, not a folder"
    if not os.access(place, os.W_OK | os.X_OK):
        return f"{place} cannot be written to; choose another folder or change its permissions"
    return None


def space_problem(folder: str | Path, needed_bytes: int) -> str | None:
    """Why `needed_bytes` do not fit on the disk of `folder` (which need not exist yet), or None."""
    free = shutil.disk_usage(_nearest_existing(Path(folder).resolve())).free
    if free >= needed_bytes:
        return None
    return f"{needed_bytes / 1e6:.0f} MB are needed and {free / 1e6:.0f} MB free; choose another disk or make room"


def _nearest_existing(folder: Path) -> Path:
    folder = folder.absolute()
    while not os.path.lexists(folder):
        folder = folder.parent
    return folder
