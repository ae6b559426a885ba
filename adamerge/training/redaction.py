"""Redaction: settings and command lines without what looks like a secret, by its key or by its shape."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
from detect_secrets.plugins.base import RegexBasedDetector
from detect_secrets.plugins.ip_public import IPPublicDetector
from detect_secrets.plugins.keyword import DENYLIST


def _listed() -> Iterator[re.Pattern[str]]:
    """Yields the patterns of secrets that detect-secrets knows by their shape.

    Addresses are left out, since they are no secrets, and so are the kinds that judge by entropy: they would take every
    fingerprint for one.
    """
    kinds: Iterable[Any] = get_mapping_from_secret_type_to_class().values()
    for kind in kinds:
        if issubclass(kind, RegexBasedDetector) and kind is not IPPublicDetector:
            yield from kind().denylist


HIDDEN = "…"
SECRET_KEYS = re.compile("|".join(DENYLIST), re.IGNORECASE)
SECRET_WORDS = {
    *("key", "apikey", "token", "tokens", "secret", "secrets", "password", "passwd", "passphrase", "pwd", "auth"),
    *("authorization", "credential", "credentials", "signature", "sig"),
}
"""The last word of a key that detect-secrets does not know by itself."""
SPECIAL_TOKEN = re.compile(r"<.*>|\[[A-Z]+\]")  # of a tokenizer
REVISION_WORDS = {"revision", "commit", "sha"}
ASSIGNMENT = re.compile(r"""(?P<name>[\w.-]+)(?P<between>["']?\s*(?:=|:\s)\s*["']?)(?P<value>[^\s"'&;,#{}\[\]]+)""")
"""``?token=...``, ``HF_TOKEN=...``, ``"password": "..."``; only where the name is a secret's is the value one."""
USER = re.compile(r"(?<=://)[^/\s]+@")
COMMIT = re.compile(r"[0-9a-f]{40}")
SHAPES = (
    # what detect-secrets lacks, or takes at one length alone
    re.compile(r"\bhf_[A-Za-z0-9]{10,}|\bwandb_v\d+_[\w-]{8,}"),
    # wandb's older keys; a revision on the Hub, in its cache or in a URL of it looks the same
    re.compile(
        r"(?<![0-9A-Za-z@])(?<!snapshots/)(?<!blobs/)(?<!commit/)(?<!tree/)(?<!blob/)(?<!resolve/)[0-9a-f]{40}\b"
    ),
    re.compile(r"(?<![A-Za-z0-9])sk-[\w-]{8,}"),
    re.compile(r"\bgh[pousr]_[A-Za-z0-9]{16,}|\bgithub_pat_\w{16,}|\bgl(?:pat|dt|ft|rt|ptt|soat)-[\w-]{8,}"),
    re.compile(r"\bxox[a-z]-[\w-]{8,}"),
    re.compile(r"\bAIza[\w-]{30,}|\bya29\.[\w-]{16,}"),
    re.compile(r"\bBearer\s+[\w.~+/=-]{6,}|(?i:\bbearer\s+(?=\S*\d)[\w.~+/=-]{16,})"),
    re.compile(r"(?i:(?<=authorization: )|(?<=authorization=))[^\"']+"),
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*", re.DOTALL),
    *_listed(),
)


def redacted(settings: Any) -> Any:
    """Returns the same settings with ``…`` for every value that looks like a secret, by its key or by its shape."""
    if isinstance(settings, Mapping):
        return {key: _redacted(str(key), value) for key, value in settings.items()}
    if isinstance(settings, list | tuple):
        return [redacted(value) for value in settings]
    return _text(settings) if isinstance(settings, str) else settings


def redacted_words(words: Sequence[str]) -> list[str]:
    """Returns a command line's words without secrets, as in ``--token=SECRET``, ``--token SECRET`` or inside a word."""
    shown: list[str] = []
    for i, word in enumerate(words):
        before = words[i - 1] if i else ""
        if before.startswith("-") and "=" not in before and not word.startswith("-"):
            shown.append(_redacted(before, word))
        else:
            shown.append(_text(word))
    return shown


def _redacted(key: str, value: Any) -> Any:
    if value and _is_secret(key, value):
        return HIDDEN
    if _last_word(key) in REVISION_WORDS and isinstance(value, str) and COMMIT.fullmatch(value):
        return value
    return redacted(value)


def _text(text: str) -> str:
    text = USER.sub(HIDDEN, text)
    text = ASSIGNMENT.sub(
        lambda match: match["name"] + match["between"] + _redacted_value(match["name"], match["value"]), text
    )
    for shape in SHAPES:
        text = shape.sub(HIDDEN, text)
    return text


def _redacted_value(name: str, value: str) -> str:
    return HIDDEN if _is_secret(name, value) else value


def _is_secret(key: str, value: Any) -> bool:
    word = _last_word(key)
    if word not in SECRET_WORDS and not SECRET_KEYS.search(key):
        return False
    if isinstance(value, bool) or (isinstance(value, str) and SPECIAL_TOKEN.fullmatch(value)):
        return False
    return not (word in {"token", "tokens"} and str(value).isdecimal())  # how many, or which


def _last_word(key: str) -> str:
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", key)
    return words[-1].lower() if words else ""
