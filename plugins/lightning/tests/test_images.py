"""Pixels and labels: what a file holds is what is trained on, or it is refused by name."""

from __future__ import annotations

import io
import itertools
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from lightning_problems import encoded, write_parquet
from PIL import Image, ImageOps
from pyarrow import parquet

from torchdeq_ep.errors import DataError, InvalidOptionError
from torchdeq_ep_lightning import ImageData
from torchdeq_ep_lightning.decoding import Reading, decode_image

GENERATOR = np.random.default_rng(0)


def noise(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    if dtype is np.float32:
        return GENERATOR.random(shape, dtype=np.float32)
    return GENERATOR.integers(np.iinfo(dtype).max + 1, size=shape, dtype=dtype)


def file_of(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def read(content: bytes, **options: object) -> np.ndarray:
    return decode_image({"bytes": content}, 3, "some.parquet", Reading(**options)).numpy()


def pillow(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content))
    image.load()
    return image


def paletted() -> Image.Image:
    return Image.fromarray(noise(5, 7, 3)).quantize(16)


OPAQUE = {
    "1": (lambda: Image.fromarray(noise(5, 7) > 127), "PNG", "L"),
    "L": (lambda: Image.fromarray(noise(5, 7)), "PNG", "L"),
    "RGB": (lambda: Image.fromarray(noise(5, 7, 3)), "PNG", "RGB"),
    "P": (paletted, "PNG", "RGB"),
    "CMYK": (lambda: Image.fromarray(noise(5, 7, 4), mode="CMYK"), "TIFF", "RGB"),
    "YCbCr": (lambda: Image.fromarray(noise(5, 7, 3), mode="YCbCr"), "JPEG", "RGB"),
    "HSV": (lambda: Image.fromarray(noise(5, 7, 3)), "BMP", "RGB"),
}


@pytest.mark.filterwarnings("ignore:.*mode.*parameter:DeprecationWarning")
@pytest.mark.parametrize("mode", OPAQUE)
def test_opaque_images_of_eight_bits_are_what_pillow_reads(mode):
    make, kind, as_mode = OPAQUE[mode]
    content = file_of(make(), kind)
    expected = np.asarray(pillow(content).convert(as_mode))
    assert np.array_equal(read(content), expected if expected.ndim == 3 else expected[..., None])


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_kept(kind):
    values = noise(5, 7, dtype=np.uint16)
    content = file_of(Image.fromarray(values), kind)
    assert np.array_equal(np.asarray(pillow(content)).astype(np.uint16), values)
    found = read(content)[..., 0]
    assert found.dtype == np.float32
    assert np.array_equal(np.rint(found.astype(np.float64) * 65535), values)
    assert len(np.unique(found)) == len(np.unique(values))


def test_floating_numbers_are_kept_or_refused():
    values = noise(5, 7, dtype=np.float32)
    assert np.array_equal(read(file_of(Image.fromarray(values), "TIFF"))[..., 0], values)
    for wrong in (values * 255, values - 1, np.where(values > 0.5, np.nan, values).astype(np.float32)):
        with pytest.raises(DataError, match=r"row 3 of some\.parquet is an image of floating numbers from"):
            read(file_of(Image.fromarray(wrong), "TIFF"))


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P", "RGB", "L"])
def test_transparency_is_never_dropped_without_a_word(mode):
    options: dict[str, object] = {}
    if mode in ("P", "RGB", "L"):  # by one transparent colour
        image = {"P": paletted, "RGB": OPAQUE["RGB"][0], "L": OPAQUE["L"][0]}[mode]()
        options["transparency"] = image.getpixel((0, 0))
    else:
        image = Image.fromarray(noise(5, 7, len(mode)))
    content = file_of(image, **options)
    with pytest.raises(DataError, match=r"row 3 of some\.parquet .*transparent.*data\.alpha"):
        read(content)
    whole = pillow(content).convert("LA" if mode in ("L", "LA") else "RGBA")
    assert np.array_equal(read(content, alpha="keep"), np.asarray(whole))
    for name, shade in (("black", 0.0), ("white", 255.0)):
        colours, alpha = np.split(np.asarray(whole, dtype=np.float64), [-1], axis=-1)
        expected = colours * alpha / 255 + shade * (1 - alpha / 255)
        assert np.abs(read(content, alpha=name) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_a_channel_of_opacity_alone_is_no_loss(mode):
    values = noise(5, 7, len(mode))
    values[..., -1] = 255
    assert np.array_equal(read(file_of(Image.fromarray(values))), values[..., :-1])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_their_camera_says(orientation):
    image = Image.fromarray(noise(5, 7, 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = file_of(image, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(pillow(content)))
    assert expected.shape == ((5, 7, 3) if orientation < 5 else (7, 5, 3))
    assert np.array_equal(read(content), expected)


def deep_png(channels: int) -> bytes:
    """A PNG of 16 bits in each of several channels, which Pillow cannot write."""
    values = noise(5, 7 * channels, dtype=np.uint16).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 7, 5, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_what_pillow_would_cut_to_eight_bits_is_refused(channels):
    with pytest.raises(DataError, match=r"row 3 of some\.parquet is an image of 16 bits"):
        read(deep_png(channels))


def test_other_losses_are_refused_by_name():
    frames = [Image.fromarray(noise(5, 7)) for _ in range(3)]
    moving = file_of(frames[0], "GIF", save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match="3 frames"):
        read(moving)
    whole = file_of(Image.fromarray(noise(5, 7).astype(np.int32) * 70000), "TIFF")
    with pytest.raises(DataError, match="mode I, whole numbers of 32 bits"):
        read(whole)


def test_images_of_several_sizes_are_resized(tmp_path):
    sizes = itertools.cycle([(8, 8), (9, 12), (20, 10)])
    images = [encoded(torch.from_numpy(noise(*next(sizes), 3))) for _ in range(6)]
    deep = file_of(Image.fromarray(noise(11, 9, dtype=np.uint16)))
    for split in ("train", "test"):
        write_parquet(tmp_path / "d" / f"{split}.parquet", images, [0, 1] * 3)
    options = {"cache": str(tmp_path / "cache"), "batch": 2}
    with pytest.raises(DataError, match=r"shape \(3, 9, 12\).*data\.resize"):
        ImageData(str(tmp_path / "d"), **options).images  # noqa: B018
    grey = [encoded(torch.from_numpy(noise(9, 12)))]
    write_parquet(tmp_path / "grey" / "train.parquet", images[:1] + grey, [0, 1])
    write_parquet(tmp_path / "grey" / "test.parquet", images[:2], [0, 1])
    with pytest.raises(DataError, match=r"shape \(1, 6, 4\).*as many channels"):
        ImageData(str(tmp_path / "grey"), resize=(6, 4), **options).images  # noqa: B018
    data = ImageData(str(tmp_path / "d"), resize=(6, 4), **options)
    assert data.shape == (3, 6, 4)
    assert read(deep, resize=(6, 4)).shape == (6, 4, 1)
    assert ImageData(resize=(16, 12)).shape == (1, 16, 12)
    with pytest.raises(InvalidOptionError, match=r"data\.resize"):
        ImageData(resize=(0, 4))


IMAGE = encoded(torch.zeros(4, 4, dtype=torch.uint8))


def labelled(folder: Path, **splits: list[object]) -> ImageData:
    for split, labels in splits.items():
        path = folder / f"{split}.parquet"
        write_parquet(path, [IMAGE] * len(labels), [0] * len(labels))
        table = parquet.read_table(path).drop_columns("label")
        parquet.write_table(table.append_column("label", pyarrow.array(labels)), path)
    return ImageData(str(folder), cache=str(folder / "cache"), batch=1)


@pytest.mark.parametrize(
    ("train", "test", "classes"),
    [
        ([0, 1, 2], [2, 1, 0], (0, 1, 2)),
        ([0, 2, 3], [1, 3], (0, 1, 2, 3)),  # a class without an image in one split
        ([1, 2, 2], [2], (0, 1, 2)),  # from 1 on
        ([0, 5, 3], [3, 0], tuple(range(6))),  # gaps
        ([0, 1], [7], tuple(range(8))),  # one that is only tested
        (["1000000000", "0"], ["0"], ("0", "1000000000")),
        (["dog", "cat"], ["eel", "cat"], ("cat", "dog", "eel")),
        (["10", "9"], ["10"], ("10", "9")),  # names, not numbers
        ([True, False], [True], (False, True)),
    ],
)
def test_a_label_means_the_same_in_every_split(tmp_path, train, test, classes):
    data = labelled(tmp_path, train=train, test=test)
    assert data.classes == classes
    assert data.n_classes == len(classes)
    for part, labels in zip(data.images, (train, test), strict=True):
        assert [classes[number] for number in part.labels.tolist()] == labels


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([0, 10**9], [0], r"row 1 of .*train\.parquet has the label 1000000000"),
        ([0], [1, 2**40], r"row 1 of .*test\.parquet has the label"),
        ([0, -1], [0], r"row 1 of .*train\.parquet has the label -1"),
        ([0, 1], [0, None], r"row 1 of .*test\.parquet has the label None"),
        (["a", None], ["a"], r"row 1 of .*train\.parquet has the label None"),
        (["a", "b"], [0, 1], r"different kinds of labels: a and 0"),
        ([0.0, 1.0], [0.0], r"column 'label' of .*train\.parquet holds .*not whole numbers or names"),
    ],
)
def test_labels_that_mean_nothing_are_refused(tmp_path, train, test, message):
    with pytest.raises(DataError, match=message):
        labelled(tmp_path, train=train, test=test).images  # noqa: B018


def with_names(folder: Path, **splits: tuple[list[int], list[str]]) -> ImageData:
    import datasets

    for split, (labels, names) in splits.items():
        kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        rows = {"image": [{"bytes": IMAGE, "path": None}] * len(labels), "label": labels}
        folder.mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=kinds).to_parquet(folder / f"{split}.parquet")
    return ImageData(str(folder), cache=str(folder / "cache"), batch=1)


def test_names_of_classes_in_the_files_are_taken_and_checked(tmp_path):
    data = with_names(tmp_path / "a", train=([0, 3], ["w", "x", "y", "z"]), test=([1], ["w", "x", "y", "z"]))
    assert data.classes == ("w", "x", "y", "z")
    assert data.images[0].labels.tolist() == [0, 3]
    with pytest.raises(DataError, match=r"the classes of .*train.* and of .*test.* differ: w, x \(2\) and x, w \(2\)"):
        with_names(tmp_path / "b", train=([0, 1], ["w", "x"]), test=([1], ["x", "w"])).images  # noqa: B018


def test_folders_of_classes_are_numbered_together(tmp_path):
    for split, names in (("train", ("bee", "cow")), ("test", ("ant", "cow"))):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "1.png").write_bytes(IMAGE)
            (tmp_path / split / name / "notes.txt").write_text("not an image")
    data = ImageData(str(tmp_path), batch=1)
    assert data.classes == ("ant", "bee", "cow")
    assert [part.labels.tolist() for part in data.images] == [[1, 2], [0, 2]]


def test_a_split_takes_no_file_of_another(tmp_path):
    labelled(tmp_path, train=[0, 1], test=[0], train_extra=[7], **{"test-hard": [8], "training": [9]})
    data = labelled(tmp_path, **{"train-00000-of-00001": [1, 0]})
    (tmp_path / "train.parquet").unlink()
    assert data.classes == (0, 1)
    assert data.images[0].labels.tolist() == [1, 0]
    with pytest.raises(DataError, match=r"valid.*would be of other splits|there is no file .*valid"):
        ImageData(str(tmp_path), test_split="valid").images  # noqa: B018


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_streamed_images_are_those_in_memory(tmp_path, workers):
    images = [encoded(torch.from_numpy(noise(6, 5, 3))) for _ in range(40)]
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", images, [k % 4 for k in range(40)])
    options = {"cache": str(tmp_path / "cache"), "batch": 8, "flip": True, "crop": 1, "seed": 3, "workers": workers}
    streams, holds = (ImageData(str(tmp_path), streaming=choice, **options) for choice in (True, False))
    for one, other in zip(streams.train_dataloader(), holds.train_dataloader(), strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_reading_images_leaves_the_random_state_alone(tmp_path):
    data = labelled(tmp_path, train=[0, 1], test=[1])
    before = torch.get_rng_state()
    assert data.images[0].pixels.shape[0] == 2
    assert torch.equal(torch.get_rng_state(), before)


MEASURE = """
import sys
import torch, datasets, torchdeq_ep_lightning
from torchdeq_ep_lightning import ImageData

def held():  # megabytes that are in no file: those of a mapped one are given back when they are wanted elsewhere
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024

before, most, seen = held(), 0.0, 0
data = ImageData(sys.argv[1], cache=sys.argv[2], streaming=True, batch=500, test_batch=500)
for _, labels in data.train_dataloader():
    seen, most = seen + len(labels), max(most, held())
print(seen, round(most - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured as Linux tells it")
def test_a_large_set_streams_within_memory(tmp_path):
    """200,000 images that do not fit: noise is not compressed, and all rows are in one group of one file."""
    images = [encoded(torch.from_numpy(noise(32, 32, 3))) for _ in range(1000)]
    write_parquet(tmp_path / "train.parquet", images * 200, [k % 10 for k in range(200_000)])
    write_parquet(tmp_path / "test.parquet", images[:10], list(range(10)))
    command = [sys.executable, "-c", MEASURE, str(tmp_path), str(tmp_path / "cache")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=900).stdout.split()
    seen, megabytes = map(int, printed)
    assert seen == 200_000
    assert megabytes < 500
