"""Files of the Hugging Face hub at one commit, with the hashes that the hub gives."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mu.commands.archive import ArchiveError
from mu.commands.fetch import fetch, forget
from mu.commands.files import DownloadError, require_disk
from mu.commands.sources import OTHER_SOURCE, Hub
from mu.datasets.index import natural_key

_CONNECTIONS = 8
_NOT_DATA = ("README.md", ".gitattributes", ".gitignore", "LICENSE")


@dataclass(frozen=True)
class HubFile:
    """A file of a repository at one commit. `sha256` is known for large files, `git_sha1` for the others."""

    name: str
    url: str
    size: int | None
    sha256: str | None
    git_sha1: str | None


def hub_files(hub: Hub, revision: str | None) -> tuple[str, list[HubFile], dict[str, str]]:
    """Asks the hub: the commit that `revision` stands for, its wanted files, and headers to fetch them with.

    HF_ENDPOINT names another host, HF_TOKEN a token, HF_HUB_OFFLINE=1 keeps it from asking. Raises DownloadError.
    """
    import huggingface_hub
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    endpoint = os.environ.get("HF_ENDPOINT") or None
    # Failed connections are errors of the HTTP library beneath, which is httpx in one release, another in the next.
    failures: tuple[type[Exception], ...] = (
        OSError,
        *(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)),
    )
    try:
        info: Any = huggingface_hub.HfApi(endpoint=endpoint).repo_info(
            hub.repo, repo_type=hub.repo_type, revision=revision, files_metadata=True, timeout=30
        )
    except RevisionNotFoundError as error:
        raise DownloadError(
            f"{hub.text} has no revision {revision!r}; leave out --revision, or see its page"
        ) from error
    except RepositoryNotFoundError as error:
        raise DownloadError(f"{hub.text} is not there any more, or not public. {OTHER_SOURCE}") from error
    except HFValidationError as error:
        raise DownloadError(f"{hub.text} at revision {revision!r}: {error}") from error
    except failures as error:
        raise DownloadError(
            f"{hub.text}: the hub cannot be asked ({first_line(error)}). {OTHER_SOURCE}"
        ) from error
    names = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    if hub.file is not None and hub.file not in names:
        listed = ", ".join(sorted(names)[:8]) or "nothing"
        raise DownloadError(f"{hub.text} is not in the repository, which holds {listed}. {OTHER_SOURCE}")
    wanted = [hub.file] if hub.file is not None else sorted(set(names) - set(_NOT_DATA), key=natural_key)
    if not wanted or not info.sha:
        raise DownloadError(f"{hub.text}: the repository is empty. {OTHER_SOURCE}")
    files = []
    for name in wanted:
        if name.startswith("/") or ".." in name.split("/") or "\\" in name:
            raise ArchiveError(f"{hub.text}: the file name {name!r} leads out of its folder")
        url = huggingface_hub.hf_hub_url(
            hub.repo, name, repo_type=hub.repo_type, revision=info.sha, endpoint=endpoint
        )
        lfs, size = names[name].lfs, names[name].size
        files.append(
            HubFile(name, url, size, lfs.sha256 if lfs else None, None if lfs else names[name].blob_id)
        )
    token = huggingface_hub.get_token()
    sent = {"Authorization": f"Bearer {token}"} if token else {}
    return info.sha, files, sent


def fetch_hub(
    hub: Hub, revision: str | None, folder: Path, *, progress: bool
) -> tuple[str, list[tuple[Path, str]]]:
    """Fetches a repository's wanted files into `folder`: (commit, [(path, name in the repository)]).

    Every file's hash is compared with what the hub says of that commit. Raises DownloadError.
    """
    commit, files, headers = hub_files(hub, revision)
    require_disk(folder, sum(file.size or 0 for file in files), what=hub.text)

    def one(file: HubFile) -> tuple[Path, str]:
        target = folder / commit / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        bar = progress and len(files) == 1
        fetch(file.url, target, sha256=file.sha256, headers=headers, progress=bar)
        if file.git_sha1 is not None and git_sha1(target) != file.git_sha1:
            forget(target)
            raise DownloadError(
                f"{hub.text}: {file.name} is not what the hub says it is (its git hash differs)"
            )
        return target, file.name

    if len(files) == 1:
        return commit, [one(files[0])]
    pool = ThreadPoolExecutor(_CONNECTIONS)
    try:
        results = pool.map(one, files)
        return commit, list(tqdm(results, "files", total=len(files), disable=not progress))
    finally:
        pool.shutdown(cancel_futures=True)


def git_sha1(path: Path) -> str:
    """The name that git gives to a file's content."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its kind's name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
