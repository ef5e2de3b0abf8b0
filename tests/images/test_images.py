import os
import pickle
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import AvifImagePlugin, Image, ImageFile
from rotten import ENCODINGS, ORIENTATION, encode, exif, pixels, write_rotten

from packvit.images.decode import decode, load_image, open_image
from packvit.images.errors import CODES, ImageError
from packvit.images.files import read_file

# What stored pixels look like upright, in the words of numpy instead of Pillow's.
UPRIGHT = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: np.rot90(stored),
}


def failure(data: bytes, **options: Any) -> tuple[str, str, str | None]:
    with pytest.raises(ImageError) as caught:
        decode(data, **options)
    return caught.value.code, caught.value.stage, caught.value.note


def pixels_or_code(data: bytes) -> np.ndarray | str:
    try:
        return np.asarray(decode(data).image)
    except ImageError as error:
        return error.code


def outcomes(folder: Path, names: list[str]) -> dict[str, tuple[str, ...]]:
    found = {}
    for name in names:
        try:
            found[name] = ("ok", "", str(decode(read_file(folder / name)).note))
        except ImageError as error:
            found[name] = (error.code, error.stage, str(error.note))
    return found


def test_every_broken_or_odd_file_ends_as_its_code(tmp_path: Path):
    expected = write_rotten(tmp_path)
    found = outcomes(tmp_path, list(expected))
    assert {name: code for name, (code, _, _) in found.items()} == expected


def test_codes_and_notes_are_the_same_in_every_run_and_hold_no_path_or_address(tmp_path: Path):
    names = list(write_rotten(tmp_path / "first"))
    write_rotten(tmp_path / "second")
    found = outcomes(tmp_path / "first", names)
    assert found == outcomes(tmp_path / "second", names)
    assert not any("/" in note or "0x" in note for _, _, note in found.values())


@pytest.mark.parametrize(
    ("name", "stage", "note"),
    [
        ("broken-link.jpg", "read", None),
        ("link-loop.jpg", "read", "links in a circle"),
        ("unreadable.jpg", "read", None),
        ("huge.jpg", "read", "over 2 GiB"),
        ("pipe.jpg", "read", None),
        ("empty.jpg", "header", "empty file"),
        ("header-only.jpg", "header", None),
        ("film.jpg", "header", "video"),
        ("layers.jpg", "header", "PSD"),
        ("large.png", "header", "height 12000, width 12000"),
        ("bomb.png", "header", None),
        ("floats.tif", "header", "mode F"),
        ("cut-70-jpeg.jpg", "decode", None),
        ("cut-70-lzw.tif", "header", None),
    ],
)
def test_a_failure_names_its_stage(tmp_path: Path, name: str, stage: str, note: str | None):
    write_rotten(tmp_path)
    assert outcomes(tmp_path, [name])[name][1:] == (stage, str(note))


@pytest.mark.parametrize("path", ["no-such-file", "file.jpg/below", "nul\0.jpg"])
def test_a_path_that_leads_nowhere_is_missing(tmp_path: Path, path: str):
    (tmp_path / "file.jpg").write_bytes(b"")
    with pytest.raises(ImageError, match="no file at this path"):
        read_file(f"{tmp_path}/{path}")


@pytest.mark.parametrize("name", ENCODINGS)
def test_a_file_that_is_cut_never_passes_for_whole(name: str):
    kind, options = ENCODINGS[name]
    data = encode(pixels(61, 83), kind, **options)
    whole = pixels_or_code(data)
    step = max(1, len(data) // 150)
    for cut in {*range(0, len(data), step), *range(len(data) - 20, len(data))}:
        found = pixels_or_code(data[:cut])
        if isinstance(found, str):
            # Past any header and palette there is no doubt left about what the file was.
            assert found == "truncated" or (found == "unidentified" and cut <= 820), cut
        else:  # all it had lost was padding, or a mark at its end
            assert np.array_equal(found, whole), cut


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_the_first_of_several_frames_is_read_and_noted_even_if_the_others_are_cut(kind: str):
    frames = [Image.fromarray(pixels(40, 56, seed)).quantize(32) for seed in range(3)]
    frames = [frame.convert("P" if kind == "GIF" else "RGB") for frame in frames]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    photo = decode(data)
    assert photo.note == "first frame of several"
    if kind != "MPO":
        assert np.array_equal(np.asarray(photo.image), np.asarray(frames[0].convert("RGB")))
    for cut in range(0, len(data), 97):
        found = pixels_or_code(data[:cut])
        if isinstance(found, str):
            assert found in {"truncated", "unidentified"}
        else:
            assert np.array_equal(found, np.asarray(photo.image)), cut


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_every_orientation_is_turned_upright_once_on_every_path(kind: str, orientation: int):
    photo = pixels(33, 50)
    stored = np.asarray(decode(encode(photo, kind)).image)
    turned = {"tiffinfo": {ORIENTATION: orientation}} if kind == "TIFF" else {}
    data = encode(photo, kind, **(turned or {"exif": exif(orientation)}))
    expected = UPRIGHT[orientation](stored)

    found = decode(data)
    assert np.array_equal(np.asarray(found.image), expected)
    assert (found.height, found.width) == expected.shape[:2]
    again = load_image(found.image)
    assert np.array_equal(np.asarray(again.image), expected)

    opened = Image.open(BytesIO(data))
    assert np.array_equal(np.asarray(load_image(opened).image), expected)
    assert np.array_equal(np.asarray(load_image(opened).image), expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_unreadable_exif_costs_a_note_and_not_the_image(kind: str):
    photo = pixels(20, 30)
    found = decode(encode(photo, kind, exif=b"Exif\0\0this is no EXIF"))
    assert found.note == "EXIF unreadable"
    assert np.array_equal(np.asarray(found.image), np.asarray(decode(encode(photo, kind)).image))


@pytest.mark.parametrize("orientation", [0, 9, 300])
def test_an_orientation_that_does_not_exist_is_upright(orientation: int):
    photo = pixels(20, 30)
    found = decode(encode(photo, "PNG", exif=exif(orientation)))
    assert np.array_equal(np.asarray(found.image), photo)


@pytest.mark.parametrize("kind", ["PPM", "ICO", "JPEG2000", "EPS", "DDS"])
def test_sound_images_of_other_formats_are_refused_by_name(kind: str):
    expected = ("unsupported_format", "header", kind)
    assert failure(encode(pixels(20, 30), kind)) == expected


def test_a_format_that_this_pillow_was_built_without_is_named(monkeypatch: pytest.MonkeyPatch):
    data = encode(pixels(20, 30), "AVIF")
    monkeypatch.setattr(AvifImagePlugin, "SUPPORTED", False)
    assert failure(data) == ("unsupported_format", "header", "this Pillow lacks AVIF")


def test_formats_that_take_twice_the_memory_count_twice_and_no_limit_knows_it():
    kinds = {"JPEG": 1, "PNG": 1, "GIF": 1, "BMP": 1, "TIFF": 1, "WEBP": 2, "AVIF": 2}
    counts = {kind: open_image(encode(pixels(20, 30), kind)).pixels for kind in kinds}
    assert counts == {kind: times * 600 for kind, times in kinds.items()}
    assert decode(encode(pixels(20, 30), "WEBP"), max_pixels=600).width == 30


def test_the_pixel_limit_is_ours_and_holds_for_every_source():
    photo = pixels(20, 30)
    expected = ("too_many_pixels", "header", "height 20, width 30")
    assert failure(encode(photo, "PNG"), max_pixels=599) == expected
    assert decode(encode(photo, "PNG"), max_pixels=600).width == 30
    for source in (photo, Image.fromarray(photo)):
        with pytest.raises(ImageError, match="more pixels than the limit") as caught:
            load_image(source, max_pixels=599)
        assert caught.value.note == expected[2]


@pytest.mark.parametrize("name", ENCODINGS)
def test_pillows_own_limit_warns_nobody_and_is_an_error_row(
    monkeypatch: pytest.MonkeyPatch, name: str
):
    kind, options = ENCODINGS[name]
    data = encode(pixels(61, 83), kind, **options)  # 5063 pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)  # between one and two limits: a warning
    decode(data)  # and the tests turn warnings into errors
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert failure(data) == ("too_many_pixels", "header", None)


def test_nothing_global_is_left_changed_even_by_eight_threads():
    before = (list(warnings.filters), Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    files = [encode(pixels(61, 83), kind, **options) for kind, options in ENCODINGS.values()]
    files += [files[0][:500], b""]

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(pixels_or_code, files * 20))
    alone = [pixels_or_code(data) for data in files] * 20
    assert all(np.array_equal(one, other) for one, other in zip(found, alone, strict=True))
    after = (list(warnings.filters), Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    assert before == after


def test_too_little_memory_is_a_code():
    program = """
import resource
from rotten import png
from packvit.images.decode import decode
from packvit.images.errors import ImageError
data = png(9000, 9000, 1, 0, bytes(9000 * 1126))
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 2**26, resource.RLIM_INFINITY))
try:
    decode(data)
except ImageError as error:
    print(error.code, error.stage)
"""
    path = os.pathsep.join(["tests", ".", *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        check=True,
    )
    assert done.stdout.split() == ["out_of_memory", "decode"]


def test_reading_images_never_loads_torch():
    program = "import sys, packvit.images.patches; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_paths_images_and_arrays_give_the_same_photo(tmp_path: Path):
    photo = pixels(20, 30)
    (tmp_path / "photo.png").write_bytes(encode(photo, "PNG"))
    path = tmp_path / "photo.png"
    for source in (
        path,
        str(path),
        Image.open(path),
        Image.fromarray(photo),
        photo,
        photo.copy("F"),
    ):
        found = load_image(source)
        assert np.array_equal(np.asarray(found.image), photo)
        assert (found.height, found.width, found.note) == (20, 30, None)


def test_the_callers_image_and_array_are_neither_changed_nor_shared():
    photo = pixels(20, 30)
    array = photo.copy()
    image = Image.fromarray(photo)
    palette = image.quantize(8)
    palette.info["transparency"] = 2
    before = palette.tobytes(), palette.getpalette("RGBA"), dict(palette.info)
    found = [load_image(source).image for source in (array, image)]
    load_image(palette)
    assert before == (palette.tobytes(), palette.getpalette("RGBA"), dict(palette.info))
    array[:] = 0
    image.paste((0, 0, 0), (0, 0, 30, 20))
    assert all(np.array_equal(np.asarray(kept), photo) for kept in found)


def test_what_is_no_image_is_refused_in_words():
    with pytest.raises(TypeError, match=r"but this is a builtins\.list\. Give a tensor as"):
        load_image([[0, 0, 0]])
    with pytest.raises(TypeError, match=r"uint8 with values from 0 to 255, but this is float32"):
        load_image(np.zeros((4, 5, 3), np.float32))
    for shape in ((4, 5), (4, 5, 4), (3, 4, 5), (0, 5, 3)):
        with pytest.raises(ValueError, match=r"must be \[height, width, 3\]"):
            load_image(np.zeros(shape, np.uint8))
    with pytest.raises(ImageError, match="no pixels"):
        load_image(Image.new("RGB", (0, 5)))


def test_an_error_reads_as_a_sentence_and_survives_the_way_between_processes(tmp_path: Path):
    error = ImageError("too_many_pixels", "header", "height 20, width 30")
    error.index = 3
    expected = (
        "Image 3 cannot be used: it has more pixels than the limit; make it smaller, or raise "
        "max_pixels (header: height 20, width 30)."
    )
    back = pickle.loads(pickle.dumps(error))
    assert str(error) == str(back) == expected
    assert (back.code, back.stage, back.note, back.index) == (error.code, *error.args[1:3], 3)
    assert str(ImageError("missing", "read")).startswith("The image cannot be used: there is no")
    with pytest.raises(ImageError) as caught:
        load_image(tmp_path / "cat.jpg")
    assert caught.value.__notes__ == [f"Path: {str(tmp_path / 'cat.jpg')!r}"]
    assert all(words[0].islower() and words[-1] not in ".!" for words in CODES.values())
