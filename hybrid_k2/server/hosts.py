"""By which names a server may be addressed.

A web page can give its own name the address of this machine (DNS rebinding); the browser then takes the server for a
part of the page's site, and lets the page read its answers. The header `Host` still has the page's name.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection

ANY = "*"


def is_known_host(host: str | None, names: Collection[str]) -> bool:
    """Say whether the value of a `Host` header is one of the names, or an IP address, which no page can take over.

    Without names, and with `*` among them, every host is known; a request without the header is from no browser.
    """
    if host is None or not names or ANY in names:
        return True
    name = _without_port(host)
    return name in {known.lower() for known in names} or _is_address(name)


def is_host_name(name: str) -> bool:
    """Say whether a header could have it as its host: a name or an address and no port, or `*`."""
    return _is_address(name) or re.fullmatch(r"[^\s/:@]+", name) is not None


def _without_port(host: str) -> str:
    """Return the name or address in a `Host` header: `localhost` of `LocalHost.:8000`, `::1` of `[::1]:8000`."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].removesuffix(".").lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
