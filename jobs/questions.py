"""What only people can answer, and must before something is published."""

from __future__ import annotations

from schemas.settings import Settings

QUESTIONS = {
    "license": "the licence of what is published, as the Hub names it (cc-by-4.0, other, …)",
    "source_license": "the licence of the model that made the images, or of the images themselves",
    "prompts": "where the prompts come from, and on what terms they may be passed on",
    "people": "whether real people are shown or named",
    "unsafe": "how sexual, violent and hateful content was kept out, or that nobody looked",
}


class Publish(Settings):
    """Answers that the card gives in these words; nothing is published while one is missing (null).

    ``license``: of what is published, as the Hub names it. ``source_license``: of the model that made the images, or
    of the images, where they were taken in. ``prompts``: where they come from, and on what terms they may be passed
    on. ``people``: whether real people are shown or named. ``unsafe``: how sexual, violent and hateful content was kept
    out, or that nobody looked. ``voters``: whether the names of those who voted may be published, with a whole
    store."""

    license: str | None = None
    source_license: str | None = None
    prompts: str | None = None
    people: str | None = None
    unsafe: str | None = None
    voters: bool = False

    def missing(self) -> list[str]:
        return [key for key in QUESTIONS if not (getattr(self, key) or "").strip()]
