"""Upload of a finished run to the Hub: its LoRA file, its card and the previews on the card, nothing else.

Called by `sdlora push`. huggingface_hub reads the token from its own store; sdlora never sees it.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is the HTTP library's own
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from sdlora.common.run_state import read_state
from sdlora.errors import HubError, OutputError
from sdlora.run.folder import RunFolder


def push_run(folder: RunFolder, repo: str, *, private: bool, api: HfApi | None = None) -> str:
    """Upload a run.

    Args:
        folder: Of a finished run.
        repo: "owner/name"; created if it does not exist.
        private: Whether a new repository is private; an existing one stays as it is.
        api: Client of the Hub.

    Returns:
        The URL of the repository.

    Raises:
        OutputError: The folder has no finished run.
        HubError: The Hub cannot be reached, or refuses.
    """
    files = files_to_push(folder)
    api = api or HfApi()
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=folder.path, allow_patterns=files, commit_message=f"Upload {folder.name}"
        )
    except HFValidationError as error:
        raise HubError(f"--repo {repo!r} is not a valid repository name; use 'owner/name'.") from error
    except LocalTokenNotFoundError as error:
        raise HubError("You are not logged in to the Hub. Run: hf auth login") from error
    except HfHubHTTPError as error:
        raise HubError(_refusal(repo, error.response.status_code)) from error
    except (OfflineModeIsEnabled, HTTPError, OSError) as error:
        raise HubError(
            f"The Hub cannot be reached ({type(error).__name__}). Check the network, and that "
            "HF_HUB_OFFLINE is not set."
        ) from error
    return str(url)


def _refusal(repo: str, status: int) -> str:
    if status in (401, 403):
        return f"You cannot write to {repo!r} on the Hub ({status}). Log in with a token that can: hf auth login"
    return f"The Hub refused {repo!r} with status {status}. Try again later, or see status.huggingface.co."


def files_to_push(folder: RunFolder) -> list[str]:
    """The files of a run to upload, as paths within its folder.

    Raises:
        OutputError: It is not a run folder, or the run is not done.
    """
    state = read_state(folder.state)
    if state is None:
        raise OutputError(f"{folder.path} is not a run folder: it has no readable state.json.")
    if state.status != "done" or not folder.lora.is_file() or not folder.card.is_file():
        raise OutputError(
            f"The run in {folder.path} is not done (its status is {state.status!r}). Finish it with --resume."
        )
    card = ModelCard.load(folder.card)
    shown = [entry["output"]["url"] for entry in card.data.to_dict().get("widget") or []]
    inside = [url for url in shown if (folder.path / url).resolve().is_relative_to(folder.path.resolve())]
    return [folder.card.name, folder.lora.name, *(url for url in inside if Path(url).suffix == ".png")]
