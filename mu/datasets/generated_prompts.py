"""Images of free prompts, sampled from the model itself: as SalUn's authors made theirs for nudity.

They lie at `<folder>/generated_prompts/<model>-<settings>/<prompt>-<hash>/<seed>.png`, are kept, and serve every run
that asks for the same prompt. `mu.datasets.generated` samples them. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from mu.datasets.index import ForgetRetain, Row, check_apart, check_substitutes, check_whole_prompt
from mu.datasets.seeds import TRAINING_SEED_BASE

SUBFOLDER = "generated_prompts"
PROMPT = "{prompt}"
"""How the manifest says that each image has a prompt of its own."""


def plan_rows(
    images: Path,
    *,
    forget_prompts: Sequence[str],
    retain_prompts: Sequence[str],
    concept: str,
    substitute: str,
    images_per_prompt: int,
    retain_images_per_prompt: int,
) -> ForgetRetain:
    """Rows to forget and to retain, whether their images exist or not.

    Args:
        images: the folder of the prompts' folders, `GeneratedImages.path`.
        concept: what the forgotten prompts have in common, in a word.
        substitute: the prompt whose prediction takes the place of the forgotten ones.

    Raises:
        DataError: a prompt is blank, or to be forgotten and to be retained, or the substitute is to be forgotten.
    """
    check_whole_prompt("substitute", substitute, (concept,))
    rows = ForgetRetain(
        prompt_rows(
            images,
            forget_prompts,
            images_per_prompt,
            concept=concept,
            substitute=substitute,
            key="forget_prompts",
        ),
        prompt_rows(images, retain_prompts, retain_images_per_prompt, concept="retain", key="retain_prompts"),
    )
    check_substitutes(rows.forget)
    check_apart(rows)
    return rows


def prompt_rows(
    images: Path,
    prompts: Sequence[str],
    count: int,
    *,
    concept: str,
    key: str,
    substitute: str | None = None,
) -> tuple[Row, ...]:
    """`count` images of each prompt, with the seeds TRAINING_SEED_BASE, TRAINING_SEED_BASE + 1, ..."""
    rows = []
    for prompt in prompts:
        check_whole_prompt(key, prompt)
        for number in range(count):
            relative = f"{_folder_name(prompt)}/{TRAINING_SEED_BASE + number}.png"
            rows.append(Row(images / relative, relative, prompt, "", prompt, concept, substitute))
    return tuple(rows)


def _folder_name(prompt: str) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", prompt.casefold()).strip("-")[:40].strip("-")
    return f"{words}-{hashlib.sha256(prompt.encode()).hexdigest()[:12]}".lstrip("-")
