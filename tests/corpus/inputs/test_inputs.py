import os
import re
import socket
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packvit.corpus import UsageError
from packvit.corpus.inputs.find import list_inputs
from packvit.corpus.inputs.listing import Listing, by_suffix, readable
from packvit.corpus.inputs.suffixes import SUFFIXES


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def ids(listing: Listing) -> list[str]:
    return [source.id for source in listing]


def codes(listing: Listing) -> dict[str, tuple[str, str] | None]:
    return {source.id: source.error for source in listing}


def test_folders_are_walked_and_other_files_are_counted(tmp_path: Path):
    touch(tmp_path / "b.JPG", tmp_path / "a/deep/er/c.Png", tmp_path / "a/notes.txt")
    touch(tmp_path / "jpg", tmp_path / ".jpg", tmp_path / "x.jpg.part")
    listing = list_inputs([str(tmp_path)])
    assert ids(listing) == ["a/deep/er/c.Png", "b.JPG"]
    assert [source.path for source in listing] == [
        str(tmp_path / "a/deep/er/c.Png"),
        str(tmp_path / "b.JPG"),
    ]
    assert listing.ignored == 4


def test_every_suffix_of_a_photograph_counts_in_any_case(tmp_path: Path):
    for number, suffix in enumerate(SUFFIXES):
        touch(
            tmp_path / f"{number}{suffix.decode()}", tmp_path / f"{number}{suffix.decode().upper()}"
        )
    assert len(list_inputs([str(tmp_path)])) == 2 * len(SUFFIXES) == 28


def test_the_order_is_that_of_the_bytes_of_the_path_wherever_it_stands(tmp_path: Path):
    names = ["B.jpg", "a-b.jpg", "a.jpg", "a/z.jpg", "a0.jpg", "z.jpg", "é.jpg", "\U0001f600.jpg"]
    touch(*(tmp_path / name for name in reversed(names)))
    assert ids(list_inputs([str(tmp_path)])) == sorted(names, key=str.encode)
    named = [str(tmp_path / name) for name in names]
    assert ids(list_inputs(named)) == ids(list_inputs(named[::-1]))


def test_names_open_with_the_path_as_typed_where_there_are_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    touch(Path("one/x.jpg"), Path("two/x.jpg"), Path("loose.dat"))
    assert ids(list_inputs(["one/"])) == ["x.jpg"]
    assert ids(list_inputs(["two//", "./one", "loose.dat"])) == [
        "./one/x.jpg",
        "loose.dat",
        "two/x.jpg",
    ]
    assert ids(list_inputs([str(tmp_path / "loose.dat")])) == [str(tmp_path / "loose.dat")]


def test_a_named_path_is_an_input_whatever_it_is(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    touch(tmp_path / "photograph")
    paths = [str(tmp_path / name) for name in ("pipe", "photograph", "gone.jpg")]
    assert codes(list_inputs(paths)) == {
        str(tmp_path / "gone.jpg"): ("missing", "list"),
        str(tmp_path / "photograph"): None,
        str(tmp_path / "pipe"): ("not_a_file", "list"),
    }


def test_paths_of_which_none_is_there_are_refused_and_one_beside_others_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    touch(Path("photos/x.jpg"), Path("y.jpg"))
    Path("broken.jpg").symlink_to("nowhere")
    for paths, named in (
        (["gone.jpg"], '"gone.jpg" is'),
        (["gone.jpg", "./gone.png"], '"gone.jpg", "./gone.png" are'),
        (["foto"], '"foto" is'),
        (["foto", "gone.jpg"], '"foto", "gone.jpg" are'),
        (["x.tar", "x.parquet"], '"x.tar", "x.parquet" are'),
        (["y.jpg/"], '"y.jpg/" is'),
        ([""], '"" is'),
        ([os.fsdecode(b"caf\xe9\n")], '"caf\\xe9\n" is'),
        (["a", "b", "c", "d", "e"], '"a", "b", "c" and 2 more are'),
    ):
        with pytest.raises(UsageError) as caught:
            list_inputs(paths)
        assert str(caught.value) == f"{named} not there. Check the spelling; nothing was written."
    gone = ("missing", "list")
    assert codes(list_inputs(["gone.jpg", "y.jpg"])) == {"gone.jpg": gone, "y.jpg": None}
    for name in ("gone.jpg", "foto", "x.tar"):
        assert codes(list_inputs([name, "photos"])) == {name: gone, "photos/x.jpg": None}
    assert codes(list_inputs(["broken.jpg"])) == {"broken.jpg": gone}
    Path("list.txt").write_text("gone.jpg")
    assert codes(list_inputs([], ["list.txt"])) == {"gone.jpg": gone}


def test_what_is_gone_since_a_job_began_is_a_row_of_it(tmp_path: Path):
    touch(tmp_path / "photograph")
    named = str(tmp_path / "photograph")
    known = list_inputs([named]).sha256()
    (tmp_path / "photograph").unlink()
    assert codes(list_inputs([named], known=known)) == {named: ("missing", "list")}
    with pytest.raises(UsageError, match="is not there"):
        list_inputs([named + "s"], known=known)


def test_what_is_called_a_photograph_and_is_no_file_becomes_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)  # a socket's path may have 107 bytes
    touch(Path("folder.jpg/inside.png"), Path("real.gif"))
    os.mkfifo("pipe.jpg")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("socket.bmp")
    listener.close()
    Path("broken.jpg").symlink_to("nowhere")
    Path("loop.jpg").symlink_to("loop.jpg")
    Path("linked_folder.jpg").symlink_to("folder.jpg")
    Path("device.tif").symlink_to("/dev/null")
    Path("linked_file.webp").symlink_to("real.gif")
    assert codes(list_inputs(["."])) == {
        "broken.jpg": ("missing", "list"),
        "device.tif": ("not_a_file", "list"),
        "folder.jpg": ("not_a_file", "list"),
        "folder.jpg/inside.png": None,
        "linked_file.webp": None,
        "linked_folder.jpg": ("not_a_file", "list"),
        "loop.jpg": ("missing", "list"),
        "pipe.jpg": ("not_a_file", "list"),
        "real.gif": None,
        "socket.bmp": ("not_a_file", "list"),
    }


def test_linked_folders_are_entered_only_where_they_are_named(tmp_path: Path):
    touch(tmp_path / "photos/x.jpg")
    (tmp_path / "photos/again").symlink_to(tmp_path / "photos")
    (tmp_path / "link").symlink_to("photos")
    listing = list_inputs([str(tmp_path / "link")])
    assert (ids(listing), listing.ignored) == (["x.jpg"], 1)


def nest(folder: Path, name: str, levels: int, file: str | None = None) -> None:
    """Make folders in one another, deeper than pathlib or os.makedirs would recurse."""
    start = os.open(".", os.O_RDONLY)
    try:
        os.chdir(folder)
        for _ in range(levels):
            os.mkdir(name)
            os.chdir(name)
        if file:
            Path(file).touch()
    finally:
        os.fchdir(start)
        os.close(start)


def test_a_tree_deeper_than_pythons_stack_is_walked(tmp_path: Path):
    nest(tmp_path, "d", 1500, "x.jpg")
    found = ids(list_inputs([str(tmp_path)]))
    subprocess.run(["rm", "-r", str(tmp_path / "d")], check=True)  # pytest would recurse
    assert found == ["d/" * 1500 + "x.jpg"]


def test_a_folder_too_deep_for_the_system_is_a_row_of_its_own(tmp_path: Path):
    nest(tmp_path, "d" * 249, 17)  # 17 x 250 bytes: past the 4096 that Linux takes in one path
    (lost,) = list_inputs([str(tmp_path)])
    assert lost.error == ("unreadable", "list")
    assert set(lost.id.split("/")) == {"d" * 249}
    assert len(lost.path) > 3800


@pytest.fixture
def somebody() -> Iterator[Path]:
    """A folder of a user without privileges, who then runs the test."""
    with tempfile.TemporaryDirectory() as folder:
        privileged = os.geteuid() == 0
        if privileged:  # root may read everything
            os.chown(folder, 65534, 65534)
            os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            if privileged:
                os.seteuid(0)


def test_what_may_not_be_read_is_a_row(somebody: Path):
    touch(somebody / "closed/x.jpg", somebody / "unsearchable/y.jpg", somebody / "z.jpg")
    (somebody / "closed").chmod(0o000)
    (somebody / "unsearchable").chmod(0o400)
    try:
        found = codes(list_inputs([str(somebody)]))
        whole = codes(list_inputs([str(somebody / "closed"), str(somebody / "closed/x.jpg")]))
    finally:
        (somebody / "closed").chmod(0o700)
        (somebody / "unsearchable").chmod(0o700)
    assert found == {
        "closed": ("unreadable", "list"),
        "unsearchable/y.jpg": ("unreadable", "list"),
        "z.jpg": None,
    }
    assert set(whole.values()) == {("unreadable", "list")}
    assert len(whole) == 2


def test_bytes_that_are_not_utf8_are_written_out_and_the_file_is_still_found(tmp_path: Path):
    name = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    with open(name, "wb") as file:
        file.write(b"here")
    (source,) = list_inputs([str(tmp_path)])
    assert source.id == "caf\\xe9.jpg"
    assert Path(source.path).read_bytes() == b"here"
    touch(tmp_path / "caf\\xe9.jpg", tmp_path / "C:\\x41\\xyz.jpg")  # case V8
    found = {source.id: os.fsencode(source.path) for source in list_inputs([str(tmp_path)])}
    assert found == {
        "caf\\xe9.jpg": name,
        "caf\\x5cxe9.jpg": os.fsencode(tmp_path / "caf\\xe9.jpg"),
        "C:\\x41\\xyz.jpg": os.fsencode(tmp_path / "C:\\x41\\xyz.jpg"),
    }


PIECES = (
    b"\\",
    b"x",
    b"\\xff",
    b"\\x5c",
    b"\\x00",
    b"\xff",
    b"\0",
    b"5",
    b"c",
    b"f",
    "é".encode(),
    b"\xc3",
)


@given(st.lists(st.sampled_from(PIECES)).map(b"".join))
def test_no_two_names_are_spelled_alike(name: bytes):  # case V8
    def spelled(found: re.Match[bytes]) -> bytes:
        return bytes([int(found[1], 16)])

    text = readable(name)
    escape = rb"\\x(00|5c|[89a-f][0-9a-f])"
    assert (
        re.sub(escape, spelled, text.encode()) == name
    )  # so that a name can be told from its text
    if not re.search(escape, name) and b"\0" not in name:
        assert text == name.decode("utf-8", "backslashreplace")


def test_an_input_named_twice_is_refused(tmp_path: Path):
    touch(tmp_path / "x.jpg")
    folder, photo = str(tmp_path), str(tmp_path / "x.jpg")
    for paths in ([folder, folder], [folder, folder + "/"], [folder, photo], [photo, photo]):
        with pytest.raises(UsageError, match=r'called ".*/x\.jpg"\. Name each path once'):
            list_inputs(paths)


def test_no_inputs_is_wrong_use_and_the_answer_says_what_counts(tmp_path: Path):
    touch(tmp_path / "readme.txt")
    with pytest.raises(
        UsageError, match=r"No photographs .* files passed over: 1 .txt. .* end in \.jpg .*\.avif"
    ):
        list_inputs([str(tmp_path)])
    with pytest.raises(UsageError, match="No photographs were found in nothing"):
        list_inputs([])


def test_the_digest_tells_names_and_order_apart(tmp_path: Path):
    touch(tmp_path / "a/x.jpg", tmp_path / "b/x.jpg", tmp_path / "c/y.jpg")
    digest = {name: list_inputs([str(tmp_path / name)]).sha256() for name in "abc"}
    assert digest["a"] == digest["b"] != digest["c"]


def test_listing_does_not_load_torch():
    code = "import sys, packvit.corpus.inputs.find; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_w3_what_is_passed_over_is_named_by_its_suffix_and_heic_never_is(tmp_path: Path):
    """Row W3 of the cases."""
    for name in ("a.HEIC", "b.heif", "c.hif", "d.CR2", "e.cr2", "f.mov", "README", f"g.{'x' * 30}"):
        (tmp_path / name).write_bytes(b"")
    with tarfile.open(tmp_path / "more.tar", "w") as tar:
        for name in ("h.heic", "i.cr2", "j.txt"):
            tar.addfile(tarfile.TarInfo(name))
    listing = list_inputs([str(tmp_path), str(tmp_path / "more.tar")])
    assert [source.id.rpartition("/")[2] for source in listing] == [
        "a.HEIC",
        "b.heif",
        "c.hif",
        "h",
    ]
    assert listing.passed_over == {".cr2": 3, ".mov": 1, "": 2, ".tar": 1, ".txt": 1}
    assert by_suffix(listing.passed_over) == "3 .cr2, 1 .mov, 1 .tar, 1 .txt, 2 others"
    assert listing.ignored == 8


def test_w3_suffixes_without_end_are_counted_in_little_memory():
    listing = Listing()
    for number in range(3000):
        listing.pass_over(b"x.%d" % number)
    assert (len(listing.passed_over), listing.ignored) == (1001, 3000)


def test_the_old_name_of_usage_errors_still_works_and_warns():
    with pytest.warns(DeprecationWarning, match="import UsageError instead"):
        from packvit.corpus import WrongUse  # pyright: ignore[reportAttributeAccessIssue]
    assert WrongUse is UsageError
