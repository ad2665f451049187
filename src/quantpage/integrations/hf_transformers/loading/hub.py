"""Models by their id in the Hugging Face hub: fetched into its cache, or one sentence why not."""

import functools
import re
from fnmatch import fnmatch
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

    The hub is asked once a process which commit is its newest: a model's parts, fetched one after
    the other, are of one commit. Raises Unavailable where the hub cannot be reached and has nothing
    cached, FileNotFoundError where it has no such model.
    """
    import httpx
    from huggingface_hub import hf_hub_download, snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    name = str(model)
    try:
        try:
            commit, files = _newest(name)
            wanted = files if weights else ("config.json",)
            # A file that is not there is None, or known to be absent from the commit.
            cached = bool(wanted) and all(
                isinstance(try_to_load_from_cache(name, each, revision=commit), str)
                for each in wanted
            )
        except (httpx.TransportError, OfflineModeIsEnabled):
            commit, cached = None, True
        if weights:
            found = snapshot_download(
                name, revision=commit, allow_patterns=list(_FILES), local_files_only=cached
            )
            return Path(found)
        file = hf_hub_download(name, "config.json", revision=commit, local_files_only=cached)
        return Path(file).parent
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


@functools.cache
def _newest(name: str) -> tuple[str | None, tuple[str, ...]]:
    """The newest commit of a model, and its files that a decoder is loaded from.

    Asked with little patience: a download tries again for half a minute.
    """
    from huggingface_hub import HfApi, constants

    found = HfApi(endpoint=constants.ENDPOINT).model_info(name, timeout=_SECONDS)
    names = (each.rfilename for each in found.siblings or ())
    files = (each for each in names if any(fnmatch(each, pattern) for pattern in _FILES))
    return found.sha, tuple(files)
