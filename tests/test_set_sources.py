"""Lists of images: what people's programs write is read, and a mistake is named with its line."""

from pathlib import Path

import pytest

from data.face_sets import FaceSetError
from data.set_sources import LANDMARK_COLUMNS, ListedFaceSet
from data.verification_bin import write_bin


def written(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_text(text, newline="", encoding=encoding)
    return path


BAD_LISTS = {
    "im2rec columns": ("1\t0\ta.png\n2\t0\tb.png\t9\n", r"list, line 2: 4 columns, expected 3 \(index label path\)"),
    "im2rec label": ("1\t0\ta.png\n\n2\t0.5\tb.png\n", r"list, line 3: label '0\.5' is no identity number"),
    "im2rec negative label": ("1\t-1\ta.png\n", "list, line 1: label '-1' is no identity number"),
    "face2rec columns": ("1\ta.png\t0\n1\tb.png\t0\t5\n", r"list, line 2: 4 columns, expected 3 .*, 7 .* or 17"),
    "face2rec label": ("1\ta.png\t0\n1\tb.png\tbert\n", "list, line 2: label 'bert' is no identity number"),
    "face2rec aligned": ("1\ta.png\t0\n2\tb.png\t0\n", "list, line 2: the first column .* 0 or 1, found '2'"),
    "face2rec without landmarks": ("0\ta.png\t0\n", "list, line 1: the face is not aligned .* no landmarks"),
    "face2rec landmark": ("0\ta.png\t0" + "\t1" * 13 + "\tx\n", "list, line 1: 'x' is no coordinate"),
    "infinite landmark": ("0\ta.png\t0" + "\t1" * 13 + "\tinf\n", "list, line 1: 'inf' is no coordinate"),
    "zero bytes": ("1\t0\ta.png\n2\t0\tb\0.png\n", r"list, line 2: 'b\\x00\.png' is no path"),
    "no path": ("1\t0\ta.png\n2\t0\t \n", "list, line 2: its path is empty"),
    "unknown kind": ("a\tb\tc\n", "list: its first line .* neither face2rec's .* nor im2rec's"),
    "csv header": (
        "path,who\na.png,0\n",
        "list: its header 'path,who' lacks label; expected a .rec file, a tab-separated",
    ),
    "csv landmark columns": ("path,label,x1,y1\na.png,0,1,1\n", "lacks x2, y2"),
    "csv columns": ("path,label\na.png,0\n\nb.png\n", "list, line 4: 1 columns, expected 2"),
    "csv label": ("path,label\na.png, \n", "list, line 2: its label is empty"),
    "csv landmark": (
        f"path,label,{','.join(LANDMARK_COLUMNS)}\na,0,1,2,3,4,5,6,7,8,9,\n",
        "list, line 2: '' is no coord",
    ),
    "csv landmark nan": (f"path,label,{','.join(LANDMARK_COLUMNS)}\na,0,1,2,3,4,5,6,7,8,9,nan\n", "'nan' is no coord"),
    "nothing": ("", "list: its header '' lacks path"),
    "only a header": ("path,label\n", "list names no images"),
    "binary": ("\x00\x01\x02" * 99, "list is no list, for it is no text$"),
}


@pytest.mark.parametrize(("text", "message"), BAD_LISTS.values(), ids=BAD_LISTS.keys())
def test_bad_lists(tmp_path: Path, text: str, message: str) -> None:
    """Every mistake in a list names the list and its line, counted as an editor counts."""
    with pytest.raises(FaceSetError, match=message):
        ListedFaceSet(written(tmp_path / "list", text))


def test_a_verification_set_is_no_list(tmp_path: Path) -> None:
    """A .bin among the sets to pack is told what it is for, not shown its bytes."""
    write_bin(tmp_path / "lfw.bin", [b"one", b"two"], [True])
    with pytest.raises(FaceSetError, match=r"lfw\.bin is no list, for it is no text: pairs .* all_pair_test\.py"):
        ListedFaceSet(tmp_path / "lfw.bin")


LISTS = {
    "csv": "path,label\na/1.png,a\nb/1.png,\u00f6\n",
    "csv of Excel": "path;label;\r\na/1.png;a;\r\nb/1.png;\u00f6;\r\n;;\r\n ;;\r\n",
    "im2rec": "0\t0\ta/1.png\n1\t1\tb/1.png\n",
    "face2rec": "1\ta/1.png\t0\n1\tb/1.png\t1\n",
}


@pytest.mark.parametrize("text", LISTS.values(), ids=LISTS.keys())
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_and_empty_rows(tmp_path: Path, text: str, encoding: str) -> None:
    """Excel's "Unicode text" and PowerShell write UTF-16; rows without a cell that says something are no images."""
    faces = ListedFaceSet(written(tmp_path / "list", text, encoding))
    assert [faces.relative_file(i) for i in range(len(faces))] == ["a/1.png", "b/1.png"]
    assert faces.identities == (["a", "\u00f6"] if "\u00f6" in text else ["0", "1"])
    assert faces.labels.tolist() == [0, 1]


@pytest.mark.parametrize("text", ["0\t7\tnan\n", "1\tnan\t7\n"], ids=["im2rec", "face2rec"])
def test_a_file_called_nan_is_no_number(tmp_path: Path, text: str) -> None:
    """What tells the two kinds of lists apart is which field is the path."""
    faces = ListedFaceSet(written(tmp_path / "list", text))
    assert (faces.relative_file(0), faces.identities) == ("nan", ["7"])


def test_cut_utf16_is_named(tmp_path: Path) -> None:
    """Half a letter at its end is the trace of a copy that broke off."""
    path = written(tmp_path / "list", LISTS["csv"], "utf-16")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="list cannot be read as UTF-16"):
        ListedFaceSet(path)


def test_labels_that_pandas_wrote(tmp_path: Path) -> None:
    """`7.0` and `7` are one person, and numbers keep their order; what is no whole number stays a name."""
    labels = ["10.0", "9", "10", "9.", "1.5", "v2.0", ".0", "7.0.0"]
    rows = [f"{i}.png,{label}\n" for i, label in enumerate(labels)]
    faces = ListedFaceSet(written(tmp_path / "all.csv", "path,label\n" + "".join(rows)))
    assert set(faces.identities) == {"10", "9", "1.5", "v2.0", ".0", "7.0.0"}
    faces = ListedFaceSet(written(tmp_path / "numbers.csv", "path,label\n" + "".join(rows[:4])))
    assert faces.identities == ["9", "10"]


def test_a_line_is_that_in_which_its_row_begins(tmp_path: Path) -> None:
    """A name may have a line end in it; the first line of the row is where an editor goes to mend it."""
    text = 'path,label\na.png,"two\nlines"\nb.png,"cut\n\noff",more\n'
    with pytest.raises(FaceSetError, match="list, line 4: 3 columns, expected 2"):
        ListedFaceSet(written(tmp_path / "list", text))


QUOTES = {
    "never closed": ('path,label\na.png,0\nb.png,"one\nc.png,2\n', "line 3: unexpected end of data: is a quote"),
    "closed later": (
        'path,label\na.png,0\nb.png,"one\nc.png,"two"\n',
        "line 3: .*or does something follow it",
    ),
}


@pytest.mark.parametrize(("text", "message"), QUOTES.values(), ids=QUOTES.keys())
def test_a_quote_that_is_not_closed_swallows_no_images(tmp_path: Path, text: str, message: str) -> None:
    """All lines behind it were one name, and their images in no set, without a word."""
    with pytest.raises(FaceSetError, match=f"list, {message}"):
        ListedFaceSet(written(tmp_path / "list", text))
