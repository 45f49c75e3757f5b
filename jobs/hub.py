"""Models of transformers: where they are, and the hash of what they are."""

from __future__ import annotations

from pathlib import Path

from jobs.models import digest
from schemas.errors import WinnowError


def locate(kind: str, name: str) -> tuple[str, str]:
    """(folder or Hub id, revision): 16 hex digits of a folder's contents, or the commit of a Hub model. ``kind`` is
    what the name is of, for errors."""
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return str(folder), digest(folder)
    if folder.exists():
        raise WinnowError(f"{kind} {name}: the folder has no config.json; give a folder that transformers wrote")
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise WinnowError(f"{kind} {name!r}: no such folder; give a folder or a Hub id 'org/name'")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return name, str(HfApi().model_info(name).sha)[:16]
    except HfHubHTTPError as error:
        raise WinnowError(f"{kind} {name!r}: refused by the Hub ({error}); check name and token") from error
    except Exception as error:  # the client underneath has errors of its own, and has changed before
        reason = " ".join(str(error).split())[:200]
        raise WinnowError(
            f"{kind} {name!r}: no such folder, and the Hub cannot be reached ({reason}); give a local folder"
        ) from error
