"""What the page shows of attention, taken out of a forward pass block by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..ops import Ops
from ..ops.reference import relative_position_index, softmax
from ..trace import Trace
from .pack import TEXT_PER_BYTE, rounded, spaced, square_roots

PARTS = ("bias_table", "query", "key", "value", "probs")
ROOM = 17e6  # characters of a page for queries and keys
ROOM_FOR_ROLLOUTS = 6.6e6
CHECKED_ROWS = 16  # queries of each head whose probabilities are compared with the model's


@dataclass
class Attention:
    """The attention of one image, in the numbers that the page is made of.

    `blocks` are the L' blocks whose queries and keys are kept, of all L; `rollout_blocks` likewise.  Keys are centred:
    their mean over tokens is subtracted, which adds a constant to each row of scores, so that softmax ignores it.
    Distances are in patches.  `difference` is the largest one found between probabilities computed from the rounded
    numbers and the model's.
    """

    blocks: list[int]
    rollout_blocks: list[int]
    bits: int
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    difference: float = 0.0


class AttentionTrace(Trace):
    """Keeps of every block what the page needs, and no probabilities of more than one block.

    Those without the position bias are softmax(q k^T / sqrt(d)) of the same queries and keys, by the same op.
    """

    def __init__(self, ops: Ops, depth: int, heads: int, head_size: int, grid: tuple[int, int]) -> None:
        super().__init__(f"encoder.*.attention.{part}" for part in PARTS)
        self._ops, self._grid = ops, grid
        self._index = relative_position_index(grid)
        tokens = 1 + grid[0] * grid[1]
        self._bits, blocks = bits_and_blocks(depth, 2 * heads * tokens * head_size)
        rollouts = int(ROOM_FOR_ROLLOUTS / TEXT_PER_BYTE / tokens**2)
        self.found = Attention(blocks, spaced(depth, rollouts), self._bits)
        self._rows: dict[str, list[np.ndarray]] = {}
        self._now: dict[str, Any] = {}
        self._rolled = np.eye(tokens, dtype=np.float32)
        self._distances = distances(grid)

    def record(self, name: str, array: Any) -> Any:
        """Keeps the parts of a block until its probabilities come, which are the last of them."""
        if self.wants(name):
            block, part = int(name.split(".")[1]), name.rsplit(".", 1)[1]
            self._now[part] = array
            if part == "probs":
                self._take(block)
                self._now = {}
        return array

    def finish(self) -> Attention:
        """Everything that was taken, stacked along a first axis of blocks."""
        self.found.arrays = {name: np.stack(rows) for name, rows in self._rows.items()}
        return self.found

    def _take(self, block: int) -> None:
        now = self._now
        probs = self._host(now["probs"])[0]  # (H, N, N)
        table = None
        self._keep(distance=distance(probs, self._distances), to_cls=probs[:, 1:, 0].mean(1))
        if "bias_table" in now:
            table = self._host(now["bias_table"]).T  # (H, R)
            _, without = self._ops.attention(now["query"], now["key"], now["value"], None, return_probs=True)
            plain = self._host(without)[0]
            self._keep(distance_without=distance(plain, self._distances), to_cls_without=plain[:, 1:, 0].mean(1))
        self._rolled = rolled_on(self._rolled, probs)
        if block in self.found.rollout_blocks:
            rollout, scale = square_roots(self._rolled)
            self._keep(rollout=rollout, rollout_scale=scale)
        if block in self.found.blocks:
            self._take_scores(table, probs)

    def _take_scores(self, table: np.ndarray | None, probs: np.ndarray) -> None:
        """Queries, keys and bias, rounded; and how far what they give is from `probs`."""
        query = self._host(self._now["query"])[0]  # (H, N, d)
        key = self._host(self._now["key"])[0]
        kept = {"query": rounded(query, self._bits), "key": rounded(key - key.mean(1, keepdims=True), self._bits)}
        if table is not None:
            kept["table"] = rounded(table, 16)
        for name, (integers, scale) in kept.items():
            self._keep(**{name: integers, f"{name}_scale": scale})
        again = {name: integers * scale[..., None] for name, (integers, scale) in kept.items()}
        tokens = probs.shape[1]
        rows = np.unique(np.linspace(0, tokens - 1, min(tokens, CHECKED_ROWS)).astype(int))
        found = probabilities(again["query"], again["key"], again.get("table"), self._grid, rows, self._index)
        self.found.difference = max(self.found.difference, float(np.abs(found - probs[:, rows]).max()))

    def _keep(self, **arrays: np.ndarray) -> None:
        for name, array in arrays.items():
            as_stored = array.astype(np.float32) if array.dtype.kind == "f" else array
            self._rows.setdefault(name, []).append(as_stored)

    def _host(self, array: Any) -> np.ndarray:
        return np.asarray(self._ops.to_host(array), np.float32)


def bits_and_blocks(depth: int, numbers: int) -> tuple[int, list[int]]:
    """How many bits queries and keys get, 16 or 8, and which blocks are kept, so that they fit into ROOM.

    `numbers` is how many a block has.
    """
    room = ROOM / TEXT_PER_BYTE
    bits = 16 if 2 * numbers * depth <= room else 8
    return bits, spaced(depth, int(room / numbers * 8 / bits))


def probabilities(
    query: np.ndarray,
    key: np.ndarray,
    table: np.ndarray | None,
    grid: tuple[int, int],
    rows: Sequence[int] | np.ndarray,
    index: np.ndarray | None = None,
) -> np.ndarray:  # 2 x (H, N, d), (H, R) -> (H, rows, N)
    """softmax(q k^T / sqrt(d) + bias) of some queries, as the page's script computes it."""
    scores = query[:, rows] @ key.swapaxes(1, 2) * query.shape[-1] ** -0.5
    if table is not None:
        index = relative_position_index(grid) if index is None else index
        scores = scores + table[:, index[rows]]
    return softmax(scores)


def distances(grid: tuple[int, int]) -> np.ndarray:  # -> (P, P)
    """The Euclidean distance between the centres of any two patches, in patches."""
    row, column = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    return np.hypot(row[:, None] - row, column[:, None] - column).astype(np.float32)


def distance(probs: np.ndarray, between: np.ndarray) -> np.ndarray:  # (H, N, N), (P, P) -> (H,)
    """The mean distance from a patch to the patches that it looks at, weighted by probability, in patches.

    [CLS] has no place, so its probabilities are left out and the others made to add up to one.
    Source: Dosovitskiy et al. 2020, figure 7 and appendix D.7; BEiT section 3.4 looks at the maps themselves.
    """
    patches = probs[:, 1:, 1:]
    weighted = np.einsum("hij,ij->hi", patches, between, optimize=True)
    return (weighted / np.maximum(patches.sum(-1), 1e-30)).mean(-1)


def rolled_on(rolled: np.ndarray, probs: np.ndarray) -> np.ndarray:  # (N, N), (H, N, N) -> (N, N)
    """Attention rollout with one more block: (mean of the heads + identity) / 2, times the rollout before it.

    Row i says how much of each token of the embeddings is in token i, if values were only mixed and residuals counted
    as much as attention.  Source: Abnar and Zuidema 2020.
    """
    mixed = (probs.mean(0, dtype=np.float64) + np.eye(len(rolled))) / 2
    return (mixed @ rolled).astype(np.float32)
