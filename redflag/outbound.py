"""Outgoing requests: proxies and a user's own headers.

Private certificate authorities need no code here: Python reads the file in `SSL_CERT_FILE`.
"""

from __future__ import annotations

import ipaddress
import os
import re
import urllib.request
from collections.abc import Mapping
from urllib.parse import urlsplit

from redflag.errors import RedflagError

_VARIABLE = re.compile(r"\$\{(\w+)\}")
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
# Headers of the body and the connection, which users cannot set.
_OURS = frozenset({"connection", "content-length", "content-type", "transfer-encoding", "accept-encoding"})


def proxy_for(url: str) -> str | None:
    """The proxy for an address, by `HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY`, or the system's settings.

    None for this machine itself, which a proxy could not reach.

    aiohttp's `trust_env` is not used: it reads `~/.netrc` too, and fails if that and an API key name the same host.
    """
    parts = urlsplit(url)
    if parts.hostname is None or _is_loopback(parts.hostname) or urllib.request.proxy_bypass(parts.netloc):
        return None
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    return proxy if proxy is None or "://" in proxy else f"http://{proxy}"


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def extra_headers(headers: Mapping[str, str] | None, option: str) -> dict[str, str]:
    """A user's headers (`option` names them in errors), with `${NAME}` replaced by that environment variable.

    So secrets stay off the command line.

    Raises:
        RedflagError: A variable is not set, or a header is invalid.

    Example:
        >>> extra_headers({"X-Team": "red"}, "upstream_headers")
        {'X-Team': 'red'}
    """
    resolved: dict[str, str] = {}
    for name, value in (headers or {}).items():
        if not isinstance(value, str) or not _NAME.fullmatch(name) or name.lower() in _OURS:
            raise RedflagError(
                f"{option} must map names of headers to texts, other than those of the body and the connection (got "
                f"{name!r}): write " + '{"X-Team": "red", "X-Secret": "${SECRET}"}'
            )
        for variable in _VARIABLE.findall(value):
            if not os.environ.get(variable):
                raise RedflagError(
                    f"the environment variable {variable} must be set, which {option} names in {name}. Set it, or "
                    "leave the header out."
                )
        value = _VARIABLE.sub(lambda match: os.environ[match[1]], value)
        if not value.isprintable():
            raise RedflagError(f"{option} must hold values of printable characters (got another one in {name})")
        resolved[name] = value
    return resolved


def key_in(variable: str | None, option: str = "upstream_key_env") -> str | None:
    """The API key in an environment variable; None for none.

    Raises:
        RedflagError: The variable is not set.
    """
    if variable is not None and not os.environ.get(variable):
        raise RedflagError(
            f"the environment variable {variable} must be set, which {option} names. Set it, or leave the option out."
        )
    return os.environ[variable] if variable else None
