"""Machine unlearning for latent diffusion models.

Importing this package loads nothing else: models, data sets and methods are imported from their own modules, and by
`forget` when it is called.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mu.forgetting.answer import Forgotten

__version__ = "0.1.0"


def forget(
    *what: str,
    ckpt_path: str | os.PathLike[str] | None = None,
    instead: str | None = None,
    keep: str | Sequence[str] | None = None,
    **keys: Any,
) -> Forgotten:
    """Make a model forget a style, an object or a prompt, and look at what it forgot and kept.

    mu.forget("Noto")
    mu.forget("Van Gogh", kind="style", ckpt_path="sd-v1-4.ckpt", neighbours=["Claude Monet"]).checkpoint

    The same call again goes on where the first one stopped.

    Args:
        what: as one says it; several of one kind together.
        ckpt_path: the model; None: the small one that comes with the package.
        instead: what is given in its place.
        keep: prompts that must stay, or files of them.
        keys: the others of `unlearn_diff forget --help`, such as kind, method, neighbours, images, devices, output_dir.

    Returns:
        Paths and numbers; printed, it is the answer in words.

    Raises:
        ConfigError: a key is wrong; the message lists all mistakes.
        MuError: the model cannot be used, or a stage failed; the message says why.
    """
    from mu.config import load_config
    from mu.forgetting.config import ForgetConfig
    from mu.forgetting.forget import forget as run

    given = {"what": what, "ckpt_path": ckpt_path, "instead": instead, "keep": keep, **keys}
    given = {key: value for key, value in given.items() if value is not None}
    return run(load_config(ForgetConfig, overrides=given, on_disk=True))
