"""Files of the Hugging Face hub at one commit, held to the hashes that the hub gives."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mu.commands.archive import proper_name
from mu.commands.fetch import discard, fetch
from mu.commands.files import DownloadError, require_disk
from mu.commands.sources import OTHER_SOURCE, Hub
from mu.errors import first_line

LARGE_BYTES = 64 << 20
"""Files from here on are fetched by `fetch`: the hub's own library begins a large file anew when it was cut off."""
_NOT_DATA = ("README.md", ".gitattributes", ".gitignore", "LICENSE")


def fetch_hub(
    hub: Hub, revision: str | None, folder: Path, *, progress: bool
) -> tuple[str, list[tuple[Path, str]]]:
    """Fetches a repository's wanted files into `folder`: (commit, [(path, name in the repository)]).

    HF_ENDPOINT names another host, HF_TOKEN a token, HF_HUB_OFFLINE=1 keeps it from asking. Raises DownloadError.
    """
    import huggingface_hub

    # 1. The commit, and its files.
    place: dict[str, Any] = {"repo_id": hub.repo, "repo_type": hub.repo_type}
    api = huggingface_hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
    with _errors_told(hub, revision, "the hub cannot be asked"):
        info: Any = api.repo_info(**place, revision=revision, files_metadata=True, timeout=30)
    place["revision"] = info.sha
    listed = {file.rfilename: file for file in info.siblings or ()}
    if hub.file is not None and hub.file not in listed:
        names = ", ".join(sorted(listed)[:8]) or "nothing"
        raise DownloadError(f"{hub.text} is not in the repository, which holds {names}. {OTHER_SOURCE}")
    wanted = [hub.file] if hub.file is not None else sorted(listed.keys() - set(_NOT_DATA))
    if not wanted:
        raise DownloadError(f"{hub.text}: the repository is empty. {OTHER_SOURCE}")
    for name in wanted:
        proper_name(hub.text, name)
    require_disk(folder, sum(listed[name].size or 0 for name in wanted), what=hub.text)

    # 2. Large files go on where they were cut; of the small ones, those that are whole already stay.
    local = folder / info.sha
    local.mkdir(exist_ok=True)
    token = huggingface_hub.get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    large = [name for name in wanted if (listed[name].size or 0) >= LARGE_BYTES]
    for name in large:
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        url = huggingface_hub.hf_hub_url(
            hub.repo, name, repo_type=hub.repo_type, revision=info.sha, endpoint=api.endpoint
        )
        sha256 = listed[name].lfs.sha256 if listed[name].lfs else None
        fetch(url, local / name, sha256=sha256, headers=headers, progress=progress)
    if len(large) < len(wanted):
        with _errors_told(hub, revision, "the download stopped; run the command again to go on"):
            huggingface_hub.snapshot_download(
                **place, local_dir=local, endpoint=api.endpoint,
                allow_patterns=hub.file, ignore_patterns=[*_NOT_DATA, *map(glob.escape, large)],
                tqdm_class=None if progress else _silent_bar(),
            )  # fmt: skip

    # 3. Every file's hash is compared with what the hub says of that commit.
    with _errors_told(hub, revision, "the hub cannot be asked"):
        verified = api.verify_repo_checksums(**place, local_dir=local)
    wrong = [file for file in verified.mismatches if file["path"] in wanted]
    for file in wrong:
        discard(local / file["path"])
    if wrong:
        raise DownloadError(
            f"{hub.text}: the {wrong[0]['algorithm']} of {wrong[0]['path']} is {wrong[0]['actual']}, and should be "
            f"{wrong[0]['expected']}. It was not kept. Try again."
        )
    if missing := sorted(set(wanted) & set(verified.missing_paths)):
        raise DownloadError(
            f"{hub.text}: {len(missing)} files did not come, {missing[0]} among them. Try again."
        )
    return info.sha, [(local / name, name) for name in wanted]


def _silent_bar() -> Any:
    from huggingface_hub.utils.tqdm import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **{**more, "disable": True})

    return Silent


@contextmanager
def _errors_told(hub: Hub, revision: str | None, what: str) -> Iterator[None]:
    from huggingface_hub import errors

    # Xet, where the hub keeps large files, raises RuntimeError and kinds of OSError from its Rust library. Failed
    # connections are errors of the HTTP library beneath, which is httpx in one release, another in the next.
    http = [base for base in errors.HfHubHTTPError.__bases__ if issubclass(base, Exception)]
    failures: tuple[type[Exception], ...] = (OSError, RuntimeError, *http)
    try:
        yield
    except errors.RevisionNotFoundError as error:
        raise DownloadError(
            f"{hub.text} has no revision {revision!r}; leave out --revision, or see its page"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise DownloadError(f"{hub.text} is not there any more, or not public. {OTHER_SOURCE}") from error
    except errors.HFValidationError as error:
        raise DownloadError(f"{hub.text} at revision {revision!r}: {error}") from error
    except failures as error:
        raise DownloadError(f"{hub.text}: {what} ({first_line(error)}). {OTHER_SOURCE}") from error
