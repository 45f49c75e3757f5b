"""The one error that users see as a single line."""


class WinnowError(Exception):
    """A problem that the user can mend. The message is one line, "thing: what was wrong; cure"."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
