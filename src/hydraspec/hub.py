"""Models and heads by folder, by short name, or by hub id: always a local folder in the end."""

from __future__ import annotations

import logging
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from hydraspec.errors import CheckpointError

logger = logging.getLogger(__name__)

_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def fetch(name: str, what: str) -> str:
    """The local folder of a model or of heads: `name` itself, or a snapshot of the hub repository of that id.

    Without a network a snapshot from an earlier time is used.

    Args:
        name: a folder or a hub id.
        what: "model" or "heads", for the message.

    Raises:
        CheckpointError: there is neither.
    """
    if Path(name).is_dir():
        return name
    try:
        listed = [file.rfilename for file in HfApi().model_info(name, timeout=10).siblings or ()]
    except GatedRepoError:
        raise CheckpointError(
            f"{what} {name!r} is gated: accept its licence on the hub and log in (hf auth login)"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise CheckpointError(f"no {what} {name!r}: it is neither a folder here, nor shipped, nor on the hub") from None
    except Exception as error:  # of the network, of several libraries
        try:
            return snapshot_download(name, local_files_only=True)
        except (LocalEntryNotFoundError, OSError):
            raise CheckpointError(
                f"no {what} {name!r}: it is neither a folder here, nor shipped, nor downloaded before, "
                f"and the hub cannot be reached ({type(error).__name__})"
            ) from None
    # Old repositories hold pickles only; transformers reads those with weights_only=True.
    pickles = [] if any(file.endswith(".safetensors") for file in listed) else ["*.bin"]
    try:
        return snapshot_download(name, allow_patterns=_FILES + pickles)
    except Exception as error:
        raise CheckpointError(f"downloading {what} {name!r} failed: {' '.join(str(error).split())[:200]}") from error
