"""Images, by Pillow, as frames of a video."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from mutoscope.data.decoding import MAX_PIXELS, VideoError, why
from mutoscope.data.media import IMAGES, Media

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
"""Pillow's names of them."""
SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM")
"""What they begin with; WebP has its name at byte 8."""


def is_image(media: Media) -> bool:
    """Whether it is an image: by its suffix or, in a table's cell without one, by its first bytes."""
    if media.suffix or media.row is None:
        return media.suffix in IMAGES
    try:
        with media.opened() as source:
            assert not isinstance(source, str)
            start = source.read(12)
    except (OSError, ImportError) as error:
        raise VideoError(f"{media}: {why(error)}") from error
    return start.startswith(SIGNATURES) or start[8:] == b"WEBP"


def read_image(media: Media) -> UInt8[np.ndarray, "h w 3"]:
    """The image as RGB, turned upright as its EXIF data says, what is transparent on black; of an animation the first
    picture. Raises VideoError where it can't be read."""
    try:
        media.version()  # Raises OSError where it is no file.
        with media.opened() as source, Image.open(source, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise VideoError(f"{media}: {image.width} × {image.height} pixels are too many to be decoded")
            return np.array(_rgb(ImageOps.exif_transpose(image)))
    except VideoError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise VideoError(f"{media}: too many pixels to be decoded: {error}") from error
    except Exception as error:  # Pillow's decoders raise whatever broken data makes them stumble over.
        if isinstance(error, ImportError) or (isinstance(error, OSError) and error.errno):
            raise VideoError(f"{media}: {why(error)}") from error
        raise VideoError(f"{media}: not a PNG, JPEG, WebP or BMP image, cut short or damaged: {error}") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits, which `convert` would cut off at 255.
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    black = Image.new("RGBA", image.size, (0, 0, 0, 255))
    return Image.alpha_composite(black, image).convert("RGB")
