"""The recipe that a sample was made under, as the snapshot that sealed it tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from jobs.recipe import Recipe
from schemas.errors import WinnowError
from storage.layout import check, clean
from storage.query import arrow
from storage.snapshot import sealed_under


def sample_row(store: Path, sample: int) -> dict[str, Any]:
    """The sample's row, image and all; WinnowError where there is none."""
    found = arrow(check(store), "SELECT * FROM samples WHERE sample_id = $id", {"id": sample}).to_pylist()
    if not found:
        raise WinnowError(f"sample {sample}: not in {store}; 'winnow sql \"SELECT sample_id FROM samples\"' lists them")
    return found[0]


def recipe_of(store: Path, row: dict[str, Any]) -> Recipe:
    """The recipe, in its arm's form, of the stage that made this row of ``samples``."""
    folder = f"samples/round-{row['round']}/arm-{clean(row['arm'])}/split-{row['split']}"
    sealed = sealed_under(store, folder)
    if sealed is None:
        raise WinnowError(f"tables/{folder}: sealed by no snapshot; run 'winnow verify'")
    try:
        return Recipe.model_validate(sealed)
    except (ValidationError, WinnowError) as error:
        what = f"{error.error_count()} keys differ" if isinstance(error, ValidationError) else str(error)
        raise WinnowError(f"tables/{folder}: its recipe is of another Winnow ({what}); use that Winnow") from error
