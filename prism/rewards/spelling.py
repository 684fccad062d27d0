r"""One spelling for answers that are written in many ways: Unicode, full width, LaTeX's dress, phrases around them."""

import re
import unicodedata

# NFKC would make x² into x2 and 3½ into 31/2, so these are spelt before it
_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n"))
_SUPERSCRIPT = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
_VULGAR = re.compile("[¼-¾⅐-⅞]")
_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("−‒–—―﹣－", "-"),
        **dict.fromkeys("，、", ","),
        **dict.fromkeys("‘’`´′", "'"),
        **dict.fromkeys("“”", '"'),
        **dict.fromkeys("\u200b\u200c\u200d\ufeff\u2060", ""),
        "。": ".",
        "～": "~",
        "﹪": "%",
        "º": "°",
        "˚": "°",
        "″": '"',
        "⁄": "/",
        "∕": "/",
        "：": ":",
    }
)
# spaces that group digits, but never separate two numbers
_THIN_SPACE = re.compile(r"(?<=\d)(?:[\u2009\u202f\u00a0]|\\,|\\!|\{,\}\s?|\\;)(?=\d{3}(?!\d))")
_DRESS = (
    (re.compile(r"\\(?:left|right|bigl?|bigr|Bigl?|Bigr|displaystyle|textstyle|limits|mathstrut)(?![a-zA-Z])"), ""),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"(?<!\\)\\(?:quad|qquad|,|;|:|!| )|~(?=[\\a-zA-Z])"), " "),
    (re.compile(r"\^\{?\\circ\}?|\\degree(?![a-zA-Z])|\^\{?°\}?"), "°"),
    (
        re.compile(r"\\(?:text|mathrm|textbf|textit|mathbf|mbox|textrm|operatorname|rm|bf|mathit)\s*\{([^{}]*)\}"),
        r" \1 ",
    ),
    (re.compile(r"\\([%#&_])"), r"\1"),
    (re.compile(r"\\(?:le|leqslant)(?![a-zA-Z])"), r"\\leq"),
    (re.compile(r"\\(?:ge|geqslant)(?![a-zA-Z])"), r"\\geq"),
)
# markers of mathematics around the whole answer
_WRAPPERS = (
    re.compile(r"\$\$([^$]+)\$\$"),
    re.compile(r"\$((?:\\\$|[^$])+)(?<!\\)\$"),
    re.compile(r"\\\((.+)\\\)", re.DOTALL),
    re.compile(r"\\\[(.+)\\\]", re.DOTALL),
    re.compile(r"\*\*([^*]+)\*\*"),
    re.compile(r"`([^`]+)`"),
    re.compile(r'"([^"]+)"'),
    re.compile(r"'([^']+)'"),
)
# of wrappers and phrases around one answer
_MOST_LAYERS = 8
_INLINE = re.compile(r"(?<![\\$])\$([^$]+)\$(?!\$)")
_PHRASE = re.compile(
    r"(?:(?:so|thus|hence|therefore|finally)\b,?\s*)?"
    r"(?:(?:the|my|our)\s+)?(?:(?:final|correct|right|best)\s+)?"
    r"(?:(?:answer|result|solution|option|choice)\s*(?:(?:is|are|equals|would be)\b\s*:?|:|=)"
    r"|(?:there (?:are|is)|it is|it's)\b)\s*",
    re.IGNORECASE,
)
_CHINESE_PHRASE = re.compile(
    r"(?:所以|因此|故)?,?(?:最终|正确)?(?:答案|选项|结果)(?:是|为|选)?\s*:?\s*|(?:所以|因此|故)?选(?:择)?\s*:?\s*"
)
_TRAILING = " \t\r\n.,;:"


def clean(answer: str) -> str:
    """Returns an answer without the dress: one form for digits, signs and fractions, no box, no markers, no phrase."""
    text = _SUPERSCRIPT.sub(lambda m: "^{" + "".join(_SUPERSCRIPTS[c] for c in m[0]) + "}", answer)
    text = _VULGAR.sub(lambda m: " " + unicodedata.normalize("NFKC", m[0]), text)
    # before NFKC makes these spaces plain
    text = _THIN_SPACE.sub("", text)
    text = unicodedata.normalize("NFKC", text.translate(_CHARACTERS)).translate(_CHARACTERS)
    text = _boxed(text)
    for pattern, spelt in _DRESS:
        text = pattern.sub(spelt, text)
    for _ in range(_MOST_LAYERS):
        before = text
        text = text.strip().rstrip(_TRAILING)
        text = _CHINESE_PHRASE.sub("", _PHRASE.sub("", text, count=1), count=1) if _starts_with_phrase(text) else text
        for wrapper in _WRAPPERS:
            if match := wrapper.fullmatch(text):
                text = match[1]
        text = _without_group(text)
        if text == before:
            break
    # mathematics inside a text, as in $3$ cm; money has no second sign
    text = _INLINE.sub(r"\1", text).replace("\\$", "$")
    return re.sub(r"\s+", " ", text).strip()


def _starts_with_phrase(text: str) -> bool:
    return bool(_PHRASE.match(text) or _CHINESE_PHRASE.match(text))


def _boxed(text: str) -> str:
    """Returns what the only box holds with what follows it; several boxes stay where they are, as their contents."""
    boxes = []
    for match in re.finditer(r"\\(?:boxed|fbox)\s*\{", text):
        depth = 1
        for end in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                boxes.append((match.start(), match.end(), end))
                break
    if len(boxes) == 1:
        _, begin, end = boxes[0]
        return text[begin:end] + re.sub(r"^\s*(?:\$\$?|\\[\])])", "", text[end + 1 :])
    for start, begin, end in reversed(boxes):
        text = text[:start] + text[begin:end] + text[end + 1 :]
    return text


def _without_group(text: str) -> str:
    """Returns the text without braces around all of it that hold no list: LaTeX's grouping, not a set."""
    if text.startswith("{") and text.endswith("}") and "," not in text and closes_at_end(text):
        return text[1:-1]
    return text


def closes_at_end(text: str) -> bool:
    """Returns whether the bracket that opens a text is closed by its last character and not before."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return place == len(text) - 1
    return False
