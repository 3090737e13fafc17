"""Text that may be shown to strangers: home folders, names of user and machine, keys and tokens are taken out."""

from __future__ import annotations

import getpass
import os
import platform
import re
from pathlib import Path

HIDDEN = "[removed]"
_SECRET_NAME = re.compile(
    r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|_KEY$|^KEY$|AUTH", re.I
)
_SHORTEST = 6
"""Characters of a variable's value from which on it is looked for; shorter ones stand in ordinary words too."""
_WORD = r"[^\s'\",;&<>]+"
_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    # user:password@ and ?query of URLs
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/@'\"]+@", re.I), rf"\1{HIDDEN}@"),
    (re.compile(r"(\bhttps?://[^\s?'\"]+\?)[^\s'\"]+", re.I), rf"\1{HIDDEN}"),
    (re.compile(rf"\b(bearer|basic)\s+{_WORD}", re.I), rf"\1 {HIDDEN}"),
    # a name that says what its value is: api_key: x, "HF_TOKEN": "x", --password=x
    (
        re.compile(
            rf"([\w-]*(?:token|secret|password|passwd|api_?key|access_?key|private_?key|credential)[\w-]*['\"]?\s*[:=]\s*['\"]?){_WORD}",
            re.I,
        ),
        rf"\1{HIDDEN}",
    ),
    # forms of well-known keys: Hugging Face, OpenAI and its kin, GitHub, GitLab, Slack, AWS, Google, JWT
    (
        re.compile(
            r"\b(?:hf_|sk-|gh[pousr]_|github_pat_|glpat-|xox[abprs]-|AKIA|ASIA|AIza|ya29\.)[\w.-]{10,}"
        ),
        HIDDEN,
    ),
    (re.compile(r"\beyJ[\w-]{10,}\.[\w-]+\.[\w-]*"), HIDDEN),
    (
        re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.S),
        HIDDEN,
    ),
    # 40 hexadecimal digits: a key of Weights & Biases. A SHA-256 has 64 and stays.
    (re.compile(r"(?<![0-9a-fA-F])[0-9a-fA-F]{40}(?![0-9a-fA-F])"), HIDDEN),
    (re.compile(r"(?:/home/|/Users/|[A-Z]:\\Users\\)[^/\\\s'\":]+"), "~"),
)


def redacted(text: str) -> str:
    """`text` without what should stay on this machine.

    Taken out are values of environment variables whose names speak of a secret, keys and tokens of well-known forms,
    values that are called one, logins and queries of URLs, home folders, and the names of user and machine.
    """
    secrets = {
        value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= _SHORTEST
    }
    for value in sorted(secrets, key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    for pattern, by in _PATTERNS[:-1]:
        text = pattern.sub(by, text)
    home = str(Path.home())
    if len(home) > 1:
        text = re.sub(rf"(?<![\w.-]){re.escape(home)}(?![\w.-])", "~", text)
    pattern, by = _PATTERNS[-1]
    text = pattern.sub(by, text)
    for name in (_user(), platform.node()):
        if len(name) > 2 and name != "root":
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", HIDDEN, text)
    return text


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # no name for this user id, as in some containers
        return ""
