"""An export to a repository of the Hugging Face hub, in one commit."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from jaxalign.errors import InputError

# Files of an earlier upload to delete: transformers might load them instead of the new ones.
_REPLACED = [
    "*.safetensors", "*.safetensors.index.json", "pytorch_model*", "adapter_*", "chat_template*",
    "generation_config.json",
]  # fmt: skip


def check_push(repo: str) -> str:
    """Checks the repository's name and the token before a model is loaded.

    Args:
      repo: "owner/name".

    Returns:
      The token: that of `HF_TOKEN` or of a login.

    Raises:
      InputError: a name that no repository has, no token, or a hub that is switched off.
    """
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
        if repo.count("/") != 1:
            raise HFValidationError(repo)
    except HFValidationError as error:
        raise InputError(f"--push {repo!r}", "a repository's name: owner/name", "--push OWNER/NAME") from error
    if constants.HF_HUB_OFFLINE:
        raise InputError(f"--push {repo} with HF_HUB_OFFLINE set", "a hub that may be asked", "HF_HUB_OFFLINE=0")
    token = huggingface_hub.get_token()
    if not token:
        raise InputError(
            f"--push {repo}, and there is no token of the hub",
            "a token that may write",
            "hf auth login, or HF_TOKEN=... before the command",
        )
    return token


def push(directory: Any, repo: str, *, kept: bool = True) -> str:
    """Uploads an export in place of an earlier one; a repository that is not there is made, and is private.

    One that is there stays as public as it is, with a warning where the model card then shows the run's data.

    Args:
      directory: of the export.
      repo: "owner/name".
      kept: whether the directory stays, for messages.

    Returns:
      Where it is.

    Raises:
      InputError: no token, no network, or a hub that refuses; the export stays where it is.
    """
    token = check_push(repo)
    from huggingface_hub import HfApi

    folder = Path(os.fspath(directory))
    try:
        api = HfApi(token=token)
        api.create_repo(repo, private=True, exist_ok=True)
        card = folder / "README.md"
        if not api.repo_info(repo).private and card.exists() and "\n## Data\n" in card.read_text(encoding="utf-8"):
            print(f"warning: {repo} is public, and README.md names the run's data and configuration", file=sys.stderr)
        found = api.upload_folder(
            folder_path=folder, repo_id=repo, commit_message="Model exported by jaxalign", delete_patterns=_REPLACED
        )
    except Exception as error:  # of the network, or what the hub answers: of several libraries
        words = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(
            f"--push {repo}: {words}",
            "a hub that can be reached, and a token that may write there",
            "the same command again" + f"; the export lies in {directory}" * kept,
        ) from error
    return str(getattr(found, "commit_url", None) or repo)
