"""Rows (image, prompt, concept) of a data set, divided into what is forgotten and what is retained.

Every data set ends in one `ForgetRetain`; what reads it does not know where the images came from. Nothing here
imports torch.
"""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mu.atomic import write_atomically
from mu.config_names import folded, nearest
from mu.errors import MuError

TEMPLATES = ("style", "object")
LISTED_PROBLEMS = 10
_LABEL_BYTES = 120


class DataError(MuError, ValueError):
    """A data set that cannot be used as asked: the message says what was found and what to do."""


@dataclass(frozen=True)
class Row:
    """One image with its prompt.

    `relative` is the image's path below the data set's own folder, with forward slashes. It names the image in
    random streams and caches, so that neither depends on where the data set lies on this machine.
    """

    image: Path
    relative: str
    prompt: str
    style: str
    object: str
    concept: str
    substitute_prompt: str | None = None

    @property
    def key(self) -> str:
        """Stable name of this row in random streams."""
        return f"{self.relative}|{self.prompt}"


@dataclass(frozen=True)
class ForgetRetain:
    """The rows to forget (each with its substitute prompt) and those to retain.

    `notes` say what of the input is no row: how much of it, and the first. A run logs them once.
    """

    forget: tuple[Row, ...]
    retain: tuple[Row, ...]
    notes: tuple[str, ...] = ()


def concept_names(value: str | Sequence[str]) -> tuple[str, ...]:
    """The forgotten concepts, one or several."""
    return (value,) if isinstance(value, str) else tuple(value)


def concept_label(value: str | Sequence[str]) -> str:
    """The forgotten concepts in one word, for names of folders: `Noto`, `Noto+Blob`, or shortened."""
    names = concept_names(value)
    label = "+".join(names)
    if len(names) == 1 or len(label.encode()) <= _LABEL_BYTES:
        return label
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:8]
    return f"{names[0]}+{len(names) - 1}_more-{digest}"


def concept_words(kind: str, value: str | Sequence[str]) -> str:
    """The forgotten concepts in a sentence: `the style Noto`, `the objects Cats and Dogs`, `the prompt 'a dog'`."""
    names = [repr(name) if kind == "prompt" else name.replace("_", " ") for name in concept_names(value)]
    joined = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    kind = "category" if kind == "i2p" else kind
    several = f"{kind[:-1]}ies" if kind.endswith("y") else f"{kind}s"
    return f"the {kind if len(names) == 1 else several} {joined}"


def next_kept(name: str, names: Sequence[str], forgotten: Sequence[str]) -> str | None:
    """The first name after `name`, round the list, that is not forgotten; None when all are."""
    place = names.index(name)
    following = (*names[place + 1 :], *names[:place])
    return next((other for other in following if other not in forgotten), None)


def check_choice(key: str, value: str, allowed: Sequence[str]) -> None:
    """Raises DataError naming `key`, what is allowed and the nearest valid name, unless `value` is allowed."""
    if value not in allowed:
        listed = ", ".join(allowed) or "none"
        raise DataError(f"{key}: {value!r} is not one of: {listed}.{nearest(value, allowed)}")


def check_folder_names(key: str, names: Sequence[str]) -> None:
    """Raises DataError unless `names` are distinct and each can be one folder's name that stays in its folder."""
    if not names:
        raise DataError(f"{key}: the list is empty; name at least one.")
    for name in names:
        if not re.fullmatch(r"[^\W_][\w .,()&'+-]{0,99}", name) or name[-1] in " .":
            raise DataError(
                f"{key}: {name!r} cannot name a folder. Use letters, digits, spaces and _ - . , ( ) & ' +, "
                "beginning with a letter or digit, at most 100."
            )
    # A file system may not tell capitals from small letters: two such styles would share their images.
    lower = [name.casefold() for name in names]
    twice = sorted({name for name in names if lower.count(name.casefold()) > 1})
    if twice:
        raise DataError(f"{key}: named more than once: {', '.join(twice)}.")


def natural_key(name: str) -> tuple[tuple[object, ...], str]:
    """Sorts 2.jpg before 10.jpg."""
    parts = re.split(r"([0-9]+)", name)
    return tuple(int(part) if part.isdecimal() else part for part in parts), name


def fill_substitute(prompt: str, *, style: str, object: str) -> str:
    """The substitute prompt with `{style}` and `{object}` replaced; underscores are read as spaces."""
    words = {"style": style.replace("_", " "), "object": object.replace("_", " ")}
    return prompt.format(**words)


def choose_substitute(
    value: str | None,
    *,
    template: str,
    target: str | Sequence[str],
    allowed: Sequence[str],
    default: str | None,
) -> tuple[str | None, str | None]:
    """What stands in for the forgotten concepts: (name, None) or (None, prompt with placeholders).

    value: another name of the template's kind (one of `allowed`), or a whole prompt: text with a space in it or
    a placeholder `{object}` / `{style}`. None takes `default`. Raises DataError for an unknown name, a
    placeholder that would bring the forgotten concept back, and for a target itself.
    """
    targets = concept_names(target)
    said = ", ".join(repr(name) for name in targets)
    if value is None:
        if default is None or default in targets:
            only = f"{said} is the only {template}" if len(targets) == 1 else f"{said} are all {template}s"
            raise DataError(
                f"substitute: {only} here, so there is no other to stand in for it. "
                f"Set substitute to another {template} or to a whole prompt."
            )
        return default, None
    by_name = {folded(name): name for name in (*allowed, *targets)}
    name = by_name.get(folded(value))
    if name in targets:
        which = f"the {template}" if len(targets) == 1 else f"one of the {template}s"
        raise DataError(f"substitute: {value!r} is {which} to forget; choose another {template}.")
    if name is not None:
        return name, None
    if "{" not in value and "}" not in value and not re.search(r"\s", value.strip()):
        raise DataError(
            f"substitute: {value!r} is no {template} of this data set: {', '.join(allowed)}."
            f"{nearest(value, allowed)} (A whole prompt is also accepted; it contains a space.)"
        )
    if not value.isprintable():
        raise DataError(f"substitute: {value!r} contains a line break or control character.")
    try:
        fields = list(string.Formatter().parse(value))
    except ValueError as error:
        raise DataError(f"substitute: {value!r} is not a prompt: {error}.") from error
    for _, field, spec, conversion in fields:
        if field is None:
            continue
        if field not in TEMPLATES or spec or conversion:
            raise DataError(
                f"substitute: {value!r} may only contain the placeholders {{object}} and {{style}}."
            )
        if field == template:
            raise DataError(
                f"substitute: {{{template}}} in {value!r} stands for {said}, which is to be forgotten; "
                f"write another {template} there."
            )
    return None, value


def check_whole_prompt(key: str, value: str, forgotten: Sequence[str] = ()) -> None:
    """Raises DataError unless `value` can be used as a prompt just as it is, and is not a forgotten concept's name."""
    if not value.isprintable() or not value.strip():
        raise DataError(f"{key}: {value!r} is blank, or contains a line break or control character.")
    if "{" in value or "}" in value:
        raise DataError(
            f"{key}: {value!r} has a placeholder, but this data set knows no styles and objects; write a whole prompt."
        )
    if folded(value) in {folded(name) for name in forgotten}:
        raise DataError(f"{key}: {value!r} is to be forgotten; write a prompt of what is wanted instead.")


def check_substitutes(rows: Sequence[Row], *, key: str = "substitute") -> None:
    """Raises DataError if a substitute prompt is itself one of the prompts to forget.

    Args:
        key: the config's key that gives the substitute, for messages.
    """
    forgotten = {same_words(row.prompt) for row in rows}
    for row in rows:
        if row.substitute_prompt is None:
            raise DataError(f"{row.relative}: a row to forget needs a substitute prompt.")
        if same_words(row.substitute_prompt) in forgotten:
            raise DataError(f"{key}: {row.substitute_prompt!r} is one of the prompts to forget.")


def check_apart(rows: ForgetRetain) -> None:
    """Raises DataError if an image or a prompt to forget is also one to retain."""
    images = {row.image for row in rows.forget}
    prompts = {same_words(row.prompt) for row in rows.forget}
    for row in rows.retain:
        if row.image in images:
            raise DataError(f"{row.image}: this image is to be forgotten and to be retained.")
        if same_words(row.prompt) in prompts:
            raise DataError(
                f"{row.prompt!r} is a prompt to forget and, of {row.image}, one to retain; give them different prompts."
            )


def same_words(prompt: str) -> str:
    """The prompt without what text encoders do not see: capitals, and how words are spaced."""
    return " ".join(prompt.casefold().split())


def same_name(one: str, other: str) -> bool:
    """Whether two names are the same but for capitals, blanks, dashes and underscores."""
    return folded(one) == folded(other)


def raise_problems(problems: Sequence[str], *, what: str, advice: str) -> None:
    """Raises one DataError for all problems, of which the first few are listed; nothing when there are none."""
    if not problems:
        return
    listed = "".join(f"\n  {problem}" for problem in problems[:LISTED_PROBLEMS])
    more = len(problems) - LISTED_PROBLEMS
    rest = f"\n  and {more} more" if more > 0 else ""
    raise DataError(f"{len(problems)} {what}:{listed}{rest}\n{advice}")


def passed_over(found: Sequence[str], what: str, *, advice: str = "") -> list[str]:
    """One sentence on all that is left out, with its number and the first of it; none when nothing is.

    Args:
        what: the kind of it, in the plural.
    """
    if not found:
        return []
    return [f"{what}: {len(found)} passed over, the first is {found[0]}{f'; {advice}' if advice else ''}"]


def write_index_files(rows: Sequence[Row], folder: Path) -> None:
    """Writes images.txt, prompts.txt and, for rows to forget, substitutes.txt: one a line, in the same order."""
    columns = {"images.txt": [str(row.image) for row in rows], "prompts.txt": [row.prompt for row in rows]}
    if any(row.substitute_prompt is not None for row in rows):
        columns["substitutes.txt"] = [row.substitute_prompt or "" for row in rows]
    for name, lines in columns.items():
        broken = [line for line in lines if len(line.splitlines()) > 1]
        if broken:
            raise DataError(f"{name} holds one entry a line; this one contains a line break: {broken[0]!r}.")
        write_atomically(folder / name, "".join(f"{line}\n" for line in lines).encode())
