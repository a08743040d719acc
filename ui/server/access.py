"""The way into the studio: where it listens, whom it lets in, and which proxies and stores it was told of.

Everything that can be wrong with it is found here, before the rest of the studio takes seconds to load.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import ipaddress
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdlora.common.remote import check_url, is_url
from sdlora.errors import ConfigError

_ROUNDS = 200_000


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_host(host: str, auth_file: Path | None) -> None:
    """Check whether the studio may listen on a host.

    Raises:
        ConfigError: Other machines can reach it, and there is no password.
    """
    if auth_file is None and not is_loopback(host):
        raise ConfigError(
            f"--host {host} lets other machines connect, and anyone who reaches the studio can start programs on this "
            "machine. Add --auth-file FILE, a file with one line NAME:PASSWORD, or leave out --host."
        )


def check_proxies(proxies: Sequence[str], auth_file: Path | None) -> None:
    """Check the addresses of trusted proxies.

    Raises:
        ConfigError: An address is invalid, or no password is set.
    """
    if proxies and auth_file is None:
        raise ConfigError("--trusted-proxy lets other machines reach the studio. Add --auth-file FILE.")
    for proxy in proxies:
        try:
            ipaddress.ip_address(proxy)
        except ValueError as error:
            raise ConfigError(
                f"--trusted-proxy {proxy}: {error}. Give the address that the proxy connects from, such as 127.0.0.1."
            ) from error


@dataclass(frozen=True)
class Account:
    """The account that may log in; only a salted hash of its password is kept."""

    name: str
    salt: bytes
    digest: bytes

    @staticmethod
    def read(file: Path) -> Account:
        """Read an account from a file with one line, NAME:PASSWORD.

        Raises:
            ConfigError: It cannot be read, other users can read it, or the password is too short.
        """
        try:
            line = file.read_text(encoding="utf-8").strip()
            mode = file.stat().st_mode
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--auth-file {file} cannot be read: {error}.") from error
        if mode & 0o077:
            raise ConfigError(f"--auth-file {file} can be read by other users. Restrict it with: chmod 600 {file}")
        name, separator, password = line.partition(":")
        if not separator or not name or len(password) < 8 or "\n" in line:
            raise ConfigError(
                f"--auth-file {file} must contain one line, NAME:PASSWORD, with a password of at least 8 characters."
            )
        salt = secrets.token_bytes(16)
        return Account(name, salt, _hash(password, salt))

    def accepts(self, name: str, password: str) -> bool:
        """Whether name and password are right, in constant time."""
        same = hmac.compare_digest(_hash(password, self.salt), self.digest)
        return hmac.compare_digest(name.encode(), self.name.encode()) and same


def _hash(password: str, salt: bytes) -> bytes:
    return hashlib.pbkdf2_hmac("sha256", password.encode("utf-8"), salt, _ROUNDS)


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections.

    Raises:
        ConfigError: The port is in use, or the address is not this machine's.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"Port {port} is in use, perhaps by a studio that is open already. Close it, or choose another port "
                f"with --port {port + 1 if port < 65535 else 0}."
            ) from error
        raise ConfigError(f"The studio cannot listen on {host}:{port}: {error.strerror or error}.") from error


def check_stores(stores: Sequence[str]) -> tuple[str, ...]:
    """The URLs of stores without a slash at their end.

    Raises:
        ConfigError: One of them is not a store's URL.
    """
    for store in stores:
        if not is_url(store) or "::" in store:
            raise ConfigError(f"--store {store}: not a store's URL; use one such as s3://BUCKET/FOLDER.")
        check_url(store)
    return tuple(store.rstrip("/") for store in stores)


@dataclass(frozen=True)
class Entrance:
    """The way in, once it is checked."""

    connections: socket.socket
    host: str
    account: Account | None
    proxies: tuple[str, ...]
    stores: tuple[str, ...]


def open_entrance(
    *, host: str, port: int, auth_file: Path | None, stores: Sequence[str] = (), trusted_proxies: Sequence[str] = ()
) -> Entrance:
    """Take connections; they are answered once the studio runs.

    Args:
        host: The address to listen on.
        port: 0 takes any free one.
        auth_file: A file with NAME:PASSWORD; None needs no login.
        stores: URLs that recipes may read images from.
        trusted_proxies: Addresses of proxies that say who asks.

    Raises:
        ConfigError: Other machines could reach it without a password, or an address, a store or a port is not valid.
    """
    check_host(host, auth_file)
    check_proxies(trusted_proxies, auth_file)
    known = check_stores(stores)
    account = None if auth_file is None else Account.read(auth_file)
    return Entrance(listen(host, port), host, account, tuple(trusted_proxies), known)
