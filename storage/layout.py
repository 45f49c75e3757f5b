"""Where things lie in a store."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from schemas.errors import WinnowError
from schemas.ids import digest
from schemas.tables import table
from storage.durable import publish, staged, storage_errors

FORMAT = 1
MARKER = "winnow.json"  # at the root: below tables/ `datasets` would load it as data
FOLDERS = ("tables", "snapshots", "staging", "models", "shards", "reports")


def clean(value: str | int) -> str:
    """`value` as a part of a file name: other characters than [A-Za-z0-9._-] become "_", and a name that this or its
    length changed ends with its digest, so that different values have different names."""
    text = str(value)
    # A leading dot or underscore would hide the file from `datasets` and pyarrow.
    name = re.sub(r"[^A-Za-z0-9._-]", "_", text).lstrip("._")[:80] or "x"
    return name if name == text else f"{name[:70]}-{digest(text, 8)}"


def part_path(name: str, folders: Mapping[str, str | int], unit: str, spec: str) -> str:
    """Path of a part, relative to the store: tables/scores/round-3/scorer-clip/<unit>-<spec>.parquet.

    `spec` is a digest of everything that decides the content.
    """
    # Not the hive form "round=3": pandas and pyarrow refuse folders whose keys repeat columns of the files.
    places = [f"{clean(key)}-{clean(value)}" for key, value in folders.items()]
    return "/".join(["tables", table(name).name, *places, f"{clean(unit)}-{clean(spec)}.parquet"])


def check(root: str | Path) -> Path:
    """The absolute path of the store at `root`; WinnowError where there is none, or one of another format."""
    marker = Path(root).resolve() / MARKER
    try:
        found = json.loads(marker.read_bytes())["format"]
    except OSError:
        raise WinnowError(f"{root}: no store here; check STORE=, or begin with the prompts stage") from None
    except (ValueError, KeyError, TypeError):
        raise WinnowError(f'{marker}: not readable; write {{"format": {FORMAT}}} into it again') from None
    if found != FORMAT:
        raise WinnowError(
            f"{marker}: the store has format {found!r}, this Winnow reads format {FORMAT}; "
            "use the Winnow that wrote it, or another STORE="
        )
    return marker.parent


def create(root: str | Path) -> Path:
    """Make the store at `root`, or open the one that is there. Returns its absolute path."""
    path = Path(root).resolve()
    with storage_errors(path, path):
        for folder in FOLDERS:
            (path / folder).mkdir(parents=True, exist_ok=True)
        if not (path / MARKER).exists():
            with staged(path, MARKER) as draft:
                draft.write_text(json.dumps({"format": FORMAT}) + "\n")
                publish(path, draft, MARKER)
    return check(path)
