"""A checkpoint that cannot be looked at is a mistake in its key, and no error of the system."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mu.config_file import ConfigFileError, find_config
from mu.unlearning.find_checkpoint import checkpoint_problems


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[Path]:
    """A folder that this process may not look into, as root too."""
    folder = tmp_path / "closed"
    folder.mkdir(mode=0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield folder
    os.seteuid(user)


@pytest.mark.parametrize("path", ["x" * 300, "mu/" + "x" * 300, "x" * 300 + "/model.ckpt"])
def test_a_name_that_is_too_long_is_that_of_no_file(path: str) -> None:
    ((keys, message),) = checkpoint_problems("ckpt_path", path)
    assert keys == ("ckpt_path",)
    assert message.startswith(f"there is no file {path}; ")


def test_a_link_to_nowhere_is_called_one(tmp_path: Path) -> None:
    link = tmp_path / "model.ckpt"
    link.symlink_to(tmp_path / "gone.ckpt")
    ((_, message),) = checkpoint_problems("ckpt_path", str(link))
    assert message.startswith(f"{link} is a link to {tmp_path / 'gone.ckpt'}, which is not there; ")


def test_a_folder_that_may_not_be_read_has_no_model(closed: Path) -> None:
    for path in (closed, closed / "model.ckpt"):
        assert len(list(checkpoint_problems("ckpt_path", str(path)))) == 1


def test_a_config_in_a_folder_that_may_not_be_read_is_no_file(closed: Path) -> None:
    with pytest.raises(ConfigFileError, match=r"there is no file '.*closed/train\.yaml'"):
        find_config(closed / "train.yaml")
