"""A triple as a question, and writing as the words that a synthesiser says.

    wording = Wording.load()                      # as the released rows have it: released.yaml
    wording.question(("All x are y.", "z is x", "z is y"))
    wording.spoken("about 3.5 % of it, e.g. $5")  # about three point five percent of it, for ...

What is written stays as it is (`user_content` is byte for byte the released template); what is
spoken goes to the synthesiser alone. Nothing is dropped on the way: a symbol that no rule knows is
spoken by its Unicode name.
"""
# ruff: noqa: RUF001

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import yaml

from soundmind.making import english
from soundmind.making.numerals import digits, number, say
from soundmind.system.errors import UserError

RELEASED = Path(__file__).with_name("released.yaml")
_PLACES = ("major", "minor", "conclusion")
Parts = tuple[str, str, str]

_PUNCTUATION = " \n.,;:!?'\"()-"  # pauses to a synthesiser, never words
_FOLDED = str.maketrans(
    {
        **dict.fromkeys("‘’‚‛′`´", "'"),
        **dict.fromkeys("“”„‟″«»‹›「」『』《》", '"'),
        **dict.fromkeys("‐‑", "-"),
        **dict.fromkeys("[{【〔", "("),
        **dict.fromkeys("]}】〕", ")"),
        **dict.fromkeys("—―•", ", "),
        **{"…": "...", "µ": "μ", "\t": " ", "\r": " ", "¿": "", "¡": "", "。": ". ", "、": ", "},
    }
)
_FRACTIONS = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅛": "1/8", "⅜": "3/8"}
_NAMES = ("Mr", "Mrs", "Ms", "Dr", "Prof", "Gen", "Sen", "Gov", "Capt", "Rev", "Hon", "Mt")


@dataclass(frozen=True)
class Wording:
    """Template, teacher's instruction and tables of spoken forms of one language."""

    language: str
    question_template: str
    teacher: str
    abbreviations: Mapping[str, str] = field(repr=False)
    before_numbers: Mapping[str, str] = field(repr=False)
    units: Mapping[str, Sequence[str]] = field(repr=False)
    currencies: Mapping[str, Sequence[str]] = field(repr=False)
    symbols: Mapping[str, str] = field(repr=False)
    decimal: str = "."  # what stands before decimals; the other of "." and "," groups thousands

    @classmethod
    def load(cls, path: Path = RELEASED) -> Wording:
        """Read a wording file. Tables it leaves out are the released ones where its language is
        English, else empty. Raises UserError."""
        try:
            values: Any = yaml.safe_load(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"{path}: {' '.join(str(error).split())}") from error
        if not isinstance(values, dict):
            raise UserError(f"{path}: no mapping; begin with a copy of {RELEASED}")
        values["question_template"] = values.pop("question", None)
        texts, tables = fields(cls)[:3], fields(cls)[3:8]
        unknown = sorted(set(map(str, values)) - {item.name for item in fields(cls)})
        missing = [item.name for item in texts if not isinstance(values.get(item.name), str)]
        if unknown or missing:
            raise UserError(
                f"{path}: not known: {unknown}, missing or no text: {missing}; begin with a copy of "
                f"{RELEASED}"
            )
        for item in tables:
            if item.name not in values:
                released = values["language"] == "en" and path != RELEASED
                values[item.name] = getattr(cls.load(), item.name) if released else {}
            width = {"units": 2, "currencies": 4}.get(item.name)
            table = values[item.name]
            if not isinstance(table, dict) or not all(
                isinstance(name, str) and name and _fits(value, width)
                for name, value in table.items()
            ):
                raise UserError(
                    f"{path}: {item.name} must map texts to {width or 'single'} texts; quote what "
                    "YAML would read as a number or a truth value"
                )
        if values.setdefault("decimal", ".") not in (".", ","):
            raise UserError(f'{path}: decimal is "." or ",", not {values["decimal"]!r}')
        places = re.findall(r"\{(\w+)\}", values["question_template"])
        if sorted(places) != sorted(_PLACES):
            raise UserError(
                f"{path}: question holds {places}, expected {{major}}, {{minor}} and {{conclusion}}, "
                "each once"
            )
        try:
            number(1, language=values["language"])
        except ImportError as error:
            raise UserError(
                "num2words is not installed; bash scripts/setup.sh does it, or: pip install num2words"
            ) from error
        except NotImplementedError as error:
            raise UserError(f"{path}: no number words in {values['language']!r}") from error
        return cls(**values)

    def question(self, parts: Parts) -> str:
        """The question's text; the parts go in as they are."""
        values = dict(zip(_PLACES, parts, strict=True))
        return re.sub(r"\{(\w+)\}", lambda match: values[match[1]], self.question_template)

    def repeated(self) -> frozenset[str]:
        """Spoken paragraphs that every question has."""
        paragraphs = self.question_template.split("\n\n")
        return frozenset(self.spoken(text) for text in paragraphs if "{" not in text)

    def parts(self, question: str) -> Parts | None:
        """The parts of a question that this template made, else None."""
        match = self._reading.fullmatch(question)
        return None if match is None else (match["major"], match["minor"], match["conclusion"])

    def spoken(self, text: str) -> str:
        """The words of `text`, with the punctuation that makes pauses."""
        text = unicodedata.normalize("NFC", text).translate(_FOLDED)
        for old, new in _FRACTIONS.items():
            text = re.sub(rf"(?<=\d)\s?{old}", f" and {new}", text).replace(old, new)
        text = "".join(map(_plain, text))
        for pattern, rule in self._rules:
            text = pattern.sub(rule, text)
        text = "".join(map(_character, text))
        text = re.sub(r" +([,.;:!?)]|-(?=[^\W\d]))", r"\1", re.sub(r"[^\S\n]+", " ", text))
        return re.sub(r" ?\n ?", "\n", text).strip()

    @cached_property
    def _reading(self) -> re.Pattern[str]:
        pieces = re.split(r"\{(\w+)\}", self.question_template)
        pattern = "".join(
            f"(?P<{piece}>.*)" if i % 2 else re.escape(piece) for i, piece in enumerate(pieces)
        )
        return re.compile(pattern, re.DOTALL)

    @cached_property
    def _long_forms(self) -> dict[str, str]:
        """The abbreviations, and those in small letters also as a sentence begins with them."""
        capital = {
            short[0].upper() + short[1:]: long[0].upper() + long[1:]
            for short, long in self.abbreviations.items()
            if short[0].islower()
        }
        return capital | dict(self.abbreviations)

    @cached_property
    def _rules(self) -> list[tuple[re.Pattern[str], Callable[[re.Match[str]], str]]]:
        """Tried once over the whole text, in this order."""
        before, units = _any_of(self.before_numbers), _any_of(self.units)
        rules: list[english.Rule] = [
            (rf"(?<![\w.])(?:{_any_of(self._long_forms)})(?!\w)", self._expand),
            (rf"(?<![\w.])({before})\s?(?=[-−]?\d)", lambda m: self.before_numbers[m[1]] + " "),
        ]
        number_ = english.NUMBER
        if self.decimal == ",":
            number_ = number_.replace(",", ";").replace(r"\.", ",").replace(";", r"\.")
        if self.language == "en":
            rules += english.rules(self.currencies, _any_of(self.currencies), units)
        rules += [
            (r"(?<![\w)])[-−–](?=\.?\d)", lambda m: self.symbols.get("−", "-") + " "),
            (
                rf"{number_}(\s(?:hundred|thousand|[mbtr]+illion))?\s?({units})(?![\w/²³])",
                self._unit,
            ),
            (r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", self._power),
            (r"(?<![\d.,])0\d+(?![.,]?\d)", lambda m: _apart(m, digits(m[0], self.language))),
            (r"(?<!\d)\.\d+", lambda m: _apart(m, say("0" + m[0], self.language))),
            (number_, lambda m: _apart(m, self._say(m[0]))),
            (_any_of(self.symbols), lambda m: f" {self.symbols[m[0]]} "),
        ]
        return [(re.compile(pattern), rule) for pattern, rule in rules]

    def _expand(self, match: re.Match[str]) -> str:
        """The long form; where the dot also ended the sentence, it stays."""
        rest = match.string[match.end() :]
        if (
            match[0].strip(".") in self.units
            and match.string[: match.start()].rstrip()[-1:].isdigit()
        ):
            return match[0]  # minutes, not minimum
        ends = match[0].endswith(".") and re.match(r"['\")]*(\s*$|\s*\n|\s+[A-Z])", rest)
        stop = "." if ends and match[0][:-1] not in _NAMES else ""
        return self._long_forms[match[0]] + stop

    def _say(self, written: str) -> str:
        swapped = written.translate(str.maketrans(".,", ",.")) if self.decimal == "," else written
        return say(swapped, self.language)

    def _unit(self, match: re.Match[str]) -> str:
        one, several = self.units[match[3]]
        words = self._say(match[1]) + (match[2] or "")
        return f"{words} {one if match[1] == '1' and not match[2] else several}"

    def _power(self, match: re.Match[str]) -> str:
        written = unicodedata.normalize("NFKC", match[0])
        words = self.symbols.get(match[0]) or f"{self.symbols.get('^', '')} {written}"
        return f" {words} "


def _fits(value: object, width: int | None) -> bool:
    if width is None:
        return isinstance(value, str)
    return isinstance(value, list) and len(value) == width and all(map(_is_text, value))


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _any_of(words: Mapping[str, Any]) -> str:
    """A pattern of the words, longest first; one that matches nothing where there are none."""
    return "|".join(map(re.escape, sorted(words, key=len, reverse=True))) or "(?!)"


@lru_cache(maxsize=65536)
def _plain(character: str) -> str:
    """Wide, styled and lowered characters as plain ones; raised ones stay for later."""
    kind = unicodedata.decomposition(character).partition(" ")[0]
    if kind == "<super>":
        return character
    plain = unicodedata.normalize("NFKC", character)
    return f" {plain} " if kind == "<sub>" else plain


def _apart(match: re.Match[str], words: str) -> str:
    """A number's words, apart from letters that touch it: CO2, 3D, COVID-19."""
    before = match.string[: match.start()][-1:]
    after = match.string[match.end() :][:1]
    return " " * (before.isalpha() or before == "-") + words + " " * after.isalpha()


@lru_cache(maxsize=65536)
def _character(character: str) -> str:
    """What can be spoken, as it is; other signs by name; control and format characters not."""
    kind, name = unicodedata.category(character), unicodedata.name(character, "symbol").lower()
    if name.startswith("greek") and kind[0] == "L":
        name = name.partition(" with ")[0].partition(" letter ")[2].removeprefix("final ")
        return f" {name} "
    if character in _PUNCTUATION or kind[0] in "LM":
        return character
    if character == "–":
        return ", "
    if kind[0] in "ZC":
        return "\n" if kind in ("Zl", "Zp") else "" if kind == "Cf" else " "
    return re.sub(r"\d", lambda m: f" {digits(m[0])} ", f" {name.replace('-', ' ')} ")
