"""What reaches the Hub, and what never does, with a Hub that only takes notes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.command import call
from helpers.runs import run
from huggingface_hub import errors

from sdlora.errors import HubError, OutputError
from sdlora.run import export as hub_module
from sdlora.run.export import push_run
from sdlora.run.folder import RunFolder

TOKEN = "hf_averysecrettoken"


class Hub:
    """Takes notes, and fails as it is told."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.failure = failure
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, repo: str, **options: Any) -> str:
        self.calls.append(("create_repo", {"repo": repo, **options}))
        if self.failure is not None:
            raise self.failure
        return f"https://huggingface.co/{repo}"

    def upload_folder(self, **options: Any) -> None:
        self.calls.append(("upload_folder", options))


@pytest.fixture
def done(tmp_path: Path, overrides: list[str]) -> Path:
    """A finished run."""
    run(tmp_path / "run", [*overrides, "name=hero", "train.epochs=1", "preview.num_captions=1"])
    return tmp_path / "run"


def test_only_file_card_and_its_previews_are_uploaded(
    done: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub()
    monkeypatch.setattr(hub_module, "HfApi", lambda: hub)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    code, out, err = call(capsys, "push", str(done), "--repo", "me/hero")
    assert (code, out.split(":")[0]) == (0, "https")
    (_, made), (_, sent) = hub.calls
    assert made == {"repo": "me/hero", "private": True, "exist_ok": True}
    assert sent["folder_path"] == done
    assert sent["allow_patterns"] == ["README.md", "hero.safetensors", "epochs/1/previews/prompt01_seed0.png"]
    assert "token" not in {*made, *sent}
    assert TOKEN not in out + err + (done / "log.txt").read_text()
    call(capsys, "push", str(done), "--repo", "me/hero", "--public")
    assert hub.calls[2][1]["private"] is False
    # Each on its own: failures are told without the token, and in words.
    for failure, reason in failures():
        with pytest.raises(HubError, match=reason) as caught:
            push_run(RunFolder(done, "hero"), "me/hero", private=True, api=Hub(failure))  # type: ignore[arg-type]
        assert TOKEN not in str(caught.value)


def failures() -> list[tuple[Exception, str]]:
    """What the library raises, and what is said of it."""

    def refusal(status: int) -> Exception:
        # Made without its own constructor, which wants a whole HTTP response.
        error = errors.HfHubHTTPError.__new__(errors.HfHubHTTPError)
        error.response = type("Response", (), {"status_code": status})()
        error.args = (f"Authorization: Bearer {TOKEN}",)
        return error

    return [
        (errors.HFValidationError("bad"), "owner/name"),
        (errors.LocalTokenNotFoundError("none"), "hf auth login"),
        (errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE"),
        (ConnectionError(TOKEN), "cannot be reached"),
        (refusal(403), r"'me/hero' .*403"),
        (refusal(500), "status 500"),
    ]


def test_unfinished_run_is_not_uploaded(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub()
    monkeypatch.setattr(hub_module, "HfApi", lambda: hub)
    state = done / "state.json"
    state.write_text(state.read_text().replace('"done"', '"stopped"'))
    code, _, err = call(capsys, "push", str(done), "--repo", "me/hero")
    assert (code, "is not done (its status is 'stopped')" in " ".join(err.split())) == (2, True)
    code, _, err = call(capsys, "push", str(tmp_path), "--repo", "me/hero")
    assert (code, "config.toml" in " ".join(err.split())) == (2, True)
    state.unlink()
    with pytest.raises(OutputError, match="no readable"):
        push_run(RunFolder(done, "hero"), "me/hero", private=True, api=hub)  # type: ignore[arg-type]
    assert hub.calls == []
