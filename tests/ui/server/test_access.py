"""Where the studio may listen, and which password files count."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from sdlora.cli.main import app
from sdlora.errors import ConfigError
from sdlora.ui.server.access import Account, check_host, is_loopback


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.0.0.53"])
def test_loopback_address_needs_no_password(host: str) -> None:
    assert is_loopback(host)
    check_host(host, None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.com", "127.0.0.1.evil.com", ""])
def test_other_address_needs_a_password(host: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--auth-file"):
        check_host(host, None)
    check_host(host, tmp_path / "auth")


def test_command_refuses_an_open_host_before_it_writes_anything(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    result = CliRunner().invoke(app, ["ui", "--host", "0.0.0.0", "--runs", str(runs)])
    assert isinstance(result.exception, ConfigError) and not runs.exists()


def test_account_file_must_be_private_and_complete(tmp_path: Path) -> None:
    file = tmp_path / "auth"
    for content, mode in (("me:correct horse", 0o644), ("me:short", 0o600), ("nobody", 0o600), (":12345678", 0o600)):
        file.write_text(content, encoding="utf-8")
        file.chmod(mode)
        with pytest.raises(ConfigError, match="--auth-file"):
            Account.read(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        Account.read(tmp_path / "nothing")
    file.write_text("me:correct horse\n", encoding="utf-8")
    account = Account.read(file)
    assert account.accepts("me", "correct horse")
    assert not account.accepts("me", "correct horse ") and not account.accepts("you", "correct horse")
    assert b"correct" not in account.digest
