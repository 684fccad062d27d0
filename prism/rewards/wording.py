"""What the words around an answer say: sentences that give it, hedges and second thoughts that take it back."""

import re
from typing import NamedTuple

NEGATIONS = frozenset(["not", "no", "never", "none", "neither", "nor", "cannot", "nope", "without"])
CONDITIONS = frozenset(["if", "unless", "assuming", "provided", "depends", "depending", "sometimes"])
SECOND_THOUGHTS = frozenset(["wait", "hmm", "hm", "um", "uh", "oops", "sorry", "scratch", "correction"])
_HEDGE_WORDS = """
maybe perhaps possibly probably likely unlikely presumably supposedly apparently might guess think believe suppose
unsure uncertain unclear doubtful seems seem hopefully something idk
"""
HEDGES = frozenset(_HEDGE_WORDS.split())
CONTRASTS = frozenset(["actually", "rather", "instead", "however", "though", "although", "but"])
FALSE = frozenset(["wrong", "incorrect", "false", "untrue", "invalid", "mistaken", "erroneous", "impossible"])
_QUESTIONS = frozenset(["what", "which", "who", "whose", "whom", "where", "when", "why", "how", "yes"])

# no subject of a sentence that gives an answer has one of these
_NO_SUBJECT = NEGATIONS | CONDITIONS | SECOND_THOUGHTS | HEDGES | CONTRASTS | FALSE | _QUESTIONS
_UNSETTLED = CONDITIONS | SECOND_THOUGHTS | HEDGES
_UNSETTLED_PHRASE = re.compile(
    r"\bnot\s+(?:\w+ly\s+|so\s+|very\s+|quite\s+)?(?:sure|certain)\b|\b(?:do not|don't|dont) know\b|\bno idea\b"
    r"|\bi\s+(?:\w+ly\s+)?(?:doubt|disagree)\b|\bhard to (?:say|tell)\b|\bon second thoughts?\b|\?"
)
_SPOKEN = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")


def _has(text: str, words: frozenset[str]) -> bool:
    said = {word.lower() for word in _SPOKEN.findall(text)}
    return bool(said & words) or ("not" in words and any(word.endswith("n't") for word in said))


class Statement(NamedTuple):
    """A sentence that gives an answer: "The area is 12" has the subject "The area" and the value "12"."""

    subject: str
    value: str


_SO = r"(?:(?:so|thus|hence|therefore|then|finally)\b,?\s*)?"
_VERBS = (
    r"(?:is equal to|are equal to|is|are|was|were|equals?|has|have|costs|weighs|measures|contains|gives|yields"
    r"|amounts to|comes to|turns out to be)"
)
_VERB = re.compile(rf"(?<![\w'\\])(?:{_VERBS}(?![\w'])|=)", re.IGNORECASE)
_WE_GET = re.compile(
    rf"{_SO}(?:we|i|you)\s+(?:get|got|have|had|obtain|obtained|find|found|see|count|counted|choose|chose|pick|select)\s+(?:that\s+)?(?P<value>\S.*)",
    re.IGNORECASE | re.DOTALL,
)
_IS_THE_ANSWER = re.compile(
    r"(?P<value>\S.*?)\s+is\s+(?:the|my|our)\s+(?:(?:final|correct|right|best)\s+)?"
    r"(?:answer|result|solution|option|choice)"
    # what is not an option or a number may be a claim, which is correct
    r"|(?P<short>[(\[]?[A-J][)\]]?|[-+$(]?\d\S*)\s+is\s+(?:correct|right)",
    re.IGNORECASE | re.DOTALL,
)
_BECAUSE = re.compile(r"(?P<value>\S.*?),?\s+(?:because|since)\s+(?P<reason>.*)", re.IGNORECASE | re.DOTALL)
_SUBJECT = re.compile(r"[^,;:?!=<>\n]{1,120}")
# "Area = 12" and "Area: 12"; what algebra can read is left to it
_LABEL = re.compile(r"[^\W\d_]+(?:\s+[^\W\d_]+){0,7}")
_LABEL_WORD = re.compile(r"[^\W\d_]{3,}")
_MOST_WORDS = 14
_NAME = re.compile(r"[a-zA-Z]")


def read_statement(text: str) -> Statement | None:
    """Returns the subject and the value of a sentence that gives an answer, or None.

    There is one verb only, and the subject denies, doubts and asks nothing. The value may still be no answer. A reason
    after it is dropped unless it doubts.
    """
    if match := _BECAUSE.fullmatch(text):
        doubted = _has(match["reason"], _UNSETTLED) or _UNSETTLED_PHRASE.search(match["reason"].lower())
        return None if doubted else read_statement(match["value"]) or Statement("", match["value"])
    if match := _WE_GET.fullmatch(text):
        return Statement("", match["value"])
    if (match := _IS_THE_ANSWER.fullmatch(text)) and not _has(match["value"] or "", _NO_SUBJECT):
        return Statement("", match["value"] or match["short"])
    verbs = list(_VERB.finditer(text))
    # "The area is 3*4 = 12"
    if len(verbs) > 1 and all(verb[0] == "=" for verb in verbs[1:]) and verbs[0][0] != "=":
        verbs = verbs[:1]
    if len(verbs) == 1:
        subject, value = text[: verbs[0].start()].strip(), text[verbs[0].end() :].strip()
        label = verbs[0][0] == "="
    elif not verbs and text.count(":") == 1:
        subject, value = (part.strip() for part in text.split(":"))
        label = True
    else:
        return None
    subject = re.sub(f"^{_SO}", "", subject, flags=re.IGNORECASE)
    if not value or not _SUBJECT.fullmatch(subject) or len(subject.split()) > _MOST_WORDS:
        return None
    if label and not (_LABEL.fullmatch(subject) and _LABEL_WORD.search(subject)):
        return None
    if _has(subject, _NO_SUBJECT):
        return None
    # the name stays: "x equals 3" does not answer y = 3
    return Statement(subject, f"{subject} = {value}" if _NAME.fullmatch(subject) and subject != "I" else value)


def same_subject(one: Statement, other: Statement) -> bool:
    """Returns whether one subject has all words of the other: the area, the area of the square."""
    words = [set(_SPOKEN.findall(statement.subject.lower())) - {"the", "a", "an"} for statement in (one, other)]
    return words[0] <= words[1] or words[1] <= words[0]


_TRUTH = {
    **dict.fromkeys(("yeah", "yep", "yup", "absolutely", "definitely", "certainly", "of course", "indeed"), True),
    **dict.fromkeys(("nope", "nah", "not at all", "absolutely not", "definitely not", "of course not"), False),
    **dict.fromkeys(("yes", "true", "correct", "是", "是的", "对", "正确"), True),
    **dict.fromkeys(("no", "false", "incorrect", "wrong", "否", "不是", "错", "错误"), False),
}
_PRONOUN = r"(?:it|he|she|they|we|you|i|that|this|these|those|there)"
_TRUTH_FIRST = re.compile(
    r"(?P<word>(?P<plain>yes|no)|true|false|correct|incorrect|wrong)(?:\s*[,.;:!]+|\s+-+(?=\s)"
    rf"|\s+(?=(?:because|since)\b)|(?(plain)\s+(?={_PRONOUN}\b)|(?!)))(?P<rest>.*)",
    re.IGNORECASE | re.DOTALL,
)
_END = r"(?=\s*(?:[,.;:!?)]|$))"
# "that is not correct", "it isn't", "no, true"; but not "the correct value", nor "no side is longer"
_SAID_TRUTH = re.compile(
    rf"(?:(?:^|[,.;:!(])\s*|\b(?:is|are|was|were|be|it's|that's)(?P<negated>\s*n't|\s+not)?\s+(?:\w+ly\s+)?)"
    rf"(?P<word>true|false|correct|incorrect|wrong|right){_END}"
)
_SAID_YES_OR_NO = re.compile(rf"\b(?P<word>yes|no){_END}|\b(?P<before>yes|no)\s+{_PRONOUN}\b")
_SAID_IT_IS = re.compile(
    rf"\b{_PRONOUN}\s*(?:is|are|was|were|does|do|did|can|could|will|would|has|have|had|should|must)"
    rf"(?P<negated>\s*n't|\s*not)?{_END}"
)


def read_truth(text: str) -> bool | None:
    """Returns what a text says to a question for yes or no, or None: "Yes, it is." says yes, "Yes, maybe" nothing."""
    if (truth := _TRUTH.get(text.lower())) is not None:
        return truth
    match = _TRUTH_FIRST.fullmatch(text)
    if match is None:
        return None
    truth, rest = _TRUTH[match["word"].lower()], match["rest"].lower().strip()
    if _has(rest, _UNSETTLED) or _UNSETTLED_PHRASE.search(rest):
        return None
    said = [bool(_TRUTH.get(m["word"], True)) is not bool(m["negated"]) for m in _SAID_TRUTH.finditer(rest)]
    said += [(m["word"] or m["before"]) == "yes" for m in _SAID_YES_OR_NO.finditer(rest)]
    said += [not m["negated"] for m in _SAID_IT_IS.finditer(rest)]
    return truth if all(one is truth for one in said) else None


# I is a pronoun
_MENTION = r"(?-i:[(\[]\s*(?P<boxed>[A-J])\s*[)\]]|(?P<bare>[A-HJ])(?![\w']))"
_FILLER = (
    r"(?:not|no|never|nope|wait|actually|hmm+|oops|sorry|or|and|but|nor|rather|instead|maybe|perhaps|probably|possibly"
    r"|also|then|either|correction|scratch that|i mean|i meant|i think|i guess|i believe|it is|it's|its"
    r"|is|was|(?:(?:it|that|this) )?(?:should|could|might|may|can|must|cannot|can't) (?:also )?be"
    r"|(?:the )?(?:(?:correct|right|real|actual|final|best) )?(?:answer|option|choice))"
)
_VERDICT = (
    r"(?:a |an |the |my )?(?P<verdict>\w*correct|right|true|wrong|false|untrue|mistaken|possible|plausible|answer"
    r"|choice|option|(?:it|one)(?=[\s.!]*$))(?!\w)"
)
# not the point (A, B)
_OPTION = r"(?:\([A-J]\)|\[[A-J]\]|[A-J][)\]]?)"
_ONLY_OPTIONS = re.compile(rf"{_OPTION}(?:\s*(?:,\s*and|,\s*or|,|;|/|&|and|or)?\s*{_OPTION})*[\s.!?]*")
_SMALL_OPTION = re.compile(r"[(\[]?[a-j][)\]]")
_FIRST_WORDS = re.compile(
    # possessive, or the time would grow without bound with the number of fillers
    rf"[\s,.;:(-]*(?P<fillers>(?:{_FILLER}\b[\s,.;:!?-]*+)++){_MENTION}"
    r"\s*(?:$|[,.;:!?)]|(?:or|and|is|was|because|since|instead|too|as)\b)",
    re.IGNORECASE,
)
_OTHER_IS_RIGHT = re.compile(
    rf"[\s,.;:(-]*{_MENTION}\s+(?:is|was|seems|looks|may be|might be|could be)\s+(?:not\s+)?"
    rf"(?:also\s+|\w+ly\s+)?{_VERDICT}"
)
_IS_VERDICT = re.compile(rf"(?:is|was|seems|looks)(?P<negated>n't|\s+not)?\s+(?:\w+ly\s+)?{_VERDICT}", re.IGNORECASE)
_DOUBT = re.compile(
    r"(?:might|may|could)\s+be\b|(?:or|nor|versus|vs)\b|\?"
    r"|(?:(?:i|i'm|im|am|just|only|a|my)\s+)*(?:guess|think|believe|suppose|not sure|unsure|idk)[\s.!?]*$",
    re.IGNORECASE,
)
_SECOND_THOUGHT = re.compile(
    r"\bwait\b\s*(?:[,.;:!-]|no\b|it\b|that\b|actually\b)|\boops\b|\bscratch that\b|\bon second thought|\bi meant?\b"
    r"|\bcorrection\s*:",
    re.IGNORECASE,
)
# further labelled options, as in "A) 1 B) 2" and "A. 1 or B. 2"; of those with points alone only a listing counts
_BRACKETED = re.compile(r"\((?![A-J]\))[^()]*\)")
_NEXT_LABEL = re.compile(
    r"(?<![\w\\^_()])(?:\((?P<boxed>[A-J])\)|(?P<closed>[A-J])\))|(?:[,;/]|\bor\b|\band\b)\s*(?P<joined>[A-J])[.:](?=\s)"
)
_LISTED = re.compile(r"(?<!\S)([A-J])[.:]\s")


def takes_back(letter: str, text: str) -> bool:
    """Returns whether the text after a chosen option takes the choice back: "not B", "or C", "wait, it is A", "D"."""
    if _SMALL_OPTION.fullmatch(text):
        text = text.upper()
    if _ONLY_OPTIONS.fullmatch(text):
        return set(re.findall("[A-J]", text)) != {letter}
    if match := _FIRST_WORDS.match(text):
        other = (match["boxed"] or match["bare"]).upper() != letter
        return other or _has(match["fillers"], NEGATIONS | HEDGES)
    if match := _OTHER_IS_RIGHT.match(text):
        return (match["boxed"] or match["bare"]) != letter or not _approves(match)
    if match := _IS_VERDICT.match(text):
        return bool(match["negated"]) or not _approves(match)
    reason = re.match(r"(?:because|since)\b", text)
    if _DOUBT.match(text) or _SECOND_THOUGHT.search(text) or (reason and _has(text, _UNSETTLED)):
        return True
    labels = {m["boxed"] or m["closed"] or m["joined"] for m in _NEXT_LABEL.finditer(_BRACKETED.sub("", text))}
    return bool(labels - {letter}) or len(set(_LISTED.findall(text)) - {letter}) > 1


def _approves(match: re.Match[str]) -> bool:
    return match["verdict"].lower() in ("correct", "right", "true", "answer", "choice", "option", "it", "one") and (
        " not " not in match[0].lower()
    )
