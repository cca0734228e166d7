"""The data module: sources, errors that name file and row, order, augmentation, shares of processes."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pytest
import torch
from lightning_problems import coloured_images, encoded, write_coloured, write_parquet
from pyarrow import parquet

from torchdeq_ep.errors import DataError, InvalidOptionError, MissingDependencyError
from torchdeq_ep_lightning import ImageData
from torchdeq_ep_lightning.batches import EpochBatches, augment
from torchdeq_ep_lightning.images import load_images


def batches(data: ImageData, epoch: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    loader = data.train_dataloader()
    loader.batch_sampler.set_epoch(epoch)
    return list(loader)


def test_digits_are_split_without_overlap_and_always_alike():
    data = ImageData(test_batch=100)
    assert data.shape == (1, 8, 8)
    assert data.n_classes == 10
    x, y = zip(*data.val_dataloader(), strict=True)
    assert torch.cat(x).shape == (360, 1, 8, 8)
    assert torch.cat(x).amin() == 0
    assert torch.cat(x).amax() == 1
    assert torch.cat(y).unique().tolist() == list(range(10))
    torch.manual_seed(99)
    train, test = load_images()
    assert len(train.labels) == 1437
    assert torch.equal(test.pixels, torch.cat(x))
    both = torch.cat([train.pixels, test.pixels]).flatten(1)
    assert len(both.unique(dim=0)) == len(both)  # no image is in both parts


def test_a_missing_reader_of_the_digits_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingDependencyError, match=r"scikit-learn.*torchdeq-ep\[compare\]"):
        ImageData().images  # noqa: B018


def test_parquet(tmp_path):
    images, labels = coloured_images(12, size=8)
    write_parquet(tmp_path / "d" / "train-00000-of-00002.parquet", images[:4], labels[:4])
    write_parquet(tmp_path / "d" / "train-00001-of-00002.parquet", images[4:8], labels[4:8])
    write_parquet(tmp_path / "d" / "test.parquet", images[8:], labels[8:])
    data = ImageData(str(tmp_path / "d"), cache=str(tmp_path / "cache"))
    assert data.shape == (3, 8, 8)
    assert data.images[0].labels.tolist() == labels[:8]
    assert data.images[1].labels.tolist() == labels[8:]
    assert data.images[0].pixels.dtype == torch.uint8


def test_image_folder(tmp_path):
    images, _ = coloured_images(8, size=8)
    for k, image in enumerate(images):
        path = tmp_path / "d" / ("train" if k < 6 else "test") / ("cat", "dog")[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    source, cache = str(tmp_path / "d"), str(tmp_path / "cache")
    data = ImageData(source, cache=cache)
    assert sorted(data.images[0].labels.tolist()) == [0, 0, 0, 1, 1, 1]
    assert data.n_classes == 2
    broken = tmp_path / "d" / "train" / "dog" / "3.png"
    broken.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"3\.png"):
        ImageData(source, cache=str(tmp_path / "other")).images  # noqa: B018


def test_the_hub_is_asked_for_other_names(tmp_path, monkeypatch):
    """By name, split and columns; a failure names them."""
    import datasets

    asked = []

    def load_dataset(name, *, split, cache_dir):
        asked.append((name, split))
        images, labels = coloured_images(4, size=8)
        rows = {"img": [{"bytes": image, "path": None} for image in images], "fine_label": labels}
        kinds = datasets.Features({"img": datasets.Image(), "fine_label": datasets.ClassLabel(num_classes=100)})
        return datasets.Dataset.from_dict(rows, features=kinds)

    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", load_dataset)
        data = ImageData("someone/cifar100", image_column="img", label_column="fine_label", test_split="validation")
        assert data.n_classes == 100
        assert asked == [("someone/cifar100", "train"), ("someone/cifar100", "validation")]
    with pytest.raises(DataError, match=r"(?s)'train' of 'nobody/nothing'.*hub"):
        ImageData("nobody/nothing").images  # noqa: B018


def test_grey_images_have_one_channel_and_coloured_ones_three(tmp_path):
    pixels = torch.arange(6, dtype=torch.uint8)[:, None, None] * 20 * torch.ones(3, 4, dtype=torch.uint8)
    folder = tmp_path / "d"
    for split in ("train", "test"):
        write_parquet(folder / f"{split}.parquet", [encoded(image) for image in pixels], list(range(6)))
    train, _ = load_images(str(folder), cache=str(tmp_path / "cache"))
    assert torch.equal(train.pixels[:, 0], pixels)
    red = torch.zeros(3, 4, 3, dtype=torch.uint8)
    red[..., 0] = 255
    write_parquet(folder / "test.parquet", [encoded(red)], [0])
    _, test = load_images(str(folder), cache=str(tmp_path / "other"))
    assert torch.equal(test.pixels[0], red.permute(2, 0, 1))


def spoil(name: str, folder: Path) -> None:
    images, labels = coloured_images(6, size=8)
    path = folder / "train.parquet"
    if name == "no file":
        path.unlink()
    elif name == "no parquet":
        path.write_bytes(b"PAR1 but not really")
    elif name == "no rows":
        write_parquet(path, images, labels)
        parquet.write_table(parquet.read_table(path).slice(0, 0), path)
    elif name == "no column":
        parquet.write_table(pyarrow.table({"image": [1], "class": [1]}), path)
    elif name == "text labels":
        table = parquet.read_table(path).drop_columns("label")
        parquet.write_table(table.append_column("label", pyarrow.array(["cat"] * len(table))), path)
    elif name == "no images":
        parquet.write_table(pyarrow.table({"image": [1.0], "label": [1]}), path)
    elif name == "broken image":
        write_parquet(path, [*images[:3], b"nothing", *images[4:]], labels)
    elif name == "truncated image":
        write_parquet(path, [*images[:3], images[3][:40], *images[4:]], labels)
    elif name == "missing image":
        write_parquet(path, [*images[:3], None, *images[4:]], labels)
    elif name == "empty image":
        write_parquet(path, [*images[:3], b"", *images[4:]], labels)
    elif name == "truncated file":
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif name == "other size":
        write_parquet(path, [*images[:3], encoded(torch.zeros(9, 8, 3, dtype=torch.uint8)), *images[4:]], labels)
    elif name == "negative label":
        write_parquet(path, images, [*labels[:3], -1, *labels[4:]])
    elif name == "missing label":
        write_parquet(path, images, [*labels[:3], None, *labels[4:]])
    elif name == "second file":
        write_parquet(folder / "train2.parquet", [images[0], b"nothing"], [0, 1])


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ("no file", r"there is no file .*train\.parquet"),
        ("no parquet", r"cannot read .*train\.parquet as Parquet"),
        ("no rows", r"train\.parquet has no rows"),
        ("no column", r"train\.parquet has no column 'label', only image, class"),
        ("text labels", r"train\.parquet and .* hold different kinds of labels"),
        ("no images", r"column 'image' of .*train\.parquet is .*float64"),
        ("broken image", r"row 3 of .*train\.parquet is not an image"),
        ("truncated image", r"row 3 of .*train\.parquet is not an image"),
        ("missing image", r"row 3 of .*train\.parquet has no image"),
        ("empty image", r"row 3 of .*train\.parquet has no image"),
        ("truncated file", r"cannot read .*train\.parquet as Parquet"),
        ("other size", r"row 3 of .*train\.parquet is an image of shape \(3, 9, 8\)"),
        ("negative label", r"row 3 of .*train\.parquet has the label -1"),
        ("missing label", r"row 3 of .*train\.parquet has the label None"),
        ("second file", r"row 1 of .*train2\.parquet is not an image"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_row(tmp_path, problem, message):
    folder = write_coloured(tmp_path / "d", 6, 4, size=8)
    spoil(problem, folder)
    with pytest.raises(DataError, match=message):
        ImageData(str(folder), cache=str(tmp_path / "cache")).images  # noqa: B018


def test_shape_and_folder_are_checked(tmp_path):
    folder = write_coloured(tmp_path / "d", 6, 4, size=8)
    with pytest.raises(DataError, match=r"\(3, 8, 8\).*not \(3, 32, 32\)"):
        ImageData(str(folder), shape=(3, 32, 32), cache=str(tmp_path / "cache")).images  # noqa: B018
    with pytest.raises(DataError, match=r"there is no folder \./nowhere"):
        ImageData("./nowhere").images  # noqa: B018
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty"):
        ImageData(str(tmp_path / "empty")).images  # noqa: B018


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"batch": 0}, "data.batch"),
        ({"crop": -1}, "data.crop"),
        ({"std": [0.0]}, "data.std"),
        ({"mean": [0.0, 0.0]}, "data.mean"),
        ({"batch": 5000}, "data.batch"),
    ],
)
def test_bad_options_name_their_key(options, key):
    with pytest.raises(InvalidOptionError, match=key):
        ImageData(**options).train_dataloader()


def test_order_depends_on_seed_and_epoch_alone():
    first = batches(ImageData(seed=1), epoch=3)
    again = batches(ImageData(seed=1), epoch=3)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    for other in (batches(ImageData(seed=1), epoch=4), batches(ImageData(seed=2), epoch=3)):
        assert not torch.equal(first[0][1], other[0][1])


@pytest.mark.parametrize("seed", [0, None])
def test_processes_share_each_batch(seed):
    whole = [rows for _, rows in EpochBatches(103, 10, seed, 0, 1)]
    shares = [[rows for _, rows in EpochBatches(103, 10, seed, rank, 2)] for rank in (0, 1)]
    for k, rows in enumerate(whole):
        assert sorted(rows.tolist()) == sorted(torch.cat([shares[0][k], shares[1][k]]).tolist())
    seen = torch.cat(whole)
    assert len(seen.unique()) == len(seen) == (100 if seed == 0 else 103)


def test_a_batch_that_cannot_be_shared_is_refused():
    data = ImageData(batch=25)
    data.trainer = SimpleNamespace(global_rank=0, world_size=2)
    with pytest.raises(InvalidOptionError, match="2 processes"):
        data.train_dataloader()


@pytest.mark.parametrize("place", [0, 1, 7, 27, 28])
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_loader_continues_behind_any_batch(place, workers):
    data = ImageData(seed=5, flip=True, crop=1, workers=workers)
    whole = batches(data, epoch=2)
    loader = data.train_dataloader()
    loader.batch_sampler.set_epoch(2)
    iterator = iter(loader)
    for _ in range(place):
        next(iterator)
    state = loader.state_dict()
    resumed = data.train_dataloader()
    resumed.batch_sampler.set_epoch(2)
    resumed.load_state_dict(state)
    rest = list(resumed)
    expected = whole[place % len(whole) :]
    assert len(rest) == len(expected)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(rest, expected, strict=True))
    assert len(list(resumed)) == len(whole)  # and the next epoch is a whole one


def test_augmentation_of_an_image_does_not_depend_on_its_batch():
    many, few = (batches(ImageData(batch=size, flip=True, crop=2, seed=3)) for size in (100, 10))
    assert torch.equal(many[0][0], torch.cat([x for x, _ in few[:10]]))


def test_augmentation_is_a_mirror_and_a_shift():
    torch.manual_seed(0)
    x = torch.rand(64, 3, 6, 5)
    flips, shifts = torch.rand(64) < 0.5, torch.randint(5, (64, 2))
    changed = augment(x, flips, shifts, 2)
    for k in range(64):
        image = x[k].flip(-1) if flips[k] else x[k]
        padded = torch.zeros(3, 10, 9)
        padded[:, 2:8, 2:7] = image
        top, left = shifts[k].tolist()
        assert torch.equal(changed[k], padded[:, top : top + 6, left : left + 5])
    assert torch.equal(augment(x, torch.zeros(64, dtype=torch.bool), torch.zeros(64, 2, dtype=torch.long), 0), x)


def test_normalisation_follows_augmentation(tmp_path):
    folder = write_coloured(tmp_path / "d", 6, 4, size=8)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.1, 0.3)
    data = ImageData(str(folder), mean=mean, std=std, cache=str(tmp_path / "cache"), test_batch=4)
    (x, _) = next(iter(data.val_dataloader()))
    raw = data.images[1].pixels.float() / 255
    assert torch.allclose(x, (raw - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None])
