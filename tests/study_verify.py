"""How often the verifier is wrong: false alarms on correct implementations, and planted faults that it misses.

    python tests/study_verify.py alarms 0 2000   random models, each computed in another correct way
    python tests/study_verify.py faults          every planted fault, on weights that matter and on fresh ones

Not a test: minutes.  The counts of the last run stand in docs/verify.md.
"""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import numpy as np
from test_verify_clean import drawn_job
from test_verify_correct_ports import in_order
from test_verify_small_faults import NEW
from verify_faults import FAULTS
from verify_plant import Fault, job, model_of

from minibeit.ops import reference
from minibeit.params import param_shapes, random_arrays
from minibeit.verify import budget
from minibeit.verify.informative import informative_weights
from minibeit.verify.lockstep import Job, Report, check, model_source
from minibeit.verify.slices import worst_slice

PRODUCTS = ("linear", "linear_activation", "linear_residual")


# Correct ways to compute ----------------------------------------------------------------------------------------------


def shuffled(model, rng) -> None:
    """Every product adds its terms up in another order."""

    def product(name, good):
        def call(x, layer, *rest, **kwargs):
            order = rng.permutation(x.shape[-1])
            weight = layer.weight.reshape(layer.weight.shape[0], -1)[:, order]
            return good(
                np.ascontiguousarray(x[..., order]), type(layer)(np.ascontiguousarray(weight), layer.bias), *rest
            )

        return call

    for name in PRODUCTS:
        setattr(model.ops, name, product(name, getattr(reference, name)))


def in_blocks(model, rng) -> None:
    """Every product is added up in two halves, as engines do that tile it."""

    def linear(x, layer):
        weight = layer.weight.reshape(layer.weight.shape[0], -1)
        k = int(rng.integers(1, weight.shape[1])) if weight.shape[1] > 1 else 0
        y = x[..., :k] @ weight[:, :k].T + x[..., k:] @ weight[:, k:].T
        return y if layer.bias is None else y + layer.bias

    model.ops.linear = linear
    model.ops.linear_activation = lambda x, layer, f: reference.transformer.ACTIVATIONS[f](linear(x, layer))
    model.ops.linear_residual = lambda x, layer, scale, rest, keep=None: (
        rest + (linear(x, layer) if scale is None else scale * linear(x, layer))
    )


def by_formula(model, rng) -> None:
    """Layer norm from the mean of squares of centred values times a reciprocal root; softmax and its sum in float32."""

    def layer_norm(x, norm, eps):
        centred = x - x.mean(-1, keepdims=True)
        rate = np.float32(1) / np.sqrt(np.square(centred).mean(-1, keepdims=True) + np.float32(eps))
        return centred * (rate * norm.weight) + norm.bias

    def attention(q, k, v, bias, return_probs=False, keep=None):
        scores = (q @ k.swapaxes(2, 3)) * np.float32(q.shape[-1] ** -0.5)
        if bias is not None:
            scores = scores + bias.table.T[:, reference.relative_position_index(bias.grid)]
        e = np.exp(scores - scores.max(-1, keepdims=True))
        probs = e / e.sum(-1, keepdims=True)
        context = (probs @ v).transpose(0, 2, 1, 3).reshape(q.shape[0], q.shape[2], -1)
        return (context, probs) if return_probs else context

    model.ops.layer_norm, model.ops.attention = layer_norm, attention


WAYS = (shuffled, in_blocks, by_formula, lambda model, rng: in_order(model), None)  # None: the numba backend


def margins(report: Report, made: Job) -> dict[str, float]:
    """Over all arrays, the largest error in units of its limit, for each kind of limit."""
    rows = report.compared

    def peak(row):
        return row.own.peak_rel / budget.peak_limit(row.own_yard, row.dtype, 1.0, row.own.worst_size)

    return {
        "own": max(row.own.rms_rel / row.own_limit for row in rows),
        "total": max(row.total.rms_rel / row.total_limit for row in rows),
        "peak": max(
            row.own.peak_rel / budget.peak_limit(row.own_yard, row.dtype, 1.0, row.own.worst_size) for row in rows
        ),
    }


def alarms(first: int, last: int) -> None:
    """Prints which of the correct runs of these seeds fail, and what the tail of the margins says of many more."""
    failed, found = [], []
    for seed in range(first, last):
        made = drawn_job(seed)
        rng = np.random.default_rng(seed)
        if seed % 3 == 0:
            made = Job(made.config, made.task, informative_weights(made.config, made.task, seed), made.inputs)
        way = WAYS[seed % len(WAYS)]
        model = model_of(made, "numba" if way is None else "numpy")
        if way is not None:
            model.ops = SimpleNamespace(**vars(model.ops))
            way(model, rng)
        slices.clear()
        report = check(made, model_source(made, model, "correct"))
        if not report.ok:
            rows = [(row.name, row.status, round(row.own_ratio, 1), row.note) for row in report.rows if not row.ok]
            failed.append((seed, seed % len(WAYS), rows[:2]))
            print(failed[-1], flush=True)
        found.append({**margins(report, made), "slice": max(slices, default=0.0)})
        if len(found) % 100 == 0:
            print(f"{len(found)} runs, {len(failed)} alarms", flush=True)
    for kind in found[0]:
        print(f"{kind:6} {tail([one[kind] for one in found])}")


slices: list[float] = []


def noting(*args, **kwargs):
    worst = worst_slice(*args, **kwargs)
    slices.append(0.0 if worst is None else worst.ratio / budget.SLICE_FACTOR)
    return worst


def tail(values: list[float]) -> str:
    """The largest value, and the chance of one beyond 1, extrapolated from the largest twentieth as an exponential."""
    x = np.sort(values)[::-1]
    n = max(len(x) // 20, 2)
    start, scale = x[n], float(np.mean(x[:n] - x[n]))
    chance = n / len(x) * math.exp(-(1 - start) / scale) if scale else 0.0
    return f"largest {x[0]:.2f}, one in twenty above {x[n]:.2f}, chance beyond 1 about {chance:.1e}"


# Faults ---------------------------------------------------------------------------------------------------------------


def judged(fault: Fault, arrays_of) -> Report:
    made = job(fault.task, **(fault.settings or {}))
    made = Job(made.config, made.task, arrays_of(made.config, made.task, 0), made.inputs)
    model = model_of(made)
    model.ops = SimpleNamespace(**vars(model.ops))
    return check(made, model_source(made, fault.plant(model) or model, fault.name))


def fresh(config, task, seed):
    return random_arrays(config, param_shapes(config, task), seed, "float32")


def faults() -> None:
    """Prints for both kinds of weights how many are found, where they are, and named, and which are not."""
    every = [*FAULTS, *NEW]
    for kind, arrays_of in (("weights that matter", informative_weights), ("fresh weights", fresh)):
        counts = dict.fromkeys(("found", "right array", "named", "nearest", "warned"), 0)
        for fault in every:
            report = judged(fault, arrays_of)
            guilty = report.guilty
            counts["found"] += not report.ok
            counts["right array"] += guilty is not None and guilty.name == fault.guilty
            counts["named"] += guilty is not None and "usual causes" not in guilty.note and "nearest" not in guilty.note
            counts["nearest"] += guilty is not None and "nearest" in guilty.note
            counts["warned"] += bool(report.ok and report.blind)
            if report.ok or guilty is None or guilty.name != fault.guilty or (fault.says not in guilty.note):
                where = None if guilty is None else (guilty.name, guilty.note)
                print(f"  {fault.name}: expected {fault.guilty} ({fault.says}), found {where}", flush=True)
        print(f"{kind}: {len(every)} faults, {counts}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["faults"]:
        faults()
    else:
        from minibeit.verify import judging

        judging.worst_slice = noting
        alarms(int(sys.argv[2]), int(sys.argv[3]))
