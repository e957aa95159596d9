"""A model repository of the Hugging Face hub as a local folder: only what is needed, at the declared revision."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lora_lab.errors import InputError, MachineError, Problem
from lora_lab.models.quiet import quiet_transformers
from lora_lab.schema.model import HubModel

# Top-level files only: repositories often carry the same weights again in other formats below.
_WANTED = ("*.json", "*.txt", "*.model", "*.jinja", "model.safetensors", "model-*-of-*.safetensors")
_UNWANTED = ("*/*",)


def hub_folder(model: HubModel) -> Path:
    """The folder in the hub cache (HF_HOME) with config, tokenizer and safetensors weights of `model`.

    Raises:
        InputError: the hub says that there is no such repository or revision, or that it needs permission.
        MachineError: the hub cannot be reached and the model is not in its cache.
    """
    advice = "or give a local copy: model=folder model.path=DIR"
    try:
        with quiet_transformers():
            return Path(
                snapshot_download(
                    model.repo,
                    revision=model.revision,
                    allow_patterns=list(_WANTED),
                    ignore_patterns=list(_UNWANTED),
                )
            )
    except GatedRepoError:
        message = f"{model.repo} needs permission: accept its licence on the hub and log in (hf auth login), {advice}"
    except RevisionNotFoundError:
        raise InputError(Problem("model.revision", f"{model.repo} has no revision {model.revision!r}")) from None
    except (RepositoryNotFoundError, HFValidationError):
        message = f"no repository {model.repo!r} on the hub (or a private one: hf auth login), {advice}"
    except (LocalEntryNotFoundError, EntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MachineError(
            Problem(
                "model.repo",
                f"{model.repo} at revision {model.revision} is not in the local cache and the hub cannot be reached "
                f"({reason}); connect once, {advice}",
            )
        ) from error
    raise InputError(Problem("model.repo", message))
