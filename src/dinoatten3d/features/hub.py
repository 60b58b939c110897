"""The model hub: what its cache holds, whether it can be reached, and what it gives."""

from __future__ import annotations

import os
import threading
import urllib.error
import urllib.request
from pathlib import Path

HUB_SECONDS = 5.0
"""How long an unreachable hub may keep the user waiting."""
WANTED = ["config.json", "preprocessor_config.json", "model*.safetensors", "model.safetensors.index.json"]
UNREACHABLE = (407, 429)
"""Answers that come from a proxy or a busy hub, beside all above 499; the others are about the repository."""


def cached_snapshot(repository: str) -> Path | None:
    """Give the folder in the hub's own cache (HF_HOME, HF_HUB_CACHE) that holds the repository's tensors."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(repository, "config.json")
    except HFValidationError:
        return None
    folder = Path(config).parent if isinstance(config, str) else None
    return folder if folder is not None and tensor_files(folder) else None


def tensor_files(folder: Path) -> list[Path]:
    """Give the safetensors files of a model, whole or in shards; nothing where one of them is missing."""
    whole = folder / "model.safetensors"
    if whole.exists():
        return [whole]
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    told = int(shards[0].stem.rpartition("-of-")[2]) if shards else 0
    return shards if (folder / "model.safetensors.index.json").exists() and len(shards) == told else []


def hub_problem(repository: str) -> str | None:
    """Say within seconds why the hub cannot be reached, None if it can. Honours HF_HUB_OFFLINE, HF_ENDPOINT, proxies.

    Any answer about the repository, a refusal too, means that the hub is there.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return "HF_HUB_OFFLINE is set"
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    outcome: list[str | None] = [f"no answer in {HUB_SECONDS:.0f} s"]

    def ask() -> None:
        try:
            request = urllib.request.Request(f"{endpoint}/{repository}/resolve/main/config.json", method="HEAD")
            with urllib.request.urlopen(request, timeout=HUB_SECONDS):
                outcome[0] = None
        except urllib.error.HTTPError as error:
            answered = error.code < 500 and error.code not in UNREACHABLE
            outcome[0] = None if answered else f"it answers {error.code}"
        except (OSError, ValueError) as error:
            outcome[0] = str(getattr(error, "reason", error))

    thread = threading.Thread(target=ask, daemon=True)  # a name look-up has no time limit of its own
    thread.start()
    thread.join(HUB_SECONDS)
    return outcome[0]


def download(repository: str) -> Path | str:
    """Download a repository into the hub's cache; gives the folder, or in a few words why that was not possible."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(repository, allow_patterns=WANTED))
    except GatedRepoError:
        return (
            f"it is gated: accept its licence on https://huggingface.co/{repository} while logged in, "
            "then log in here with `hf auth login` or set HF_TOKEN"
        )
    except RepositoryNotFoundError:
        return "the hub has no such model, or hides it from you; check the spelling, or log in with `hf auth login`"
    except HfHubHTTPError as error:
        code = getattr(error.response, "status_code", "an error")
        denied = "; log in with `hf auth login` or set HF_TOKEN" if code in (401, 403) else ""
        return f"it answers {code}{denied}"
    except Exception as error:  # the client raises what its transport raises
        return f"the download failed: {(str(error).splitlines() or [type(error).__name__])[0]}"
    if not (folder / "config.json").exists() or not tensor_files(folder):
        return "its repository holds no config.json with model.safetensors"
    return folder
