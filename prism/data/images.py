"""Images of rows, from bytes, files or (if allowed) the network; their sizes are checked before they are decoded."""

import io
import urllib.error
import urllib.request
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from prism.data.files import RowError, shown

# no vector or document formats: their decoders run other programs
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")


@dataclass(frozen=True)
class ImageLimits:
    """Which images are accepted.

    Args:
        min_side: least width and height in pixels.
        max_pixels: greatest width times height, read before anything is decoded.
        max_aspect: greatest ratio of the longer to the shorter side; Qwen's processor refuses more than 200.
        allow_remote: whether http and https addresses are opened.
        max_bytes: greatest size of a remote image.
        timeout: seconds to wait for a remote image.
    """

    min_side: int = 4
    max_pixels: int = 40_000_000
    max_aspect: float = 200.0
    allow_remote: bool = False
    max_bytes: int = 50_000_000
    timeout: float = 20.0


def open_image(source: Any, field: str, root: Path, limits: ImageLimits) -> Image.Image:
    """Returns an image in RGB, or raises `RowError`.

    Args:
        source: a path, a mapping with `bytes` or `path` as Hugging Face writes it, or bytes.
        field: the image's field, which errors name.
        root: the folder to which paths are relative.
        limits: which images are accepted.
    """
    if isinstance(source, Mapping):
        source = source.get("bytes") or source.get("path")
    if isinstance(source, str) and source:
        source = _read(source, field, root, limits)
    if not isinstance(source, bytes) or not source:
        raise RowError("wrong type", field, f"expected a path or {{'bytes': ...}}, got {shown(source)}")
    try:
        with warnings.catch_warnings():
            # max_pixels decides instead
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(source), formats=FORMATS)
        _check_size(image.size, field, limits)
        # PIL raises many types for broken data, struct.error and SyntaxError among them
        return image.convert("RGB")
    except RowError:
        raise
    except Image.DecompressionBombError as error:
        raise RowError("image size", field, f"expected at most {limits.max_pixels} pixels: {error}") from None
    except Exception as error:
        raise RowError("broken image", field, f"expected an image ({', '.join(FORMATS)}): {error}") from None


def _check_size(size: tuple[int, int], field: str, limits: ImageLimits) -> None:
    short, long = sorted(size)
    if short < limits.min_side:
        raise RowError("image size", field, f"expected sides of at least {limits.min_side} pixels, got {size}")
    if short * long > limits.max_pixels:
        raise RowError("image size", field, f"expected at most {limits.max_pixels} pixels, got {size}")
    if long > limits.max_aspect * short:
        raise RowError("image size", field, f"expected sides of at most 1 to {limits.max_aspect:g}, got {size}")


def _read(source: str, field: str, root: Path, limits: ImageLimits) -> bytes:
    scheme = urlsplit(source).scheme.lower() if "://" in source else ""
    if scheme in ("http", "https"):
        if not limits.allow_remote:
            problem = f"expected a local file, got {shown(source)}; data.allow_remote_images = true opens addresses"
            raise RowError("remote image", field, problem)
        return _download(source, field, limits)
    if scheme:
        raise RowError("remote image", field, f"expected a path or an http(s) address, got {shown(source)}")
    path = root / source
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        # ValueError: the path has a null character
        why = error.strerror if isinstance(error, OSError) else error
        raise RowError("image not found", field, f"expected an image at {path}: {why}") from None


def _download(address: str, field: str, limits: ImageLimits) -> bytes:
    try:
        with urllib.request.urlopen(address, timeout=limits.timeout) as response:
            content: bytes = response.read(limits.max_bytes + 1)
    except (OSError, ValueError, urllib.error.URLError) as error:
        raise RowError("image not found", field, f"expected an image at {shown(address)}: {error}") from None
    if len(content) > limits.max_bytes:
        raise RowError("image size", field, f"expected at most {limits.max_bytes} bytes at {shown(address)}")
    return content
