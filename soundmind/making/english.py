"""English in writing to English in speech: dates, times, ratios, money, fractions, ranges.

`rules(...)` are (pattern, replacement) pairs, each tried once over the whole text and in this order;
what they leave (plain numbers, units, symbols) is the same in all languages, see words.py. Dates
with slashes are read month first, unless that is no month. [ours]
"""
# ruff: noqa: RUF001

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from soundmind.making.numerals import digits, ordinal, plural, say, year

Rule = tuple[str, Callable[[re.Match[str]], str]]

NUMBER = r"(\d+(?:,\d{3})*(?:\.\d+)?)"
_MONTHS = [
    *("January", "February", "March", "April", "May", "June", "July", "August", "September"),
    *("October", "November", "December"),
]
_MONTH = "(" + "|".join(_MONTHS) + ")"
_BEFORE_YEAR = (
    r"\b(?:(?i:in|since|until|till|by|from|of|year|before|after|during|early|late|mid|circa|spring|"
    r"summer|autumn|winter|fall)|" + _MONTH[1:-1] + r"),?\s|©\s?"
)
_NUMBERED = (
    "World War|Chapter|Part|Section|Act|Phase|Type|Class|Grade|Volume|Book|Stage|Level|Article|"
    "Case|Group"
)
_REGNAL = "Henry|Louis|George|Elizabeth|Edward|Charles|James|William|Pius|John|Paul|Napoleon"
_ROMAN = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100}
_LARGE = {"k": "thousand", "m": "million", "bn": "billion"}


def rules(currencies: Mapping[str, Sequence[str]], money: str, units: str) -> list[Rule]:
    """The rules; `money` and `units` are patterns of the signs in the wording's tables."""
    return [
        (r"https?://\S+|www\.\S+|\S+@\S+\.\w+", _address),
        (r"_{2,}", lambda m: " blank "),
        (
            rf"(?<!\w)({money})\s?{NUMBER}(?:\s?(k|K|m|M|bn|[mbtr]+illion)\b)?",
            lambda m: _money(m, currencies[m[1]]),
        ),
        (r"(?<![\w.])(\d{4})[-/](\d\d)[-/](\d\d)(?!\w)", lambda m: _date(m[0], m[2], m[3], m[1])),
        (
            r"(?<![\w/.])(\d{1,2})/(\d{1,2})/(\d{4})(?![\w/])",
            lambda m: _date(m[0], *(m[2], m[1]) if int(m[1]) > 12 else (m[1], m[2]), m[3]),
        ),
        (
            rf"\b{_MONTH} (\d{{1,2}})(?:st|nd|rd|th)?(?![:\d]|[.,]\d|\w)(?:,? (\d{{4}})\b)?",
            lambda m: f"{m[1]} {ordinal(m[2])}" + (f", {year(m[3])}" if m[3] else ""),
        ),
        (
            rf"(?<![\w.,])(?:[Tt]he )?(\d{{1,2}})(?:st|nd|rd|th)?(?: of)? {_MONTH}\b(?:,? (\d{{4}})\b)?",
            lambda m: f"the {ordinal(m[1])} of {m[2]}" + (f" {year(m[3])}" if m[3] else ""),
        ),
        (r"(?<![\w.])(\d{4})'?s\b", lambda m: plural(year(m[1]))),
        (r"(?<!\w)'?(\d0)'?s\b", lambda m: plural(say(m[1]))),
        (
            r"(?<![\w.,$-])(1\d{3}|20\d\d)\s?[-–]\s?(1\d{3}|20\d\d)(?![\w-])",
            lambda m: f"{year(m[1])} to {year(m[2])}",
        ),
        (r"\b(year )(\d{3,4})\b", lambda m: m[1] + year(m[2])),
        (
            r"\b(?i:(from|between|in)) (1\d{3}|20\d\d) (to|and|or) (1\d{3}|20\d\d)(?![,.]?\d|\w)",
            lambda m: f"{m[1]} {year(m[2])} {m[3]} {year(m[4])}",
        ),
        (
            rf"({_BEFORE_YEAR})(1[1-9]\d\d|20\d\d)(?![,.]\d|\w|-\w|\s?(?:{units})(?!\w))",
            lambda m: m[1] + year(m[2]),
        ),
        (r"\((1[1-9]\d\d|20\d\d)\)", lambda m: f"({year(m[1])})"),
        (
            r"(\d+)' ?(\d+)\"(?!\w)",
            lambda m: f"{say(m[1])} {'foot' if m[1] == '1' else 'feet'} {say(m[2])} inches",
        ),
        (
            r"(?<![\w:.])([01]?\d|2[0-3]):([0-5]\d)(?![\d:])(?:\s?(a m|p m|am|pm)\b)?",
            _time,
        ),
        (r"(?<![\w:.])(1[0-2]|\d)\s?([ap])m\b", lambda m: f"{say(m[1])} {m[2]} m"),
        (rf"(?<![\w:]){NUMBER}\s?:\s?{NUMBER}(?![\w:])", lambda m: f"{say(m[1])} to {say(m[2])}"),
        (
            r"(?<![\w/])(24)/(7)\b|(?<![\w/])(50)/(50)\b",
            lambda m: " ".join(map(say, filter(None, m.groups()))),
        ),
        (r"(?<![\w/.])(?:(\d+) (?:and )?)?(\d+)/(\d+)(?![\w/])", _fraction),
        (rf"\b({_NUMBERED}) ([IVXLC]+)\b", lambda m: f"{m[1]} {say(_roman(m[2]))}"),
        (rf"\b({_REGNAL}) ([IVX]+)\b", lambda m: f"{m[1]} the {ordinal(_roman(m[2]))}"),
        (r"(?<![\w.])(\d{1,3}(?:,\d{3})+|\d+)(?:st|nd|rd|th)\b", lambda m: ordinal(m[1])),
        (r"(?<![\w.])\+?\d{2,}(?:-\d{2,}){2,}\b|(?<![\w.])\d{3}-\d{4}\b", _telephone),
        (rf"{NUMBER} [-–] {NUMBER}(?=\s*=)", lambda m: f"{m[1]} minus {m[2]}"),
        (
            rf"(?<![\w.-]){NUMBER}\s?[-–]\s?{NUMBER}(?=[\s.,;:!?)'\"]|$|\s?(?:{units})(?!\w))",
            lambda m: f"{m[1]} to {m[2]}",
        ),
        (
            r"(?<![\w.])(\d{1,3}(?:\.\d{1,3}){2,})(?!\w)",
            lambda m: " point ".join(map(say, m[1].split("."))),
        ),
        (r"(?<=[^\W\d_])-(?=\d)", lambda m: " "),
        (r"(?<=\d)\s?[x×*·]\s?(?=\d)", lambda m: " times "),
        (r"(?<=\d)[x×](?!\w| ?[-+−=<>*/^)])", lambda m: " times"),
        (r"(?<=[\w)])\s[-–]\s(?=\d)|(?<=\d)\s[-–]\s(?=[\w(])", lambda m: " minus "),
    ]


def _address(match: re.Match[str]) -> str:
    """An internet address as one says it; a full stop behind it is the sentence's."""
    text = match[0].rstrip(".,;:!?)\"'")
    rest = match[0][len(text) :]
    text = re.sub(r"^https?://", "", text)
    for sign, word in {".": "dot", "/": "slash", "@": "at", "-": "dash", "_": "underscore"}.items():
        text = text.replace(sign, f" {word} ")
    return text.replace("www", "w w w").strip() + rest


def _money(match: re.Match[str], names: Sequence[str]) -> str:
    one, several, cent, cents = names
    if match[3]:
        return f"{say(match[2])} {_LARGE.get(match[3].lower(), match[3])} {several}"
    whole, _, part = match[2].partition(".")
    main = f"{say(whole)} {one if whole == '1' else several}"
    if not part or part == "00":
        return main
    if len(part) != 2 or not cents:
        return f"{say(match[2])} {several}"
    small = f"{say(part)} {cent if part == '01' else cents}"
    return small if whole == "0" else f"{main} and {small}"


def _date(written: str, month: str, day: str, of_year: str) -> str:
    if not (1 <= int(month) <= 12 and 1 <= int(day) <= 31):
        return written
    return f"{_MONTHS[int(month) - 1]} {ordinal(day)}, {year(of_year)}"


def _time(match: re.Match[str]) -> str:
    hour, minute, half = say(match[1]), match[2], match[3]
    if minute == "00":
        words = (
            hour if half else f"{hour} o'clock" if 0 < int(match[1]) <= 12 else f"{hour} hundred"
        )
    else:
        words = f"{hour} oh {say(minute)}" if minute[0] == "0" else f"{hour} {say(minute)}"
    return f"{words} {half[0]} m" if half else words


def _telephone(match: re.Match[str]) -> str:
    return ", ".join(digits(part) for part in re.findall(r"\d+", match[0]))


def _fraction(match: re.Match[str]) -> str:
    whole, above, below = match[1], match[2], match[3]
    names = {"2": ("half", "halves"), "4": ("quarter", "quarters")}
    words = f"{say(above)} over {say(below)}"
    if 2 <= int(below) <= 20 and int(above) < int(below):
        one, several = names.get(below) or (ordinal(below), ordinal(below) + "s")
        words = f"{say(above)} {one if above == '1' else several}"
    return f"{say(whole)} and {words}" if whole else words


def _roman(numeral: str) -> str:
    values = [_ROMAN[letter] for letter in numeral]
    pairs = zip(values, [*values[1:], 0], strict=True)
    return str(sum(-value if value < after else value for value, after in pairs))
