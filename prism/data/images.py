"""Images of rows, from bytes, files or (if allowed) the network; their sizes are checked before they are decoded."""

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from prism.data.download import download
from prism.data.files import RowError, open_regular, shown

# no vector or document formats: their decoders run other programs
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")


@dataclass(frozen=True)
class ImageLimits:
    """Which images are accepted.

    Args:
        min_side: least width and height in pixels.
        max_pixels: greatest width times height, read before anything is decoded.
        max_aspect: greatest ratio of the longer to the shorter side; Qwen's processor refuses more than 200.
        max_bytes: greatest size of an image's file.
        max_images: greatest number of images of a row.
        max_row_pixels: greatest number of pixels of all images of a row.
        max_row_bytes: greatest size of the files of all images of a row.
        allow_remote: whether http and https addresses are opened.
        timeout: seconds to wait for a remote image, from the look-up of its host to its last byte.
        trusted: hosts with their ports, such as `127.0.0.1:8000`, that may have an address that is not public.
    """

    min_side: int = 4
    max_pixels: int = 40_000_000
    max_aspect: float = 200.0
    max_bytes: int = 50_000_000
    max_images: int = 256
    max_row_pixels: int = 200_000_000
    max_row_bytes: int = 200_000_000
    allow_remote: bool = False
    timeout: float = 20.0
    trusted: tuple[str, ...] = ()


@dataclass(frozen=True)
class StoredImage:
    """An image as its file has it, decoded anew each time: the pixels of a large image take fifty times the memory."""

    content: bytes
    # width and height
    size: tuple[int, int]

    def convert(self, mode: str) -> Image.Image:
        """Returns the image in a mode of PIL."""
        return _open(self.content).convert(mode)


def read_images(sources: Sequence[Any], fields: Sequence[str], root: Path, limits: ImageLimits) -> list[StoredImage]:
    """Returns the images of a row as their files have them, or raises `RowError`. They are not decoded.

    Args:
        sources: for each image a path, a mapping with `bytes` or `path` as Hugging Face writes it, or bytes.
        fields: the field of each image, which errors name.
        root: the folder to which paths are relative.
        limits: which images are accepted.
    """
    if len(sources) > limits.max_images:
        field = fields[0].partition(".")[0]
        raise RowError("image size", field, f"expected at most {limits.max_images} images, got {len(sources)}")
    images: list[StoredImage] = []
    size = pixels = 0
    for source, field in zip(sources, fields):
        content = _read(source, field, root, limits)
        image = StoredImage(content, _size(content, field, limits))
        size, pixels = size + len(content), pixels + image.size[0] * image.size[1]
        for most, got, unit in ((limits.max_row_bytes, size, "bytes"), (limits.max_row_pixels, pixels, "pixels")):
            if got > most:
                raise RowError("image size", field, f"expected at most {most} {unit} in the images of a row, got {got}")
        images.append(image)
    return images


def decode(image: StoredImage, field: str) -> Image.Image:
    """Returns an image in RGB, or raises `RowError`."""
    try:
        return image.convert("RGB")
    # PIL raises many types for broken data, struct.error and SyntaxError among them
    except Exception as error:
        raise _broken(field, error) from None


def _open(content: bytes) -> Image.Image:
    with warnings.catch_warnings():
        # max_pixels decides instead
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(content), formats=FORMATS)


def _broken(field: str, error: Exception) -> RowError:
    return RowError("broken image", field, f"expected an image ({', '.join(FORMATS)}): {error}")


def _size(content: bytes, field: str, limits: ImageLimits) -> tuple[int, int]:
    """Returns width and height, as the header has them."""
    try:
        size = _open(content).size
    except Image.DecompressionBombError as error:
        raise RowError("image size", field, f"expected at most {limits.max_pixels} pixels: {error}") from None
    except Exception as error:
        raise _broken(field, error) from None
    short, long = sorted(size)
    if short < limits.min_side:
        raise RowError("image size", field, f"expected sides of at least {limits.min_side} pixels, got {size}")
    if short * long > limits.max_pixels:
        raise RowError("image size", field, f"expected at most {limits.max_pixels} pixels, got {size}")
    if long > limits.max_aspect * short:
        raise RowError("image size", field, f"expected sides of at most 1 to {limits.max_aspect:g}, got {size}")
    return size


def _read(source: Any, field: str, root: Path, limits: ImageLimits) -> bytes:
    if isinstance(source, Mapping):
        source = source.get("bytes") or source.get("path")
    where = ""
    if isinstance(source, str) and source:
        where = f" at {shown(source)}"
        source = _fetch(source, field, root, limits)
    elif not isinstance(source, bytes) or not source:
        raise RowError("wrong type", field, f"expected a path or {{'bytes': ...}}, got {shown(source)}")
    if len(source) > limits.max_bytes:
        raise RowError("image size", field, f"expected at most {limits.max_bytes} bytes{where}")
    return source


def _fetch(source: str, field: str, root: Path, limits: ImageLimits) -> bytes:
    """Returns the content of a path or an address, at most a byte more than allowed."""
    most = limits.max_bytes + 1
    if "://" in source:
        try:
            scheme = urlsplit(source).scheme.lower()
        except ValueError as error:
            problem = f"expected a path or an http(s) address, got {shown(source)}: {error}"
            raise RowError("remote image", field, problem) from None
        if scheme not in ("http", "https"):
            raise RowError("remote image", field, f"expected a path or an http(s) address, got {shown(source)}")
        if not limits.allow_remote:
            problem = f"expected a local file, got {shown(source)}; data.allow_remote_images = true opens addresses"
            raise RowError("remote image", field, problem)
        return download(source, field, most, limits.timeout, limits.trusted)
    path = root / source
    try:
        with open_regular(path) as file:
            return file.read(most)
    except (OSError, ValueError) as error:
        # ValueError: the path has a null character
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise RowError("image not found", field, f"expected an image at {path}: {why}") from None
