"""Addresses that hold a secret (a password, key, token or signature): refused where they would be kept, hidden in messages."""

from __future__ import annotations

import re

SECRET_NAMES = "token|secret|password|passwd|credentials?|api_?key|access_?key"
HOLDS_SECRET = "the address holds a password, a key or a signature"

# Of a query or fragment: the names that services use, which may be written in camel case.
_KEY = "(?:api|access|account|subscription|shared|private)[_-]?key(?:id)?"
_LONG = f"(?:token|secret|password|passwd|credentials?|signature|{_KEY})"
_SHORT = "(?:sig|key|auth|authorization|pwd)"
_VALUE = r"""[^&#\s'"<>)\]]*[^&#\s'"<>)\].,:;]"""    # not the marks of a sentence behind it
_PARAMETER = re.compile(rf"([?&;#](?:[\w.-]*{_LONG}|{_SHORT})=){_VALUE}", re.IGNORECASE)
# Keys of S3 have slashes in them. What follows a `:` may be a port, the next of several addresses, chained by `::`, or the name
# of a repository.
_PASSWORD = re.compile(r"((?<![\w+.-])(?!github://)[\w+.-]+://[^/@\s:]*:)(?!\d+/|:[\w+.-]+:)\S+(?=@)")
_USER = re.compile(r"(https?://)[^/@?#\s:]+(?=@)")    # a token, as Git hosts take it; elsewhere the name of a container
_ADDRESS = re.compile(r"(\S+::)?[\w+.-]+://")


def hide_secrets(text: str) -> str:
    """`text` with stars in the place of what is secret in the addresses that it quotes."""
    for pattern in (_PARAMETER, _PASSWORD, _USER):
        text = pattern.sub(r"\1***", text)
    return text


def holds_secret(text: str) -> bool:
    """Whether `text` is an address that holds a secret."""
    return _ADDRESS.match(text) is not None and hide_secrets(text) != text
