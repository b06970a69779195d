"""Uploads the files of a model to a repository of the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

_NAME = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")


def check_push(repository: str) -> None:
    """Checks before any work what an upload needs: the name, the package and a token.

    Raises:
        ValueError: no name as owner/name, no token, or offline mode is set.
        ImportError: huggingface-hub is not installed.
    """
    if not _NAME.fullmatch(repository):
        raise ValueError(f"push must be owner/name, a repository on the hub, not {repository!r}")
    try:
        from huggingface_hub import constants, get_token
    except ImportError:
        raise ImportError("uploading to the hub needs: pip install 'pyloss[hub]'") from None
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"HF_HUB_OFFLINE is set: nothing can be uploaded to {repository}")
    if not get_token():
        raise ValueError(
            f"no token for the hub, which uploading to {repository} needs: `hf auth login`, or "
            "the variable HF_TOKEN, with a token that may write"
        )


def push(
    repository: str,
    place: Path,
    names: Iterable[str],
    *,
    replaced: Iterable[str] = (),
    private: bool = False,
    own_card: Callable[[str], bool] = lambda text: True,
) -> str:
    """Uploads files in one commit, and returns the repository's address.

    The repository is made if it is missing.

    Args:
        repository: "owner/name".
        place: the folder of the files.
        names: of the files.
        replaced: patterns of the repository's files that are removed, unless they are uploaded.
        private: of a repository that is made.
        own_card: whether a README.md that the repository has may be replaced, by its text.

    Raises OSError with the hub's reason; the files stay where they are.
    """
    from huggingface_hub import HfApi, hf_hub_download

    api: Any = HfApi()
    chosen = sorted(names)
    try:
        url = str(api.create_repo(repository, private=private or None, exist_ok=True))
        if "README.md" in chosen and api.file_exists(repository, "README.md"):
            there = Path(hf_hub_download(repository, "README.md")).read_text(encoding="utf-8")
            if not own_card(there):
                chosen.remove("README.md")
        api.upload_folder(
            repo_id=repository,
            folder_path=place,
            allow_patterns=chosen,
            delete_patterns=list(replaced) or None,
            commit_message="Upload a model written by pyloss",
        )
    # The library has many types for errors of network, permissions and storage.
    except Exception as error:
        text = " ".join(str(error).split())
        raise OSError(
            f"the files are in {place}, but the hub did not take them as {repository}: {text}"
        ) from error
    return url
