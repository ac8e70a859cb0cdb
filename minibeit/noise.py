"""Random numbers of training that depend on what they are for, not on when or where they are drawn."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

WORD = 2**64


@dataclass(frozen=True)
class Noise:
    """The noise of one training step; the same `seed` and `step` give the same numbers.

    Each block, each place in it and each sample of the batch has a stream of its own, that of a counter-based
    generator (Philox), so that the numbers are the same on any number of ranks, and again when a block is computed a
    second time.  `samples` are the numbers that the samples have in the whole batch of the step, where they are only
    some of it; without them the first is sample 0, the next sample 1.
    Source: Salmon et al. 2011.
    """

    seed: int
    step: int = 0
    samples: tuple[int, ...] = ()
    block: int = 0
    place: int = 0

    def at(self, block: int | None = None, place: int | None = None) -> Noise:
        """The noise of another block, or of another place in the block."""
        return replace(self, block=self.block if block is None else block, place=self.place if place is None else place)

    def random(self, shape: tuple[int, ...]) -> np.ndarray:  # -> shape, float32
        """Numbers in [0, 1), the first axis being the samples.  The same for every call."""
        out = np.empty(shape, np.float32)
        samples = self.samples or range(shape[0])
        if len(samples) != shape[0]:
            raise ValueError(f"noise: expected {len(samples)} samples, which have numbers, found {shape[0]}")
        for i, sample in enumerate(samples):
            key = np.array([self.seed % WORD, self.step % WORD], np.uint64)
            counter = np.array([0, self.place, self.block, sample], np.uint64)
            stream = np.random.Generator(np.random.Philox(key=key, counter=counter))
            out[i] = stream.random(shape[1:], dtype=np.float32)
        return out


def as_noise(rng: np.random.Generator | Noise) -> Noise:
    """`rng` itself if it is noise; else that of a seed drawn from a NumPy generator."""
    return rng if isinstance(rng, Noise) else Noise(int(rng.integers(2**63)))
