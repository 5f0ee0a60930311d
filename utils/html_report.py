"""A report as a single HTML file, with its tables and pictures inside."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from utils.files import write_text_atomic
from utils.scripts import printable

_STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h1, h2 { line-height: 1.2; overflow-wrap: anywhere }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #8886; padding-bottom: .2rem }
.scroll { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .8rem; border-bottom: 1px solid #8884; text-align: left; white-space: nowrap }
td.number, th.number { text-align: right }
figure { margin: 1.5rem 0 } img { max-width: 100%; background: white } figcaption { opacity: .8 }
.warning { border-left: 4px solid #c60; padding: .3rem .8rem; background: #c601 }
nav a { margin-right: 1rem }
"""
_TYPES = {".png": "png", ".jpg": "jpeg"}


class HtmlReport:
    """Collects sections in order; `write` makes the file. All text is escaped."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._sections: list[str] = []
        self._body: list[str] = []

    def section(self, title: str) -> None:
        """Begin a section; it gets a link at the top of the page."""
        self._sections.append(title)
        self._body.append(f'<h2 id="s{len(self._sections)}">{_text(title)}</h2>')

    def text(self, text: str) -> None:
        """A paragraph."""
        self._body.append(f"<p>{_text(text)}</p>")

    def warning(self, text: str) -> None:
        """A paragraph that stands out."""
        self._body.append(f'<p class="warning">{_text(text)}</p>')

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[str | int | float | None]]) -> None:
        """A table. Numbers stand to the right, with thousands separators where they are whole; None is an empty cell.

        What needs a certain number of decimals is given as text.
        """
        rows = [list(row) for row in rows]
        numeric = [
            any(row[i] not in (None, "") for row in rows) and all(_is_number(row[i]) for row in rows)
            for i in range(len(columns))
        ]
        kinds = [' class="number"' if number else "" for number in numeric]
        head = "".join(f"<th{kind}>{_text(name)}</th>" for name, kind in zip(columns, kinds, strict=True))
        body = "".join(
            "<tr>" + "".join(f"<td{kind}>{_cell(cell)}</td>" for cell, kind in zip(row, kinds, strict=True)) + "</tr>\n"
            for row in rows
        )
        self._body.append(f'<div class="scroll"><table><tr>{head}</tr>\n{body}</table></div>')

    def picture(self, path: Path, caption: str) -> None:
        """The PNG or JPEG file at `path`, as it is now, inside the page."""
        data = base64.b64encode(path.read_bytes()).decode()
        source = f"data:image/{_TYPES[path.suffix]};base64,{data}"
        self._body.append(
            f'<figure><img alt="{_text(path.stem)}" src="{source}"><figcaption>{_text(caption)}</figcaption></figure>'
        )

    def write(self, path: Path) -> None:
        """Write the page, whole or not at all."""
        links = "".join(f'<a href="#s{i}">{_text(name)}</a>' for i, name in enumerate(self._sections, 1))
        title = _text(self._title)
        write_text_atomic(
            path,
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{title}</title><style>{_STYLE}</style></head>\n<body><h1>{title}</h1>\n<nav>{links}</nav>\n"
            + "\n".join(self._body)
            + "\n</body></html>\n",
        )


def _text(text: str) -> str:
    """The text for a page, which may not have control characters."""
    return escape(printable(text))


def _is_number(cell: str | int | float | None) -> bool:
    if cell is None or isinstance(cell, int | float):
        return True
    # Also "(63.750 %)", which is what too few pairs are told in.
    bare = cell.strip().removeprefix("(").removesuffix(")").lstrip("+-").replace(",", "").replace(".", "")
    return not cell.strip() or bare.rstrip(" %").isdigit()


def _cell(cell: str | int | float | None) -> str:
    if cell is None:
        return ""
    return f"{cell:,}" if isinstance(cell, int) else _text(str(cell))
