"""Synthetic spoken words: 12 classes as 49 frames of 10 cepstral coefficients. Needs no download.

A word is a sequence of phonemes, each with three formants, a band of noise and an energy. Every utterance has a random
speaker, speed, start, stress of its phonemes, loudness and background noise.
"""

import numpy as np

WORDS = {
    "yes": "yes",
    "no": "nou",
    "up": "ap",
    "down": "daun",
    "left": "left",
    "right": "rait",
    "on": "on",
    "off": "of",
    "stop": "stop",
    "go": "gou",
    "bed": "bed",
    "tree": "tri",
}
FRAMES, COEFFICIENTS = 49, 10
NOISE = 0.33  # amplitude of the background relative to the loudest phoneme

_BANDS = 24
_BANDWIDTH = 1.4  # of a formant, in bands
_MAX_PHONEMES = max(map(len, WORDS.values()))
_PHONEMES = {  # formants in Hz, amplitude of the voice, center of the noise in Hz, amplitude of the noise
    "a": (730, 1200, 2500, 1.0, 2000, 0.0),
    "e": (530, 1840, 2480, 0.9, 2000, 0.0),
    "i": (290, 2250, 2980, 0.8, 2500, 0.0),
    "o": (540, 880, 2420, 0.9, 2000, 0.0),
    "u": (320, 870, 2240, 0.8, 2000, 0.0),
    "y": (280, 2180, 2900, 0.6, 2500, 0.0),
    "l": (360, 1100, 2650, 0.6, 2000, 0.0),
    "r": (380, 1180, 1600, 0.6, 1600, 0.0),
    "n": (250, 1450, 2450, 0.4, 2000, 0.0),
    "b": (250, 900, 2200, 0.2, 600, 0.2),
    "d": (250, 1700, 2600, 0.2, 3000, 0.2),
    "g": (250, 2000, 2300, 0.2, 1800, 0.2),
    "p": (300, 900, 2200, 0.0, 700, 0.2),
    "t": (300, 1700, 2600, 0.0, 3400, 0.3),
    "f": (300, 1300, 2500, 0.0, 2600, 0.3),
    "s": (300, 1700, 2600, 0.0, 3900, 0.5),
}


def spoken_words(count: int, seed: int, noise: float = NOISE) -> tuple[np.ndarray, np.ndarray]:
    """Generates `count` utterances (count, 49, 10, 1), float32 of about unit variance, and their classes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(len(WORDS), size=count)
    tracks = _articulate(labels, rng)
    energy = _spectrum(tracks, rng)
    background = rng.uniform(0, 2 * noise, (count, 1, 1)) * np.exp(rng.normal(0, 0.5, (count, 1, _BANDS)))
    energy = energy + background * rng.gamma(1.0, 1.0, energy.shape)
    cepstrum = np.log(energy + 1e-2) @ _cosines()
    cepstrum = (cepstrum - cepstrum.mean((0, 1))) / cepstrum.std((0, 1))
    return cepstrum[..., np.newaxis].astype("float32"), labels.astype("int32")


def _articulate(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The six properties of the phonemes over time, (count, frames, 6); a phoneme glides into the next."""
    targets, durations = _dictionary()
    durations = durations[labels] * np.exp(rng.normal(0, 0.3, (len(labels), _MAX_PHONEMES)))
    durations *= rng.uniform(18, 36, (len(labels), 1)) / durations.sum(1, keepdims=True)
    ends = rng.uniform(1, FRAMES - 1 - durations.sum(1, keepdims=True)) + durations.cumsum(1)
    frames = np.arange(FRAMES)[:, np.newaxis]
    reached = 1 / (1 + np.exp((ends - durations)[:, np.newaxis] - frames))
    left = 1 / (1 + np.exp(ends[:, np.newaxis] - frames))
    shares = np.maximum(reached - left, 0)
    targets = targets[labels] * np.exp(rng.normal(0, 0.05, (len(labels), _MAX_PHONEMES, 6)))
    tracks = shares @ targets
    hertz = [0, 1, 2, 4]
    tracks[..., hertz] /= shares.sum(2, keepdims=True) + 1e-6
    return tracks


def _spectrum(tracks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Energy in every band, (count, frames, bands): the voice through its formants, and the noise of consonants."""
    speaker = np.exp(rng.normal(0, 0.12, (len(tracks), 1)))  # length of the vocal tract
    bands = np.arange(_BANDS)
    energy = np.zeros((*tracks.shape[:2], _BANDS))
    sources = [(0, 3, 1.0, 1), (1, 3, 0.6, 1), (2, 3, 0.3, 1), (4, 5, 1.0, 2.5)]
    for position, amplitude, gain, width in sources:
        center = _to_band(tracks[..., position] * speaker)[..., np.newaxis]
        peak = np.exp(-(((bands - center) / (width * _BANDWIDTH)) ** 2) / 2)
        energy += gain * tracks[..., amplitude, np.newaxis] * peak
    return energy * np.exp(rng.normal(0, 0.2, energy.shape))


def _dictionary() -> tuple[np.ndarray, np.ndarray]:
    """Phonemes of every word, (words, phonemes, 6), and their relative durations, 0 behind the end of a word."""
    targets, durations = np.zeros((len(WORDS), _MAX_PHONEMES, 6)), np.zeros((len(WORDS), _MAX_PHONEMES))
    for row, phonemes in enumerate(WORDS.values()):
        targets[row, : len(phonemes)] = [_PHONEMES[phoneme] for phoneme in phonemes]
        durations[row, : len(phonemes)] = [1.5 if phoneme in "aeiou" else 1.0 for phoneme in phonemes]
    return targets, durations


def _to_band(hertz: np.ndarray) -> np.ndarray:
    """Position on the mel scale, in bands between 100 Hz and 4 kHz."""
    low, high = np.log1p(100 / 700), np.log1p(4000 / 700)
    return (np.log1p(hertz / 700) - low) / (high - low) * (_BANDS - 1)


def _cosines() -> np.ndarray:
    """The discrete cosine transform from bands to coefficients."""
    angles = np.pi / _BANDS * (np.arange(_BANDS)[:, np.newaxis] + 0.5) * np.arange(COEFFICIENTS)
    return np.cos(angles) * np.sqrt(2 / _BANDS)
