"""The intermediates that a call asked for."""

from __future__ import annotations

from typing import Any

from ..ops import Ops
from ..trace import Scope, Trace

Array = Any


class Capture:
    """The intermediates that a call asked for: hidden states, attention maps, and those for the caller's own trace."""

    def __init__(self, ops: Ops, states: bool, attentions: bool, trace: Trace | None) -> None:
        self._ops = ops
        self._states = Trace(("embeddings", "encoder.*.output") if states else ())
        self._attentions = Trace(("encoder.*.attention.probs",) if attentions else ())
        self._wanted = states, attentions
        sinks = (self._states, self._attentions, trace)
        self.scope = Scope(tuple(sink for sink in sinks if sink is not None and sink.select))

    @property
    def empty(self) -> bool:
        """Whether nothing was asked for; then work that no output needs may be skipped."""
        return self.scope.silent

    @property
    def hidden_states(self) -> tuple[Array, ...] | None:
        """L + 1 of (B, N, D): the embeddings, then the output of every block."""
        return self._host(self._states) if self._wanted[0] else None

    @property
    def attentions(self) -> tuple[Array, ...] | None:
        """L of (B, H, N, N): the probabilities of every block."""
        return self._host(self._attentions) if self._wanted[1] else None

    def _host(self, trace: Trace) -> tuple[Array, ...]:
        return tuple(self._ops.to_host(array) for array in trace.values())
