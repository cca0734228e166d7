"""The pixels of an encoded image, without a loss that is not asked for."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from torchdeq_ep.errors import DataError
from torchdeq_ep.extend import check_choice, check_count

ALPHA = ("refuse", "keep", "black", "white")
"""What becomes of transparency: an error, a channel of its own, or the image on a ground of that colour."""
_FULL = 65535
_WITH_ALPHA = {"1": "LA", "L": "LA", "LA": "LA", "La": "LA"}


@dataclass(frozen=True)
class Reading:
    """How images are read.

    Args:
        resize: Height and width to which every image is brought, by bicubic interpolation; `None` for its own.
        alpha: What becomes of images that are transparent somewhere: one of `ALPHA`.

    Raises:
        InvalidOptionError: If an option is not acceptable.
    """

    resize: tuple[int, int] | None = None
    alpha: str = "refuse"

    def __post_init__(self) -> None:
        check_choice("data.alpha", self.alpha, ALPHA)
        for size in self.resize or ():
            check_count("data.resize", size)


def decode_image(entry: dict[str, Any] | None, row: int, path: str | Path, reading: Reading | None = None) -> Tensor:
    """The pixels of an encoded image, as Hugging Face's image data sets hold it, turned as its EXIF data say.

    Args:
        entry: A dictionary with the encoded file under `bytes`.
        row: Where it is from, for the error message.
        path: The same.
        reading: How it is read; by default as it is.

    Returns:
        A tensor of shape `(height, width, bands)`: uint8, or float32 from 0 to 1 for images of 16 bits or of floating
        numbers. One band for grey images, three for coloured ones, and one more for transparency that is kept.

    Raises:
        DataError: If there are no bytes, if they are no image, or if something of the image would be lost.
    """
    place = f"row {row} of {path}"
    encoded = None if entry is None else entry.get("bytes")
    if not encoded:
        raise DataError(f"{place} has no image bytes.")
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            _refuse_what_is_lost(image, place)
            upright = ImageOps.exif_transpose(image)
            return _pixels(upright, place, reading or Reading())
    except DataError:
        raise
    except UnidentifiedImageError as error:
        start = f"its {len(encoded)} bytes begin with {encoded[:8]!r}"
        raise DataError(f"{place} is not an image of a format that Pillow knows: {start}.") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{place} is not an image that can be decoded: {error}") from error


def _refuse_what_is_lost(image: Image.Image, place: str) -> None:
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a photograph with its preview
        raise DataError(f"{place} is an image of {frames} frames, of which one alone could be used.")
    deep = any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
    if deep and not image.mode.startswith("I"):
        raise DataError(
            f"{place} is an image of 16 bits in each of several channels, of which Pillow keeps 8: convert it to 8 "
            "bits, or to one file of 16 bits for each channel."
        )


def _pixels(image: Image.Image, place: str, reading: Reading) -> Tensor:
    if image.mode.startswith("I;16") or image.mode == "F" or (image.mode == "I" and image.format == "PNG"):
        return _deep(image, place, reading)
    if image.mode == "I":
        raise DataError(
            f"{place} is an image of mode I, whole numbers of 32 bits: nothing tells which of them is white. Convert "
            "it to 16 bits, or to floating numbers from 0 to 1."
        )
    if image.has_transparency_data:
        image = _without_loss_of_alpha(image.convert(_WITH_ALPHA.get(image.mode, "RGBA")), place, reading.alpha)
    else:
        image = image.convert("L" if image.mode in ("1", "L") else "RGB")
    if reading.resize is not None:
        image = image.resize(reading.resize[::-1], Image.Resampling.BICUBIC)
    raw = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return raw.reshape(image.height, image.width, len(image.getbands()))


def _deep(image: Image.Image, place: str, reading: Reading) -> Tensor:
    """Of one channel of 16 bits or of floating numbers."""
    values: Any = np.asarray(image, dtype=np.float32)
    if image.mode != "F":
        values = values / _FULL
    elif not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
        raise DataError(
            f"{place} is an image of floating numbers from {values.min():g} to {values.max():g}: they must lie between "
            "0 (black) and 1 (white)."
        )
    if reading.resize is not None:
        resized = Image.fromarray(values).resize(reading.resize[::-1], Image.Resampling.BICUBIC)
        values = np.clip(np.asarray(resized), 0, 1)
    return torch.from_numpy(values.copy())[..., None]


def _without_loss_of_alpha(image: Image.Image, place: str, alpha: str) -> Image.Image:
    """An image of mode LA or RGBA, with what is asked for in place of its transparency."""
    colours = image.mode.removesuffix("A")
    opaque = image.getchannel("A").getextrema() == (255, 255)
    if alpha == "keep":
        return image
    if opaque:
        return image.convert(colours)
    if alpha == "refuse":
        raise DataError(
            f"{place} is an image that is transparent in places, which a network cannot see: set data.alpha to keep "
            "for a channel of its own, or to black or white for a ground behind the image."
        )
    ground = Image.new(image.mode, image.size, alpha)
    return Image.alpha_composite(ground.convert("RGBA"), image.convert("RGBA")).convert(colours)
