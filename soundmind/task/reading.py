"""What a reader sees in a text and a comparison of code points does not. Standard library only."""

from __future__ import annotations

import re
import unicodedata

# What a reader cannot tell from a Latin letter, a hyphen, a colon or a quote.
_LOOK_ALIKES = {
    "A": "\u0410\u0391", "E": "\u0415\u0395", "I": "\u0406\u0399\u04c0", "N": "\u039d",
    "O": "\u041e\u039f", "S": "\u0405", "T": "\u0422\u03a4", "W": "\u051c", "a": "\u0430\u0251\u03b1",
    "d": "\u0501", "e": "\u0435\u0454", "i": "\u0456\u0131\u03b9", "l": "\u04cf", "n": "\u0578",
    "o": "\u043e\u03bf", "r": "\u0433", "s": "\u0455", "t": "\u0442\u03c4", "w": "\u051d\u0461",
    "-": "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\u2043\u2192\u21d2", ":": "\ua789\u2236",
    "'": "\u2018\u2019", '"': "\u201c\u201d",
}  # fmt: skip
_SEEN_AS = {ord(other): letter for letter, others in _LOOK_ALIKES.items() for other in others}

# What takes a verdict back: at the beginning of any later line, and of the very next words.
REVOKED = re.compile(
    r"\W*(?:(?:oh|hmm+|um|but|and|no)\W+)*(?:wait|actually|correction|scratch|sorry|oops|hold on"
    r"|never ?mind|disregard|ignore|on second thought|on reflection|i (?:was|am) (?:wrong|mistaken)"
    r"|i take|i changed|just kidding"
    r"|(?:this|that|which)(?: is|'s|) (?:wrong|false|not|incorrect|untrue))\b"
)
TAKEN_BACK = re.compile(
    REVOKED.pattern
    + r"|\W*(?:no\b(?=\W*(?:$|[,.!;:\-]|wait))|not|nope|or|wrong|false|incorrect|untrue|psych)\b"
)


def fold(text: str) -> str:
    """`text` as a reader sees it: one form of every letter, dash, colon and quote, nothing unseen.

    Full-width forms and ligatures (NFKC), Cyrillic and Greek letters that look Latin, dashes of any
    length, zero-width and direction marks. Lengths may change.
    """
    if text.isascii():
        return text
    text = unicodedata.normalize("NFKC", text.translate(_SEEN_AS)).translate(_SEEN_AS)
    return "".join(c for c in text if unicodedata.category(c) not in ("Cf", "Mn"))
