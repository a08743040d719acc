"""A finished run on the Hub: its file, its card and the previews that the card shows, and nothing else.

The token is huggingface_hub's own affair: it is read from its store, and never asked for, held or shown here.
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
        folder: Of a run that is done.
        repo: "owner/name"; it is made if it is not there.
        private: Whether a repository that is made now is private; one that is there stays as it is.
        api: The Hub.

    Returns:
        The repository's address.

    Raises:
        OutputError: The folder holds no finished run.
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
        raise HubError(f"--repo {repo!r} is no name that the Hub knows; it is like 'owner/name'.") from error
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
        return (
            f"The Hub does not let you write to {repo!r} ({status}). Log in with a token that may write: hf auth login"
        )
    return f"The Hub refused {repo!r} with status {status}. Try again later, or look at status.huggingface.co."


def files_to_push(folder: RunFolder) -> list[str]:
    """What of a run is uploaded, as paths inside its folder.

    Raises:
        OutputError: It is no folder of a run, or the run is not done.
    """
    state = read_state(folder.state)
    if state is None:
        raise OutputError(f"{folder.path} is not a run folder: it holds no readable state.json.")
    if state.status != "done" or not folder.lora.is_file() or not folder.card.is_file():
        raise OutputError(
            f"The run in {folder.path} is not done (its status is {state.status!r}). Finish it with --resume."
        )
    card = ModelCard.load(folder.card)
    shown = [entry["output"]["url"] for entry in card.data.to_dict().get("widget") or []]
    inside = [url for url in shown if (folder.path / url).resolve().is_relative_to(folder.path.resolve())]
    return [folder.card.name, folder.lora.name, *(url for url in inside if Path(url).suffix == ".png")]
