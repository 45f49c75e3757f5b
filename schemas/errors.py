"""The one error that users see as a single line."""

from collections.abc import Iterator
from contextlib import contextmanager


class WinnowError(Exception):
    """A problem that the user can mend. The message is one line, "thing: what was wrong; cure"."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


@contextmanager
def about(thing: str) -> Iterator[None]:
    """A WinnowError from inside says, before all else, what it is about."""
    try:
        yield
    except WinnowError as error:
        raise WinnowError(f"{thing}: {error}") from error
