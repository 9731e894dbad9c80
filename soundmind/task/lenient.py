r"""The lenient reading: what a fair human takes a response to say, beside the strict parser. [ours]

The strict parser (soundmind.task.labels) asks for the closing line that the prompt dictates, so its
accuracy mixes form with reasoning. `read_leniently` asks only whether the words commit to one
verdict. It never guesses: where a sentence hedges, asks, quotes, offers both or is not understood,
there is no verdict; and a negation is never read as its opposite.

    >>> read_leniently("**Final answer**\nNot entailed, since Rex is no wug.")
    'not-entailed'
    >>> read_leniently("I cannot conclude Answer: entailed") is None
    True

1.  Typography counts for nothing: emphasis, quotes, tags, LaTeX, dashes and colons of any script,
    look-alike letters, invisible characters.
2.  Read is what follows the thinking. Where nothing follows it, or the block is left open, the last
    sentence inside counts if it is marked as the answer.
3.  The last sentence that mentions a verdict decides, and has to be a statement from its first word
    to its last: an opening ("so", "I conclude that", "since no wug is a fep,"), then a marker
    ("the final answer is", "verdict:") or a subject ("the conclusion is", "the premises do not"),
    then the verdict, then nothing or a reason. Words this grammar does not know make it no
    statement.
4.  No verdict is left where the next words take it back ("wait", "however", "not sure"), or where
    the statement right before says the opposite and the strict parser, too, finds no last word.

Nothing is read or written; standard library only; time is linear in the text.
"""

from __future__ import annotations

import functools
import re

from soundmind.task.labels import ENTAILED, ENTAILMENT, NOT_ENTAILED, LabelSet, split_response
from soundmind.task.reading import REVOKED, TAKEN_BACK, fold

_WINDOW = 16_384  # characters at the end that are read
_LONGEST_SENTENCE = 1_500


def _any(words: str) -> str:
    """An alternation of the phrases separated by `|` in `words`, spaces stretched."""
    return "(?:" + "|".join(re.sub(r"\s+", r"\\s+", w.strip()) for w in words.split("|")) + ")"


_ADVERB = _any(
    "logically|necessarily|strictly|clearly|definitely|certainly|indeed|actually|therefore|thus|"
    "hence|then|validly|formally|simply|really|in fact|of course|properly|directly|fully|both"
)
# After "not" only what leaves the negation whole: "not clearly entailed" says something else.
_NEGATED_ADVERB = _any("logically|necessarily|strictly|actually|validly|formally|therefore|thus")
_OPENING = _any(
    "so|thus|therefore|hence|then|finally|overall|ultimately|consequently|accordingly|and|now|"
    "in conclusion|in summary|in short|in the end|in sum|in other words|to conclude|to sum up|"
    "to summari[sz]e|all in all|as a result|ok|okay|alright|right|well|indeed|clearly|yes|"
    "for (?:this|that|these) reasons?|because of this|based on this|from this|given this|"
    "this means|that means|which means|meaning|it follows|(?:which|this|that) makes|making|"
    "(?:i|we)(?: (?:can|must|would|will|have to|therefore|thus|hence|now|can now|can therefore|"
    "can safely))? "
    "(?:conclude|say|answer|choose|pick|select|think|believe|judge|find|see|know|state|go with)|"
    "it can be concluded|we have shown|in this case|in each case|(?:i|we)'d (?:go with|answer|choose|pick)|"
    "there is|there's|(?:i|we)'(?:d say|ll go with|ll say|m going with|re left with)|i am going with|"
    "(?:i am|i'm) (?:certain|sure|confident)|"
    "(?:the |my )?reasoning shows|(?:the |both )?premises show|it is clear|it's clear"
)
_REASON_FIRST = re.compile(
    r"(?:since|because|as|given|considering|based on|from|after|looking at)\b"
)
_CLAUSE = re.compile(r",\s*")
_CONSEQUENCE = re.compile(
    r"[,;:)\-]\s*(?=(?:and so|so|thus|therefore|hence|which means|meaning)\b)"
)
_NAME = _any(
    "answer|answers|verdict|label|result|decision|judge?ment|determination|response|"
    "classification|prediction|solution|evaluation|assessment|finding|output"
)
_MARKER = (
    r"(?:(?:the|my|our|a|this|that|your|its)\s+)?"
    r"(?:(?:final|correct|right|best|logical|overall|definitive|only|proper|short|"
    r"answer|verdict)\s+)*"
    rf"(?:{_NAME}|conclusion(?=\s*[:=\n\-]))"
    r"(?:\s+(?:here|to (?:this|the) question|for this (?:one|problem|question)|in this case|"
    r"therefore|then|choice|label|line))?"
)
_LINK = (
    r"(?:[^\w\s\u00ac?.;]+|'s\b|(?:is|must be|would be|has to be|should be|will be|remains|that"
    r"|definitely|clearly|simply|therefore|thus)\b)"
)
_SUBJECT = (
    r"(?:(?:the|this|that|our|its|given|stated|proposed|said|above|final)\s+)*"
    r"(?:conclusion|statement|claim|hypothesis|proposition|inference|consequence|assertion|it|this"
    r"|that)(?:\s+(?:above|here|in question|given|itself|stated|indeed))?"
)
_PREMISES = (
    r"(?:(?:the|these|those|both|all|two|given|provided|our)\s+)*"
    r"(?:premises|they|statements|facts|rules|information|premise|evidence|it)"
    r"(?:\s+(?:together|alone|above|given|taken together|provided|here|as stated))?"
)
_COPULA = (
    r"(?:\s+is|'s|\s+was|\s+must\s+be|\s+has\s+to\s+be|\s+can\s+be|\s+is\s+(?:considered|deemed"
    r"|judged|to\s+be)|\s+can\s+be\s+said\s+to\s+be|\s+should\s+be|\s+remains|)\s+"
)
_NOT_COPULA = (
    r"(?:\s+(?:is|was|can|could)\s+not|\s+isn't|\s+wasn't|'s\s+not|\s+cannot|\s+can't"
    r"|\s+couldn't|\s+ain't)\s+(?:be\s+)?"
)
_DO_NOT = r"\s+(?:(?:do|does|did|can)\s+not|(?:do|does|did)n't|fails?\s+to|cannot|can't)\s+"

_NEGATIVE = (
    rf"(?:(?:not|isn't|ain't)[\s\-]+(?:{_NEGATED_ADVERB}\s+)?(?:be\s+)?entailed|notentailed|unentailed"
    r"|non[\s\-]?entail(?:ed|ment)|not\s+an?\s+entailment|no\s+entailment)"
)
_POSITIVE = rf"(?:{_ADVERB}\s+)*(?:entailed|(?:an\s+)?entailment)"
_OF_IT = r"(?:\s+(?:the|this|that|our)\s+(?:conclusion|statement|claim|hypothesis)|\s+it)?"

_SAID = "|".join(
    (
        rf"(?:{_SUBJECT}{_NOT_COPULA}(?:{_NEGATED_ADVERB}\s+)?entailed)(?P<no1>)",
        rf"(?:{_PREMISES}{_DO_NOT}(?:{_NEGATED_ADVERB}\s+)?entail{_OF_IT})(?P<no2>)",
        rf"(?:{_SUBJECT}{_DO_NOT}(?:{_NEGATED_ADVERB}\s+)?follow(?:\s+{_NEGATED_ADVERB})?)(?P<no3>)",
        rf"(?:(?:{_SUBJECT}{_COPULA}|it'?s\s+|as\s+)?{_NEGATIVE})(?P<no4>)",
        rf"(?:{_PREMISES}\s+(?:{_ADVERB}\s+)*entails?{_OF_IT})(?P<yes1>)",
        rf"(?:{_SUBJECT}\s+(?:{_ADVERB}\s+)*follows(?:\s+{_ADVERB})?)(?P<yes2>)",
        rf"(?:(?:{_SUBJECT}{_COPULA}|as\s+)?{_POSITIVE})(?P<yes3>)",
    )
)
# Read one after the other, each as far as it goes, so that no sentence is read twice.
_THAT = r"(?:\s+that(?!'|\s+(?:is|isn't|was|must|has|can|does|do)\b))?"
_HEAD = re.compile(rf"{_OPENING}\b{_THAT}\s*[,:]?\s*")
_AS_ANSWER = re.compile(rf"{_MARKER}(?![^\W_])|(?P<link>{_LINK})")
_ENTAILMENT = re.compile(rf"(?:{_SAID})(?P<tail>[^\w].*)?$", re.DOTALL)
_MENTION = re.compile(r"entail")

_BECAUSE = _any(
    "because|since|as|for|due|given|considering|so|therefore|thus|hence|which|meaning|based on|"
    "according to|reason|explanation|this is because|that is"
)
_BY = _any(
    "thank you|thanks|that|by|from|in|under|on|here|with certainty|after all|then|indeed|logically|"
    "necessarily|now"
)
_TAIL = re.compile(
    rf"[\W_]*$|[\s,;:.\-]*{_BECAUSE}\b|\s+(?P<by>{_BY})\b|\s*,\s*\w+\s*:|\s*[:.\-]\s*(?P<apart>\w)"
)
_DENIAL = re.compile(
    r"\b(?:no|not|never|neither|nor|none|nothing|without|hardly|or|if|unless|but)\b|n't\b|\u00ac"
)
_DOUBT = re.compile(
    r"\?|\u00ac|\b(?:maybe|perhaps|probably|possibly|presumably|i guess|i suppose|unsure|uncertain"
    r"|unclear|doubt\w*|not (?:entirely |quite |completely |fully )?(?:sure|certain|confident)"
    r"|n't (?:be )?(?:sure|certain|know)|(?:could|might|may) be (?:wrong|mistaken)|kidding|joking"
    r"|or not|or is it|opposite|either way|cannot (?:tell|say|know)"
    r"|which (?:is|would be|seems) (?:wrong|false|incorrect|untrue))\b"
)
_RESTRICTED = re.compile(r"\W*(?:however|but|although|though|unless|if|maybe|perhaps|hmm+)\b")
_TAG = re.compile(r"</?think>", re.IGNORECASE)


def read_leniently(text: str, labels: LabelSet = ENTAILMENT) -> str | None:
    """The verdict that a fair reader takes from `text`, or None; rules in the module docstring."""
    response = split_response(text, labels)
    parts = [part for part in _TAG.split(text) if part.strip()]
    closed = bool(response.after.strip())
    sentences = _sentences(response.after if closed else (parts or [""])[-1])
    state = _statement if labels is ENTAILMENT else functools.partial(_choice, labels)
    needs_mark, denied = not closed, False
    for place in range(len(sentences) - 1, -1, -1):
        sentence = sentences[place]
        verdict, marked = state(sentence)
        if verdict is None:
            if REVOKED.match(sentence) or _DOUBT.search(sentence):
                return None
            if labels is ENTAILMENT and _MENTION.search(sentence):  # not understood
                needs_mark, denied = True, denied or bool(_DENIAL.search(sentence))
            continue
        after = sentences[place + 1] if place + 1 < len(sentences) else ""
        if (needs_mark and not marked) or (denied and verdict == ENTAILED):
            return None
        if (after and not closed) or (response.verdict != verdict and _taken_back(after)):
            return None
        before, as_answer = state(sentences[place - 1]) if place else (None, False)
        contradicted = before not in (None, verdict) and (as_answer or not marked)
        return None if contradicted and verdict != response.verdict else verdict
    return None


def _statement(sentence: str) -> tuple[str | None, bool]:
    """(verdict, whether marked as the answer) of one sentence; None where it is no statement."""
    for start in _beginnings(sentence):
        place, marked = _lead(sentence, start)
        found = _ENTAILMENT.match(sentence, place)
        if found and _tail_is_harmless(found["tail"] or ""):
            said = found.groupdict()
            no = any(said[name] is not None for name in ("no1", "no2", "no3", "no4"))
            return (NOT_ENTAILED if no else ENTAILED), marked
    return None, False


def _beginnings(sentence: str) -> list[int]:
    """Where a statement may begin: the start, after a reason put first, at "so" after a clause."""
    if len(sentence) > _LONGEST_SENTENCE:
        return []
    places = [found.end() for found in _CONSEQUENCE.finditer(sentence)]
    if _REASON_FIRST.match(sentence):
        places += [found.end() for found in _CLAUSE.finditer(sentence)]
    return [0, *places]


def _lead(sentence: str, place: int) -> tuple[int, bool]:
    """(where the opening and the marker end, whether there is a marker)."""
    while found := _HEAD.match(sentence, place):
        place = found.end()
    marked = False
    while found := _AS_ANSWER.match(sentence, place):
        # "it's", "that is" may also be the subject of what is said
        if _ENTAILMENT.match(sentence, place):
            break
        if not marked and found["link"] is not None:
            break
        marked = True
        place = found.end() + len(sentence[found.end() :]) - len(sentence[found.end() :].lstrip())
    return place, marked


def _taken_back(words: str) -> bool:
    return bool(TAKEN_BACK.match(words) or _RESTRICTED.match(words))


def _tail_is_harmless(tail: str) -> bool:
    """Whether what follows a verdict is nothing, or a reason that does not touch it."""
    kind = _TAIL.match(tail)
    if kind is None or _DOUBT.search(tail) or _MENTION.search(tail):
        return False
    if kind["by"]:
        return not _DENIAL.search(re.split(rf"\b{_BECAUSE}\b", tail)[0])
    if kind["apart"]:
        return not _taken_back(tail)
    return True


def _sentences(text: str) -> list[str]:
    """Sentences of the end of `text`, lower case, freed of typography; a marker with its verdict."""
    text = fold(text[-_WINDOW:]).lower()
    text = re.sub(r"<\s*(answer|verdict|label)\s*>", r"\n\1: ", text)
    text = re.sub(r"<[^<>\n]{0,60}>", " ", text)
    text = re.sub(r"\\(?:boxed|fbox|text\w*|math\w*)\s*(?=\{)", " ", text)
    text = re.sub(r"!(?=\w)|~(?=\w)|\u2260|\u274c|\u2717|\u2718|\u00d7", " \u00ac ", text)
    text = re.sub(r"[()]", " - ", text)
    text = re.sub(r"[*_`#\"{}\[\]$|\\\u00ab\u00bb>]|(?<!\w)'|'(?!\w)", " ", text)
    text = re.sub(r"[^\S\n]+", " ", text)
    text = re.sub(r"(\bnot|\bnon-?)\s*\n\s*(?=entail)", r"\1 ", text)
    text = re.sub(
        rf"({_MARKER}[^\w\n]*[:=][^\w\n]*|(?:^|\n)[^\w\n]*{_MARKER}[^\w\n]*)\n\s*", r"\1: ", text
    )
    pieces = re.split(r"\n+|(?<=[.;!?])(?:\s+|$)", text)
    return [
        piece.strip(" \t-+.,:;/") + ("?" if piece.rstrip().endswith("?") else "")
        for piece in pieces
        if re.search(r"\w", piece)
    ]


@functools.lru_cache(maxsize=16)
def _choices_of(labels: LabelSet) -> re.Pattern[str]:
    """One of several labels and what may follow it."""
    names = "|".join(sorted(map(re.escape, labels.spellings), key=len, reverse=True))
    reason = rf"[\W_]*$|\s*[:.,\-](?!\s*(?:or|and|not)\b)|\s+{_BECAUSE}\b"
    return re.compile(
        rf"(?:(?:option|choice)\s+)?(?P<label>{names})(?![^\W_])(?P<tail>(?:{reason}).*)$",
        re.DOTALL,
    )


def _choice(labels: LabelSet, sentence: str) -> tuple[str | None, bool]:
    """(label, whether marked as the answer) of one sentence, for labels without a negated form."""
    for start in _beginnings(sentence):
        place, marked = _lead(sentence, start)
        found = _choices_of(labels).match(sentence, place)
        if (
            found
            and not _DOUBT.search(found["tail"])
            and not re.search(r"\b(?:or|and)\b", found["tail"])
        ):
            return labels.spellings[found["label"]], marked
    return None, False
