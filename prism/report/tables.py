"""Tables and figures, as the page has them."""

from collections.abc import Sequence
from html import escape

MISSING = '<span class="missing">not measured</span>'


def table(heads: Sequence[str], lines: Sequence[Sequence[str]], kind: str = "texts") -> str:
    """Returns a table of `texts` or `numbers`; the cells are HTML, the first of a line is its head."""
    head = "".join(f"<th>{one}</th>" for one in heads)
    body = "".join(f"<tr><th>{line[0]}</th>{''.join(f'<td>{cell}</td>' for cell in line[1:])}</tr>" for line in lines)
    return f'<div class="wide {kind}"><table><tr>{head}</tr>{body}</table></div>'


def figure(title: str, meaning: str, drawn: str, below: str) -> str:
    """Returns a chart with its title and what it means."""
    said = f"<strong>{escape(title)}</strong> <span>{escape(meaning)}</span>"
    return f"<figure><figcaption>{said}</figcaption>{drawn}{below}</figure>"
