"""A download that is killed at random moments, while bytes come in, are checked, unpacked and put in place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.commands.conftest import noise, zip_bytes
from tests.forked_commands import Commands
from tests.kills import Found, assert_kills_change_nothing, contents

FILES = {f"{style}/Cats/{number}.jpg": noise(60_000, number) for style in ("Cubism", "Seed_Images")
         for number in range(20)}  # fmt: skip


@pytest.mark.parametrize("kills", [4, pytest.param(100, marks=pytest.mark.slow)])
def test_promise_08_a_download_killed_at_random_goes_on(
    server: Any, commands: Commands, tmp_path: Path, kills: int
) -> None:
    (tmp_path / "made").mkdir()
    url = server.put("x.zip", zip_bytes(tmp_path / "made", FILES))
    folder = tmp_path / "out"
    arguments = ["sample", "quick_canvas", "--url", url, "--output_dir", str(folder / "sample")]

    def found(folder: Path) -> Found:
        files = contents(folder, "sample/**/*")
        record = folder / "sample.download.json"
        if record.exists() and json.loads(record.read_text())["whole"]:
            files["record"] = record.read_bytes()
        return files

    assert_kills_change_nothing(
        commands,
        "mu.commands.download_data",
        lambda: arguments,
        folder=folder,
        found=found,
        kills=kills,
        seed=5,
    )
    assert found(folder) == {f"sample/{name}": body for name, body in FILES.items()} | {
        "record": (folder / "sample.download.json").read_bytes()
    }
    print(sorted(int(wanted[6:-1]) for _, wanted in server.requests if wanted is not None))
