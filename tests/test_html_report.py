"""Reports are whole pages that load nothing and show text as it is."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from utils.face_sheets import draw_contact_sheet
from utils.html_report import HtmlReport


class _Page(HTMLParser):
    """Collects the text of cells, and every address that the page would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[tuple[str, str]] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag in ("td", "th"):
            self.cells.append((dict(attrs).get("class") or "", ""))
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            kind, text = self.cells[-1]
            self.cells[-1] = (kind, text + data)


def test_page(tmp_path: Path) -> None:
    """Names of people and files cannot break the page; pictures are inside; numbers stand to the right."""
    draw_contact_sheet(tmp_path / "faces.png", [np.zeros((8, 8, 3), np.uint8)], 1, "faces")
    report = HtmlReport('A & B <script>alert("x")</script>')
    report.section("Faces <1>")
    report.text("a < b")
    report.warning("beware of <b>")
    report.table(("name", "images", "share"), [("<i>Ann</i>", 12345, " 97.100 %"), ("B\x1bob", None, "(3.000 %)")])
    report.picture(tmp_path / "faces.png", 'who is "who"')
    report.write(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = _Page(text)
    assert not page.open, "every element is closed"
    assert "<script" not in text
    assert "<i>" not in text
    assert page.cells == [
        ("", "name"), ("number", "images"), ("number", "share"),
        ("", "<i>Ann</i>"), ("number", "12,345"), ("number", " 97.100 %"),
        ("", r"B\x1bob"), ("number", ""), ("number", "(3.000 %)"),
    ]  # fmt: skip
    assert [address.split(",")[0] for address in page.addresses] == ["#s1", "data:image/png;base64"]
    assert not re.search(r"(https?:)?//", re.sub(r"base64,[^\"]+", "", text)), "nothing is loaded from elsewhere"
