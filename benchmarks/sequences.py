"""Texts to learn from, without a download: the source of Python's standard library, and dates as people write them."""

import calendar
import collections
import datetime
import functools
import io
import keyword
import pathlib
import re
import tokenize

import numpy as np

PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "xml")
WORDS, PASSAGE = 2000, 32
CHARACTERS, WINDOW = 128, 48
TAGS = ("space", "name", "keyword", "number", "string", "comment", "operator")
SOURCE, TARGET = 28, 10
_FORMATS = ("%A %d %B %Y", "%B %d, %Y", "%b %d %Y", "%d.%m.%Y", "%d %b %y", "%Y/%m/%d", "%a, %d %b %Y")
_OF_TYPE = {tokenize.NUMBER: "number", tokenize.STRING: "string", tokenize.COMMENT: "comment", tokenize.OP: "operator"}

Split = tuple[tuple, tuple]


def passages(seed: int) -> Split:
    """Which package a passage of 32 words comes from: word numbers (n, 32) below 2000, and 8 classes."""
    found = [
        (label, words[start : start + PASSAGE])
        for label, package in enumerate(PACKAGES)
        for words in [re.findall(r"[A-Za-z_]+|\d+|[^\sA-Za-z_0-9]", "\n".join(_texts(package)))]
        for start in range(0, len(words) - PASSAGE, PASSAGE)
    ]
    order = np.random.default_rng(seed).permutation(len(found))
    train, test = np.split(order, [int(0.8 * len(order))])
    counts = collections.Counter(word for index in train for word in found[index][1])
    numbers = {word: number for number, (word, _) in enumerate(counts.most_common(WORDS - 2), start=2)}
    x = np.array([[numbers.get(word, 1) for word in words] for _, words in found], "int32")
    y = np.array([label for label, _ in found], "int32")
    return (x[train], y[train]), (x[test], y[test])


def tagged_source(seed: int, train: int = 8000, test: int = 2000) -> Split:
    """What each of 48 characters of source is part of: character codes (n, 48) below 128, and 7 classes for each."""
    texts = [text for package in PACKAGES for text in _texts(package)]
    rng = np.random.default_rng(seed)
    split = rng.permutation(len(texts)) < 0.8 * len(texts)
    parts = []
    for chosen, count in ((split, train), (~split, test)):
        codes, tags = (np.concatenate(each) for each in zip(*_tagged(texts, chosen), strict=True))
        starts = rng.integers(len(codes) - WINDOW, size=count)
        parts.append(tuple(np.stack([each[s : s + WINDOW] for s in starts]) for each in (codes, tags)))
    return parts[0], parts[1]


def dates(seed: int, train: int = 10_000, test: int = 2000) -> Split:
    """A date as people write it, and as ISO 8601 has it: `((source, target so far), target)` in character codes."""
    rng = np.random.default_rng(seed)
    days = rng.integers(datetime.date(1950, 1, 1).toordinal(), datetime.date(2049, 12, 31).toordinal(), train + test)
    dates = [datetime.date.fromordinal(int(day)) for day in days]
    formats = rng.integers(len(_FORMATS), size=len(dates))
    source = _codes([date.strftime(_FORMATS[index]) for date, index in zip(dates, formats, strict=True)], SOURCE)
    target = _codes([date.isoformat() for date in dates], TARGET)
    before = np.concatenate([np.full((len(target), 1), 1, "int32"), target[:, :-1]], axis=1)
    return ((source[:train], before[:train]), target[:train]), ((source[train:], before[train:]), target[train:])


@functools.cache
def _texts(package: str) -> list[str]:
    folder = pathlib.Path(calendar.__file__).parent / package
    return [path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py")) if "test" not in path.parts]


def _tagged(texts: list[str], chosen: np.ndarray):
    for text, wanted in zip(texts, chosen, strict=True):
        if wanted and text.strip():
            yield _codes([text], len(text))[0], _tags(text)


def _tags(text: str) -> np.ndarray:
    starts = np.cumsum([0, *(len(line) for line in text.splitlines(keepends=True))])
    tags = np.zeros(len(text), "int32")
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        name = "name" if token.type == tokenize.NAME else _OF_TYPE.get(token.type, "space")
        name = "keyword" if name == "name" and keyword.iskeyword(token.string) else name
        (row, column), (last_row, last_column) = token.start, token.end
        if name != "space":
            tags[starts[row - 1] + column : starts[last_row - 1] + last_column] = TAGS.index(name)
    return tags


def _codes(texts: list[str], size: int) -> np.ndarray:
    """ASCII, 0 behind the end."""
    codes = np.zeros((len(texts), size), "int32")
    for row, text in zip(codes, texts, strict=True):
        row[: len(text)] = [min(ord(character), CHARACTERS - 1) for character in text[:size]]
    return codes
