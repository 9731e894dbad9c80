"""Numbers as words, by num2words, in any of its languages."""

from __future__ import annotations

from functools import lru_cache

_LONGEST = 15  # digits; a longer number is read digit by digit


@lru_cache(maxsize=4096)
def number(value: int | float, kind: str = "cardinal", language: str = "en") -> str:
    """Words of a value; `kind` is num2words': cardinal, ordinal, year."""
    from num2words import num2words

    return str(num2words(value, lang=language, to=kind)).replace(",", "")


def say(written: str, language: str = "en") -> str:
    """Words of a whole or decimal number, thousands' commas allowed; all decimals are said."""
    whole, _, part = written.replace(",", "").partition(".")
    words = (
        digits(whole, language) if len(whole) > _LONGEST else number(int(whole), language=language)
    )
    if not part:
        return words
    if language == "en":
        return f"{words} point {digits(part)}"
    return number(float(f"{whole}.{part}"), language=language)


def digits(written: str, language: str = "en") -> str:
    """Digit by digit."""
    return " ".join(number(int(digit), language=language) for digit in written)


def ordinal(written: str) -> str:
    """First, second, ... of an English number."""
    return number(int(written.replace(",", "")), "ordinal")


def year(written: str) -> str:
    """An English year: nineteen eighty-four."""
    return number(int(written), "year")


def plural(words: str) -> str:
    """Nineties, hundreds."""
    return words[:-1] + "ies" if words.endswith("y") else words + "s"
