"""Rule-based judges of a prompt's wording, for where no language model judges (RSIDiff, section 3.2).

They look at form only: clarity asks whether the text reads as language that depicts something, specificity
how much it names. Both lean to keeping: a short plain caption is clear, and specific enough.
"""

from __future__ import annotations

import itertools
import math
import re
import unicodedata

from curate.duplicates import WORD

INVISIBLE = re.compile(r"[\u00ad\u200b\u200e\u200f\u2060\ufeff]")
QUOTED = re.compile(r"\"[^\"]*\"|“[^”]*”|«[^»]*»")
LINK = re.compile(r"https?:/|www\.", re.IGNORECASE)
# "--ar 16:9", "ar 16:9", "(word:1.2)", "word:1.2", "word::5", "<lora:name:1>"
PARAMETER = re.compile(
    r"(?:--|—)[a-z]+(?: [\d.:]+)?|\bar \d+:\d+|<[^<> ]+:[^<> ]*>"
    r"|\S+?::?\s?-?\d+(?:\.\d+)?\)*(?!\w)",
    re.IGNORECASE,
)
SPEAKER = re.compile(r"\b(?:i|my|me|you|your|we|our)\b", re.IGNORECASE)
RUN = re.compile(r"(.)\1{3,}")
VOWEL = re.compile(r"[aeiouyàáâãäåæèéêëìíîïòóôõöøœùúûüýÿ]", re.IGNORECASE)
LATIN = re.compile(r"[a-zà-öø-ÿ]+", re.IGNORECASE)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# A prompt that ends in one of these breaks off; "on", "in" and "by" may well end one.
DANGLING = _words("a an the of with and or from for into")
FUNCTION = DANGLING | _words(
    "by in on at to his her their its is are was were be been being has have had do does did will would "
    "can could should may might must it he she they them him this that these those there here as if than "
    "then so but not no nor only just very too also about over under up down out off near next left right "
    "between behind above below through while when where which who whom whose what how why i you we my "
    "your our me us some any all each both such like more most other another own same s t"
)
# Words of style and quality: they ask for a look, and name nothing to be seen.
STYLE = _words(
    "photo photograph photography picture image painting drawing illustration render rendering art "
    "artwork artistic style styled portrait concept digital masterpiece quality best high highly hd uhd "
    "hdr 4k 8k 16k 3d 2d detailed detail details intricate realistic photorealistic hyperrealistic ultra "
    "hyper super extremely insanely trending artstation deviantart octane unreal engine resolution "
    "highres absurdres professional award winning sharp focus cinematic dramatic lighting volumetric "
    "beautiful gorgeous stunning amazing awesome epic nice cool good great perfect aesthetic thing things "
    "stuff something anything everything someone create make generate draw show depict depicting "
    "featuring"
)
ATTRIBUTE = re.compile(
    r"\b(?:red|orange|yellow|green|blue|purple|violet|pink|brown|black|white|gr[ae]y|gold(?:en)?|silver|teal"
    r"|cyan|magenta|crimson|beige|blonde?|dark|bright|pale|big|small|large|tiny|huge|giant|tall|short|long"
    r"|old|young|round|square|wooden|metal|glass|stone|wearing|holding|standing|sitting|riding"
    r"|one|two|three|four|five|six|seven|eight|nine|ten|\d{1,2})\b",
    re.IGNORECASE,
)
RELATION = re.compile(
    r"\b(?:on|in|under|over|above|below|behind|beside|near|inside|between|through|at|with|left of|right of"
    r"|next to|in front of|on top of)\b",
    re.IGNORECASE,
)


def normalise(text: str) -> str:
    """The text as it is to be used: Unicode NFC, no invisible signs, single spaces, no loose commas."""
    text = INVISIBLE.sub("", unicodedata.normalize("NFC", text))
    return re.sub(r"\s+", " ", text).strip(" ,;|")


def defect(text: str, longest: int = 1000) -> str | None:
    """Why the text cannot be read as a prompt at all, or None. longest: characters allowed."""
    for char in text:
        if unicodedata.category(char) in ("Cc", "Cs", "Co", "Cn") and char not in "\t\n\r":
            return f"unreadable: holds the character U+{ord(char):04X}"
    if "\ufffd" in text:
        return "unreadable: text lost in decoding (U+FFFD)"
    text = normalise(text)
    if not text:
        return "unreadable: empty"
    if not any(char.isalpha() for char in text):
        return "unreadable: no letters"
    if len(text) > longest:
        return f"too long: {len(text)} characters, over {longest}"
    return None


def clarity(text: str) -> float:
    """How far the text reads as language that depicts something, in [0, 1]; a plain caption has 1.

    The product of the shares that `faults` finds.
    """
    return math.prod(faults(text).values(), start=1.0)


def faults(text: str) -> dict[str, float]:
    """What is unclear in the text, each fault with the share in [0, 1] that it leaves of the clarity."""
    text = normalise(text)
    words = WORD.findall(text)
    if not words:
        return {"no words": 0.0}
    lower = [word.casefold() for word in words]
    pairs = list(itertools.pairwise(lower))
    signs = [char for char in text if not char.isspace() and char not in ",."]
    letters = sum(char.isalnum() or unicodedata.category(char)[0] == "M" for char in signs) / len(signs)
    said = QUOTED.sub("", text)  # words on a sign may well speak to the reader
    shares = {
        "more signs than letters": min(1.0, max(0.0, (letters - 0.4) / 0.4)),
        "no words of a language": (1 - sum(map(_garbled, words)) / len(words)) ** 2,
        "says the same again": min(1.0, len(set(pairs)) / max(1, len(pairs)) / 0.8) ** 2,
        "mostly parameters": max(0.0, 1 - 1.5 * (len(PARAMETER.findall(text)) - 1) / len(text.split())),
        "links to a picture": 0.3 if LINK.search(text) else 1.0,
        "talks to the reader": 0.6 if SPEAKER.search(said) else 1.0,
        "asks a question": 0.7 if said.rstrip().endswith("?") or "? " in said else 1.0,
        "breaks off": 0.45 if len(words) > 2 and lower[-1] in DANGLING and text[-1].isalpha() else 1.0,
    }
    if len(pairs) < 4:  # too short to repeat itself
        del shares["says the same again"]
    return {name: share for name, share in shares.items() if share < 1}


def specificity(text: str) -> float:
    """How much the text names, in [0, 1): 1 - exp(-u / 3), u its content words, and 1/2 for each attribute
    and relation; words of style count 0. One noun has 0.28, two 0.49, a prompt of style alone 0."""
    text = normalise(text)
    units = 0.0
    for word in {word.casefold() for word in WORD.findall(text)}:
        if word not in FUNCTION and word not in STYLE and any(char.isalpha() for char in word):
            units += 1.0
    if units:
        units += 0.5 * len({found.casefold() for found in ATTRIBUTE.findall(text)})
        units += 0.5 * len({found.casefold() for found in RELATION.findall(text)})
    return 1 - math.exp(-units / 3)


def _garbled(word: str) -> bool:
    """No word of a language: a Latin word without a vowel, letters in a long run, or endless."""
    if len(word) > 50 or RUN.search(word):
        return True
    return len(word) >= 4 and bool(LATIN.fullmatch(word)) and not word.isupper() and not VOWEL.search(word)
