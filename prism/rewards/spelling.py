"""One spelling of an answer: digits, signs and fractions in one form; no box, markup or phrase around it."""

import re
import unicodedata

from prism.rewards.forms import closes_at_end

# replaced before NFKC, which would make x² into x2 and 3½ into 31/2
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
# before NFKC, which makes it 1; alone it names itself
_CIRCLED = re.compile(r"([①-⑳])(?=\s*[^\s①-⑳,;、，；.。])")
# 25_000 as programmers group digits
_UNDERSCORED = re.compile(r"(?<![\w.])\d{1,3}(?:_\d{3})+(?![\w])")
# sinx
_FUNCTION_OF_X = re.compile(r"(?<![a-zA-Z])((?:arc)?(?:sin|cos|tan|cot|sec|csc)|ln|log)(?=[xθ](?![a-z]))")
_ANGLE = re.compile(r"\b(?:sin|cos|tan|cot|sec|csc)\b")
_IN_DEGREES = re.compile(r"(?<=\d)\s*degrees?\b", re.IGNORECASE)
_POWERS = (
    (re.compile(r"(?<=[\w)])\s+squared\b", re.IGNORECASE), "^2"),
    (re.compile(r"(?<=[\w)])\s+cubed\b", re.IGNORECASE), "^3"),
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
# markup around a whole answer
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
# the most wrappers and phrases that are removed from one answer
_MOST_LAYERS = 8
_INLINE = re.compile(r"(?<![\\$])\$([^$]+)\$(?!\$)")
_PHRASE = re.compile(
    r"(?:(?:so|thus|hence|therefore|finally)\b,?\s*)?"
    r"(?:(?:the|my|our)\s+)?(?:(?:final|correct|right|best)\s+)?"
    r"(?:(?:answer|result|solution|option|choice)\s*(?:(?:is|are|equals|would be)\b\s*:?|:|=)"
    r"|(?:there (?:are|is)|it is|it'?s)\b)\s*",
    re.IGNORECASE,
)
_CHINESE_PHRASE = re.compile(
    r"(?:所以|因此|故)?,?(?:最终|正确)?(?:答案|选项|结果)(?:是|为|选)?\s*:?\s*|(?:所以|因此|故)?选(?:择)?\s*:?\s*"
)
_TRAILING = " \t\r\n.,;:"


def clean(answer: str) -> str:
    """Returns an answer in one spelling: digits, signs and fractions in one form; no box, markup or phrase around."""
    text = _SUPERSCRIPT.sub(lambda m: "^{" + "".join(_SUPERSCRIPTS[c] for c in m[0]) + "}", answer)
    text = _CIRCLED.sub(lambda m: f" ({ord(m[1]) - ord('①') + 1}) ", text)
    text = _VULGAR.sub(lambda m: " " + unicodedata.normalize("NFKC", m[0]), text)
    # before NFKC, which makes these spaces plain ones
    text = _THIN_SPACE.sub("", text)
    text = unicodedata.normalize("NFKC", text.translate(_CHARACTERS)).translate(_CHARACTERS)
    text = _UNDERSCORED.sub(lambda m: m[0].replace("_", ""), text)
    text = _FUNCTION_OF_X.sub(r"\1 ", text)
    text = _IN_DEGREES.sub("°", text) if _ANGLE.search(text) else text
    text = _boxed(text)
    for pattern, spelt in _DRESS + _POWERS:
        text = pattern.sub(spelt, text)
    for _ in range(_MOST_LAYERS):
        before = text
        text = text.strip().rstrip(_TRAILING)
        if _starts_with_phrase(text):
            # a phrase alone is the answer
            text = _CHINESE_PHRASE.sub("", _PHRASE.sub("", text, count=1), count=1) or text
        for wrapper in _WRAPPERS:
            if match := wrapper.fullmatch(text):
                text = match[1]
        text = _without_group(text)
        if text == before:
            break
    # mathematics inside a text, as in $3$ cm; an amount of money has only one $
    text = _INLINE.sub(r"\1", text).replace("\\$", "$")
    return re.sub(r"\s+", " ", text).strip()


def _starts_with_phrase(text: str) -> bool:
    return bool(_PHRASE.match(text) or _CHINESE_PHRASE.match(text))


def _boxed(text: str) -> str:
    """Returns the content of the only box and the text after it; each of several boxes becomes its content."""
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
    """Returns the text without outer braces, unless they hold a list: LaTeX's grouping, not a set."""
    if text.startswith("{") and text.endswith("}") and "," not in text and closes_at_end(text):
        return text[1:-1]
    return text
