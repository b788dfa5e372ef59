"""Where the server listens: a TCP port or a UNIX socket, with TLS or without; tried before the model loads."""

from __future__ import annotations

import ipaddress
import os
import resource
import socket
import ssl
import stat
from dataclasses import dataclass
from pathlib import Path

from hybrid_k2.errors import ConfigError

_BACKLOG = 512
REFUSED_AT_ONCE = 64  # connections beyond the bound that are there for as long as it takes to say so
_OWN_FILES = 256  # that the process may need beside its connections: weights that are read, caches, pipes


@dataclass(frozen=True)
class Listener:
    """A bound socket, and the address by which clients find it."""

    socket: socket.socket
    address: str
    path: Path | None = None  # of a UNIX socket, which is removed at the end
    loopback: bool = False  # only programs of this machine reach it, over TCP

    def close(self) -> None:
        """Stop listening. Closing twice is fine."""
        self.socket.close()
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def listen_tcp(host: str, port: int, tls: bool) -> Listener:
    """Bind a TCP port; 0 takes a free one. Raises: ConfigError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, ValueError) as error:  # ValueError: what no name of a host can be
        reason = getattr(error, "strerror", None) or "no name of a host"
        raise ConfigError(f"--host: expected an address of this machine, got {host!r}: {reason}") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(_BACKLOG)
    except OSError as error:
        bound.close()
        raise ConfigError(
            f"--port: expected a free port, got {port} on {host}: {error.strerror}", hint="--port 0 takes any free one"
        ) from None
    name, number = bound.getsockname()[:2]
    shown_host = f"[{name}]" if ":" in name else name
    loopback = ipaddress.ip_address(name.partition("%")[0]).is_loopback
    return Listener(bound, f"{'https' if tls else 'http'}://{shown_host}:{number}", loopback=loopback)


def listen_unix(path: Path) -> Listener:
    """Bind a UNIX socket that its owner and group may use; one that nobody listens at any more is replaced.

    Raises: ConfigError.
    """
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        before = os.umask(0o117)
        try:
            bound.bind(str(path))
        finally:
            os.umask(before)
        bound.listen(_BACKLOG)
    except OSError as error:
        bound.close()
        raise ConfigError(f"--uds: expected a path for a socket, got {path}: {error.strerror or error}") from None
    except ConfigError:
        bound.close()
        raise
    return Listener(bound, f"unix:{path}", path)


def _remove_stale(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"--uds: expected a path for a socket, got {path}, which is something else")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise ConfigError(f"--uds: expected a path that is free, got {path}, where another server listens")


def allow_connections(number: int) -> None:
    """Let the process hold so many connections open beside its files. Raises: ConfigError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    own = _OWN_FILES + REFUSED_AT_ONCE
    wanted = number + own
    if hard != resource.RLIM_INFINITY and wanted > hard:
        raise ConfigError(
            f"--max-connections: expected at most {max(hard - own, 0)}, got {number}: "
            f"this process may open {hard} files",
            hint="ulimit -Hn shows that limit, LimitNOFILE= sets it in a unit of systemd",
        )
    if soft != resource.RLIM_INFINITY and wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def check_tls(certificate: Path | None, key: Path | None) -> bool:
    """Say whether TLS is asked for. Raises: ConfigError: half of it, or files that do not fit."""
    if certificate is None and key is None:
        return False
    if certificate is None or key is None:
        missing, given = ("--ssl-keyfile", "--ssl-certfile") if key is None else ("--ssl-certfile", "--ssl-keyfile")
        raise ConfigError(f"{given}: expected {missing} beside it, got {given} alone")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=_no_password)
    except (OSError, ssl.SSLError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            "--ssl-certfile, --ssl-keyfile: expected a PEM certificate and its key, "
            f"got {certificate} and {key}: {reason}"
        ) from None
    return True


def _no_password() -> str:
    """Refuse an encrypted key instead of asking at the terminal."""
    raise ssl.SSLError("the key is encrypted")
