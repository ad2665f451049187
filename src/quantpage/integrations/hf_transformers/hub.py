"""Models by their id in the Hugging Face hub: fetched into its cache, or one sentence why not."""

import re
from pathlib import Path

from quantpage.errors import Unavailable

_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_FILES = ("*.json", "*.jinja", "*.model", "*.safetensors", "*.txt")
"""What a decoder is loaded from; nothing that could run."""
_SECONDS = 10
"""To wait for the hub's first answer."""


def is_hub_id(model: str | Path) -> bool:
    """Whether it reads as owner/name, and neither it nor a folder called owner is here."""
    return bool(_ID.fullmatch(str(model))) and not Path(model).parent.exists()


def fetch(model: str | Path, weights: bool) -> Path:
    """The folder of a model of the hub: its configuration, and with ``weights`` all it is loaded
    from. What is in the hub's cache already is not fetched again.

    Raises Unavailable where the hub cannot be reached and has nothing cached, FileNotFoundError
    where it has no such model.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    name = str(model)
    try:
        cached = not _answers(name)
        if weights:
            found = snapshot_download(name, allow_patterns=list(_FILES), local_files_only=cached)
            return Path(found)
        return Path(hf_hub_download(name, "config.json", local_files_only=cached)).parent
    except LocalEntryNotFoundError as error:
        raise Unavailable(
            f"model: there is no folder {name} here, and the hub cannot be asked for a model of "
            "this id (no network, or HF_HUB_OFFLINE is set)"
        ) from error
    except (RepositoryNotFoundError, EntryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(
            f"model: there is no folder {name} here, and the hub shows no model of this id with a "
            "config.json (a gated one asks for HF_TOKEN)"
        ) from error
    except OSError as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise Unavailable(f"model: could not fetch {name} from the hub: {first}") from error


def _answers(name: str) -> bool:
    """Whether the hub can be asked. Asked once: a download tries again for half a minute."""
    import httpx
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        HfApi(endpoint=constants.ENDPOINT).model_info(name, timeout=_SECONDS)
    except (httpx.TransportError, OfflineModeIsEnabled):
        return False
    return True
