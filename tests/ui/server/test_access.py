"""Where the studio may listen, whom it believes, and which password files and stores count."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.studios import auth_file
from typer.testing import CliRunner

from sdlora.cli.main import app
from sdlora.errors import ConfigError
from sdlora.ui.server.access import Account, check_host, check_proxies, check_stores, is_loopback, listen


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.0.0.53"])
def test_loopback_address_needs_no_password(host: str) -> None:
    assert is_loopback(host)
    check_host(host, None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.com", "127.0.0.1.evil.com", ""])
def test_other_address_needs_a_password(host: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--auth-file"):
        check_host(host, None)
    check_host(host, tmp_path / "auth")


def test_proxy_needs_an_address_and_a_password(tmp_path: Path) -> None:
    check_proxies([], None)
    check_proxies(["127.0.0.1", "::1"], tmp_path / "auth")
    with pytest.raises(ConfigError, match="--auth-file"):
        check_proxies(["127.0.0.1"], None)
    for proxy in ("*", "example.com", "0.0.0.0/0", ""):
        with pytest.raises(ConfigError, match="--trusted-proxy"):
            check_proxies([proxy], tmp_path / "auth")


def test_command_refuses_an_open_host_before_it_writes_anything(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    result = CliRunner().invoke(app, ["ui", "--host", "0.0.0.0", "--runs", str(runs)])
    assert isinstance(result.exception, ConfigError) and not runs.exists()


def test_account_file_must_be_private_and_complete(tmp_path: Path) -> None:
    for content, mode in (("me:correct horse", 0o644), ("me:short", 0o600), ("nobody", 0o600), (":12345678", 0o600)):
        with pytest.raises(ConfigError, match="--auth-file"):
            Account.read(auth_file(tmp_path, content, mode))
    with pytest.raises(ConfigError, match="cannot be read"):
        Account.read(tmp_path / "nothing")
    account = Account.read(auth_file(tmp_path, "me:correct horse\n"))
    assert account.accepts("me", "correct horse")
    assert not account.accepts("me", "correct horse ") and not account.accepts("you", "correct horse")
    assert b"correct" not in account.digest


def test_port_in_use_is_reported_with_another_one() -> None:
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"{port} is in use.*--port {port + 1}"):
            listen("127.0.0.1", port)
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1"):
        listen("192.0.2.1", 0)
    with pytest.raises(ConfigError, match="cannot listen"):
        listen("no such host", 0)


@pytest.mark.parametrize(
    "store", ["/data", "bucket", "https://host/x", "s3://me:secret@bucket", "zip://*::s3://bucket/x"]
)
def test_only_plain_stores_can_be_named(store: str) -> None:
    with pytest.raises(ConfigError):
        check_stores([store])
    assert check_stores(["s3://bucket/", "gs://other/set"]) == ("s3://bucket", "gs://other/set")
