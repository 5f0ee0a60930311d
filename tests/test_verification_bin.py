"""Verification sets: every spelling in the wild loads to the same bytes, and no file gets to run anything."""

import pickle
import pickletools
import re
import struct
import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import ROOT
from data.verification_bin import VerificationFileError, read_bin, write_bin

# Two pairs; the last image is long enough for the opcode of long strings, and the first is in both pairs.
ADA, BEA, CLEO = b"\xff\xd8 Ada \x00\n'", b"\x89PNG Bea", b"\xff\xd8 Cleo \xfe" * 40
IMAGES = [ADA, BEA, CLEO, ADA]
SAME = [True, False]


def python2_string(value: bytes) -> bytes:
    """What Python 2 wrote for a `str` under protocol 2: SHORT_BINSTRING or BINSTRING."""
    return b"U" + bytes([len(value)]) + value if len(value) < 256 else b"T" + struct.pack("<i", len(value)) + value


def python2_text(value: bytes) -> bytes:
    """What Python 2 wrote for a `str` under protocol 0: its repr."""
    return b"S" + repr(value)[1:].encode() + b"\n"


def python2_array(value: bytes) -> bytes:
    """What Python 2 with numpy wrote for a 1-D uint8 array under protocol 2."""
    shape = b"J" + struct.pack("<i", len(value)) + b"\x85"
    dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
    return empty + b"(K\x01" + shape + dtype + b"\x89" + python2_string(value) + b"tb"


def python2_codecs(value: bytes) -> bytes:
    """What Python 3 wrote for `bytes` under protocol 2."""
    text = value.decode("latin1").encode()
    return b"c_codecs\nencode\nX" + struct.pack("<I", len(text)) + text + b"X\x06\x00\x00\x00latin1\x86R"


def protocol2(images: list[bytes], same: bytes = b"\x88\x89") -> bytes:
    """`(images, [True, False])`, the images given as opcodes."""
    return b"\x80\x02](" + b"".join(images) + b"e](" + same + b"e\x86."


def arrays(shape: tuple[int, ...] = (-1,)) -> list[np.ndarray]:
    return [np.frombuffer(image, np.uint8).copy().reshape(shape) for image in IMAGES]


def under_numpy(name: str, pickled: bytes) -> bytes:
    """`pickled` as a numpy that calls its inner package `name` would have written it."""
    # Frames, which only help to read ahead, would have to state the changed length.
    if pickled[1] >= 4:
        assert pickled[2:3] == b"\x95"
        pickled = pickled[:2] + pickled[11:]
    for module in (b"multiarray", b"numeric"):
        old, new = b"numpy._core." + module, name.encode() + b"." + module
        pickled = pickled.replace(bytes([len(old)]) + old, bytes([len(new)]) + new)  # SHORT_BINUNICODE
        pickled = pickled.replace(b"c" + old + b"\n", b"c" + new + b"\n")  # GLOBAL
    return pickled


SPELLINGS = {
    "BINSTRING of Python 2": protocol2([python2_string(image) for image in IMAGES]),
    "BINSTRING, flags of protocol 0": protocol2([python2_string(image) for image in IMAGES], b"I01\nI00\n"),
    "STRING of Python 2": b"((l" + b"".join(python2_text(image) + b"a" for image in IMAGES) + b"(lI01\naI00\nat.",
    "BINBYTES": pickle.dumps((IMAGES, SAME), 3),
    "BINBYTES in frames": pickle.dumps((IMAGES, SAME), 4),
    "_codecs.encode by hand": protocol2([python2_codecs(image) for image in IMAGES]),
    "_codecs.encode": pickle.dumps((IMAGES, SAME), 2),
    "_codecs.encode, protocol 0": pickle.dumps((IMAGES, SAME), 0),
    "arrays of Python 2": protocol2([python2_array(image) for image in IMAGES]),
    "bytearrays": pickle.dumps(([*map(bytearray, IMAGES)], SAME), 5),
    "flags as numpy bools": pickle.dumps((IMAGES, [np.True_, np.False_]), 4),
    "flags as an array": pickle.dumps((IMAGES, np.array(SAME)), 2),
    "flags as numbers": pickle.dumps((IMAGES, [1, 0]), 4),
    "flags as an array of numbers": pickle.dumps((IMAGES, np.array([1, 0])), 4),
    "tuples for lists": pickle.dumps((tuple(IMAGES), tuple(SAME)), 4),
    **{
        f"arrays under {core}, protocol {protocol}": under_numpy(core, pickle.dumps((arrays(), SAME), protocol))
        for core in ("numpy.core", "numpy._core")
        for protocol in (2, 4, 5)
    },
    "column arrays, as cv2.imencode once gave": pickle.dumps((arrays((-1, 1)), SAME), 2),
    "row arrays": pickle.dumps((arrays((1, -1)), SAME), 5),
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_every_spelling(tmp_path: Path, spelling: bytes) -> None:
    """Whoever wrote the file, the same pairs come out, and no library warns that it will stop reading it."""
    (tmp_path / "lfw.bin").write_bytes(spelling)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pairs = read_bin(tmp_path / "lfw.bin")
    assert [pairs.images[i] for i in pairs.index.ravel()] == IMAGES
    assert pairs.same.tolist() == SAME
    assert (pairs.same.dtype, pairs.index.dtype, pairs.index.shape) == (np.bool_, np.int64, (2, 2))
    assert pairs.name == "lfw"


def test_the_spellings_by_hand_are_what_they_claim() -> None:
    """The hand-made pickles above use the opcodes and globals of the writers they stand for."""

    def uses(spelling: str) -> tuple[set[str], set[object]]:
        opcodes = list(pickletools.genops(SPELLINGS[spelling]))
        return {opcode.name for opcode, _, _ in opcodes}, {arg for opcode, arg, _ in opcodes if opcode.name == "GLOBAL"}

    assert {"SHORT_BINSTRING", "BINSTRING"} <= uses("BINSTRING of Python 2")[0]
    assert uses("_codecs.encode by hand")[1] == uses("_codecs.encode")[1] == {"_codecs encode"}
    numpy_globals = {"numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype"}
    assert uses("arrays of Python 2")[1] == numpy_globals
    assert uses("arrays under numpy.core, protocol 2")[1] == {*numpy_globals, "_codecs encode"}
    assert b"numpy.core.numeric" in SPELLINGS["arrays under numpy.core, protocol 5"]
    # And what Python 2 wrote is what a plain unpickler makes of it.
    plain = pickle.loads(SPELLINGS["BINSTRING of Python 2"], encoding="bytes")
    assert plain == (IMAGES, SAME)


def test_an_image_is_kept_once(tmp_path: Path) -> None:
    """Sets use an image in many pairs: it is stored, decoded and embedded once, however it is spelt."""
    for name in ("BINSTRING of Python 2", "BINBYTES", "arrays under numpy._core, protocol 4"):
        (tmp_path / "x.bin").write_bytes(SPELLINGS[name])
        pairs = read_bin(tmp_path / "x.bin")
        assert pairs.images == [ADA, BEA, CLEO]
        assert pairs.index.tolist() == [[0, 1], [2, 0]]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.binary(max_size=300), st.binary(max_size=3), st.booleans()), min_size=1, max_size=6))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, written: list[tuple[bytes, bytes, bool]]) -> None:
    """What `write_bin` writes, `read_bin` and insightface's reader (a plain unpickler) read."""
    path = tmp_path_factory.mktemp("bin") / "x.bin"
    images = [image for a, b, _ in written for image in (a, b)]
    same = [flag for _, _, flag in written]
    write_bin(path, images, same)
    pairs = read_bin(path)
    assert [pairs.images[i] for i in pairs.index.ravel()] == images
    assert pairs.same.tolist() == same
    with path.open("rb") as file:
        assert pickle.load(file, encoding="bytes") == (images, same)


def test_write_refuses_a_wrong_number_of_images(tmp_path: Path) -> None:
    """Three images are no pairs: nothing is written."""
    with pytest.raises(ValueError, match="3 images for 2 pairs"):
        write_bin(tmp_path / "x.bin", [b"a", b"b", b"c"], [True, False])
    assert list(tmp_path.iterdir()) == []


# --- what a file must not do ------------------------------------------------------------------------------------------


def call(module: str, name: str, *arguments: str) -> bytes:
    """Opcodes that call `module.name` with texts: what an evil pickle has in place of an image."""
    texts = b"".join(b"X" + struct.pack("<I", len(a.encode())) + a.encode() for a in arguments)
    return f"c{module}\n{name}\n(".encode() + texts + b"tR"


def short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


def evil_pickles(marker: Path) -> dict[str, tuple[bytes, str]]:
    """Name: (pickle that would create `marker` were it obeyed, what the error must name)."""
    touch = f"touch '{marker}'"
    python = f"open({str(marker)!r}, 'w')"
    # A second pickle, inside an .npy, that touches the marker when numpy.load unpickles it.
    evil_npy = marker.with_name("evil.npy")
    header = "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + "\n"
    npy = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()
    evil_npy.write_bytes(npy + b"\x80\x02" + call("os", "system", touch) + b".")
    return {
        "os.system": (call("os", "system", touch), r"os\.system"),
        "posix.system": (call("posix", "system", touch), r"posix\.system"),
        "builtins.eval": (call("builtins", "eval", python), r"builtins\.eval"),
        "Python 2's eval": (call("__builtin__", "eval", python), r"__builtin__\.eval"),
        # numpy.load(evil_npy, mmap_mode=None, allow_pickle=True)
        "numpy.load": (b"cnumpy\nload\n(" + short(str(evil_npy)) + b"N\x88tR", r"numpy\.load"),
        "a name of multiarray's that is not needed": (
            call("numpy.core.multiarray", "fromfile", str(marker)),
            r"numpy\.core\.multiarray\.fromfile",
        ),
        "a module with an allowed prefix": (call("numpy.core.os", "system", touch), r"numpy\.core\.os\.system"),
        "a dotted name": (
            short("numpy._core.numeric") + short("_frombuffer.__globals__") + b"\x93",
            r"_frombuffer\.__globals__",
        ),
        "STACK_GLOBAL": (short("os") + short("system") + b"\x93" + short(touch) + b"\x85R", r"os\.system"),
        "INST": (b"(" + short(touch) + b"ios\nsystem\n", r"os\.system"),
        "OBJ": (b"(cos\nsystem\n" + short(touch) + b"o", r"os\.system"),
        "NEWOBJ": (b"csubprocess\nPopen\n" + short(touch) + b"\x85\x81", r"subprocess\.Popen"),
        "functools.partial": (call("functools", "partial", "x"), r"functools\.partial"),
    }


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    """Each global that no verification set needs is refused by name before it is even imported."""
    marker = tmp_path / "executed"
    path = tmp_path / "evil.bin"
    for kind, (image, named) in evil_pickles(marker).items():
        path.write_bytes(b"\x80\x04](" + image + python2_string(b"b") + b"e](\x88e\x86.")
        with pytest.raises(VerificationFileError, match=named) as error:
            read_bin(path)
        assert "not loaded" in str(error.value), kind
        assert str(path) in str(error.value), kind
        assert not marker.exists(), f"{kind} was executed"


def test_the_evil_pickles_are_evil(tmp_path: Path) -> None:
    """A plain unpickler does run them, so that the test above can fail."""
    marker = tmp_path / "executed"
    evil = evil_pickles(marker)
    for kind in ("os.system", "builtins.eval", "numpy.load", "STACK_GLOBAL", "INST", "OBJ"):
        pickle.loads(b"\x80\x04" + evil[kind][0] + b".")
        assert marker.exists(), kind
        marker.unlink()


@pytest.mark.parametrize("codec", ["rot13", "zlib_codec", "utf-8", "idna", ""])
def test_other_codecs(tmp_path: Path, codec: str) -> None:
    """`_codecs.encode` spells bytes as latin1 and nothing else: other codecs are code that need not run."""
    (tmp_path / "x.bin").write_bytes(protocol2([call("_codecs", "encode", "a", codec)] * 2, b"\x88"))
    with pytest.raises(VerificationFileError, match=rf"x\.bin: it asks for the codec '{codec}'"):
        read_bin(tmp_path / "x.bin")


@pytest.mark.parametrize(
    ("array", "named"),
    [
        (np.array([b"x"], object), "'O8'"),
        (np.zeros(3, np.float64), "'f8'"),
        (np.array(["text"]), "'U4'"),
        (np.zeros(2, "u1,O"), "'V9'"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_arrays_of_other_things(tmp_path: Path, array: np.ndarray, named: str, protocol: int) -> None:
    """Arrays of objects (more pickle inside) and of anything else that is no image are refused by type."""
    (tmp_path / "x.bin").write_bytes(pickle.dumps(([array, array], [True]), protocol))
    with pytest.raises(VerificationFileError, match=rf"x\.bin: it holds numpy data of type {named}"):
        read_bin(tmp_path / "x.bin")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ((IMAGES, [True]), r"4 images for 1 pairs, expected two a pair"),
        (([b"a"], [True]), r"1 images for 1 pairs"),
        (([], []), r"0 images for 0 pairs"),
        (([b"a", "b"], [True]), r"an image must be bytes or a uint8 array, found str"),
        (([b"a", np.array([1, 2])], [True]), r"an image must be bytes or a uint8 array, found an array of int64"),
        (([b"a", b"b"], [2]), r"a same-person flag must be true or false, found 2"),
        (([b"a", b"b"], [None]), r"a same-person flag must be true or false, found None"),
        (([b"a", b"b"], [1.0]), r"a same-person flag must be true or false, found 1\.0"),
        (([b"a", b"b"], [True], 3), r"is no verification set"),
        (([b"a", b"b"], 1), r"is no verification set"),
        (7, r"is no verification set"),
    ],
)
def test_other_content(tmp_path: Path, content: object, message: str) -> None:
    """A pickle of anything but two images a pair says what is wrong with it, and in which file."""
    (tmp_path / "x.bin").write_bytes(pickle.dumps(content, 4))
    with pytest.raises(VerificationFileError, match=message) as error:
        read_bin(tmp_path / "x.bin")
    assert str(tmp_path / "x.bin") in str(error.value)


@pytest.mark.parametrize("damaged", [b"", b"no pickle", b"\xff\xd8\xff\xe0" * 9, b"PK\x03\x04zip", b"\x80\x63."])
def test_not_a_pickle(tmp_path: Path, damaged: bytes) -> None:
    """Another kind of file is told from a verification set, by name, and with a reason."""
    (tmp_path / "x.bin").write_bytes(damaged)
    with pytest.raises(VerificationFileError, match=r"x\.bin is no verification set \(.*\): \w"):
        read_bin(tmp_path / "x.bin")


@pytest.mark.parametrize("name", ["BINBYTES in frames", "_codecs.encode", "arrays under numpy._core, protocol 5"])
def test_truncated_anywhere(tmp_path: Path, name: str) -> None:
    """A file that was cut off, at whatever byte, never loads as a smaller set."""
    path = tmp_path / "x.bin"
    whole = SPELLINGS[name]
    for end in range(0, len(whole), 3):
        path.write_bytes(whole[:end])
        with pytest.raises(VerificationFileError, match=r"x\.bin"):
            read_bin(path)


@pytest.mark.parametrize(
    "opcodes",
    [
        b"\x8e" + struct.pack("<Q", 2**62) + b"abc",  # BINBYTES8 that claims 4 EiB
        b"\x95" + struct.pack("<Q", 2**63) + b"abc",  # a frame of 8 EiB
        b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\x7fJ\xff\xff\xff\x7fK\xfftb",
        b"cnumpy\nndarray\n(J\xff\xff\xff\x7f\x85U\x02u1tR",
        b"c_codecs\nencode\n)R",
    ],
    ids=["bytes length", "frame length", "dtype state", "ndarray called", "encode without arguments"],
)
def test_damaged_inside(tmp_path: Path, opcodes: bytes) -> None:
    """Absurd lengths and states are an error of the file: neither memory nor numpy's internals suffer."""
    (tmp_path / "x.bin").write_bytes(b"\x80\x04](" + opcodes + python2_string(b"b") + b"e](\x88e\x86.")
    with pytest.raises(VerificationFileError, match=r"x\.bin"):
        read_bin(tmp_path / "x.bin")


def test_a_damaged_number_takes_no_memory(tmp_path: Path) -> None:
    """The place of an object in the pickle's memo, of 32 bits: a table as long as it states would end the program."""
    (tmp_path / "x.bin").write_bytes(protocol2([b"U\x01ar" + struct.pack("<I", 2**24), b"U\x01b", b"U\x01c", b"h\0"]))
    tracemalloc.start()
    with pytest.raises(VerificationFileError, match=r"x\.bin"):
        read_bin(tmp_path / "x.bin")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1 << 20


def test_what_is_named_often_is_kept_once(tmp_path: Path) -> None:
    """A small file cannot ask for gigabytes: not by one array in many places, nor by one text encoded many times."""
    image = np.frombuffer(b"\xff\xd8" + bytes(1 << 20), np.uint8)
    (tmp_path / "array.bin").write_bytes(pickle.dumps(([image] * 400, [True] * 200), 4))
    whole = b"\xff\xd8" + bytes(1 << 20)
    dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tRq\x02"
    one = b"cnumpy.core.numeric\n_frombuffer\nq\x00" + python2_string(whole) + b"q\x01" + dtype + b"\x86R"
    (tmp_path / "buffer.bin").write_bytes(protocol2([one] + [b"h\x00h\x01h\x02\x86R"] * 3, b"\x88" * 2))
    assert read_bin(tmp_path / "buffer.bin").images == [whole]
    (tmp_path / "buffer.bin").write_bytes(protocol2([one] + [b"h\x00h\x01h\x02\x86R"] * 399, b"\x88" * 200))
    text = b"X" + struct.pack("<I", 1 << 20) + b"x" * (1 << 20)
    first = b"c_codecs\nencode\nq\x00" + text + b"q\x01X\x06\x00\x00\x00latin1q\x02\x86R"
    (tmp_path / "text.bin").write_bytes(protocol2([first] + [b"h\x00h\x01h\x02\x86R"] * 399))
    tracemalloc.start()
    assert len(read_bin(tmp_path / "array.bin").images) == len(read_bin(tmp_path / "buffer.bin").images) == 1
    with pytest.raises(VerificationFileError, match=r"text\.bin: it encodes one text again and again"):
        read_bin(tmp_path / "text.bin")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 8 << 20


DEEP = b"K\x01" + b"\x85" * 1_000_000  # a tuple in a tuple in a tuple
NESTED = {
    "a key": (b"}" + DEEP + b"K\x01s", "holds a dictionary or set"),
    "an element": (b"\x8f(" + DEEP + b"\x90", "holds a dictionary or set"),
    "a codec": (b"c_codecs\nencode\nX\x01\x00\x00\x00a" + DEEP + b"\x86R", "is no verification set"),
    "a type": (b"cnumpy\ndtype\n" + DEEP + b"\x85R", "numpy data of type"),
    "a scalar's type": (b"cnumpy.core.multiarray\nscalar\n" + DEEP + b"C\x01a\x86R", "whose type is none"),
}


@pytest.mark.parametrize(("opcodes", "message"), NESTED.values(), ids=NESTED.keys())
def test_deep_nesting_ends_no_process(tmp_path: Path, opcodes: bytes, message: str) -> None:
    """Read in a process of its own: what Python does to each level of a value, it does on the stack."""
    (tmp_path / "x.bin").write_bytes(b"\x80\x04](" + opcodes + python2_string(b"b") + b"e](\x88e\x86.")
    program = f"from data.verification_bin import read_bin; read_bin({str(tmp_path / 'x.bin')!r})"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(rf"VerificationFileError: .*x\.bin.*{message}", done.stderr)


def test_a_file_changes_no_function(tmp_path: Path) -> None:
    """The opcode that sets an object's state is for arrays: on a function it would change this program."""
    (tmp_path / "x.bin").write_bytes(protocol2([b"cnumpy.core.multiarray\nscalar\nNb", b"U\x01b"], b"\x88"))
    with pytest.raises(VerificationFileError, match=r"x\.bin: it changes what is no array"):
        read_bin(tmp_path / "x.bin")


def test_missing_file(tmp_path: Path) -> None:
    """A path that does not exist is the usual FileNotFoundError, not a broken set."""
    with pytest.raises(FileNotFoundError):
        read_bin(tmp_path / "nothing.bin")
