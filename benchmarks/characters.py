"""Rendered characters: 36 classes, 28 by 28 pixels, from the fonts that matplotlib ships. Needs no download.

Every picture has a random font, size, slant, turn, place, blur, contrast and noise.
"""

import functools
import pathlib
import string

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

CLASSES = string.digits + string.ascii_uppercase
SIZE = 28
_CANVAS = 48


def characters(count: int, seed: int, classes: int = len(CLASSES)) -> tuple[np.ndarray, np.ndarray]:
    """`count` pictures (count, 28, 28, 1), float32 in [0, 1], and their classes; of the first `classes`, 10: digits."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=count)
    images = np.stack([_render(CLASSES[label], rng) for label in labels])
    return images[..., np.newaxis], labels.astype("int32")


@functools.lru_cache
def _fonts() -> list[str]:
    """Those with letters of their own: not the symbols, the extensions for mathematics, and the last resort."""
    folder = pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf")
    strange = ("cmex", "cmsy", "cmmi", "LastResort", "STIXSiz", "STIXNonUni", "Display")
    return sorted(str(path) for path in folder.glob("*.ttf") if not any(name in path.name for name in strange))


@functools.lru_cache(maxsize=4096)
def _font(path: str, size: int):
    return ImageFont.truetype(path, size)


def _render(character: str, rng: np.random.Generator) -> np.ndarray:
    font = _font(_fonts()[rng.integers(len(_fonts()))], int(rng.integers(24, 40)))
    picture = Image.new("L", (_CANVAS, _CANVAS))
    ImageDraw.Draw(picture).text((_CANVAS / 2, _CANVAS / 2), character, fill=255, font=font, anchor="mm")
    slant, (x, y) = rng.normal(0, 0.2), rng.normal(0, 2, 2)
    picture = picture.rotate(rng.normal(0, 12), resample=Image.Resampling.BILINEAR)
    matrix = (1, slant, x - slant * _CANVAS / 2, 0, 1, y)
    picture = picture.transform((_CANVAS, _CANVAS), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.5))).resize((SIZE, SIZE))
    values = np.asarray(picture, "float32") / 255 * rng.uniform(0.6, 1)
    return np.clip(values + rng.normal(0, 0.1, values.shape), 0, 1).astype("float32")
