"""How often the verifier is wrong: false alarms on correct implementations, and planted faults that it misses.

    python tests/study_verify.py alarms 0 2000             random models, each computed in another correct way
    python tests/study_verify.py alarms 0 60 base          the same with three blocks of width 768, also at other sizes
    python tests/study_verify.py alarms 0 2 whole          the same with all twelve blocks, at 224x224 and another size
    python tests/study_verify.py alarms 0 2000 tokenizer   random tokenizers
    python tests/study_verify.py gradients 0 600           a tokenizer's gradients by PyTorch
    python tests/study_verify.py faults [base|resized]     every planted fault, on weights that matter and on fresh ones

Not a test: minutes to hours.  The counts of the last run stand in docs/verify.md.
"""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import numpy as np
from conftest import random_weights
from test_verify_clean import drawn_job
from test_verify_correct_ports import KINDS, in_order
from test_verify_small_faults import NEW
from tokenizer_faults import tokenizer_job, tokenizer_of
from verify_faults import FAULTS
from verify_plant import Fault, job, model_of

from minibeit import DalleTokenizerConfig
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


# Jobs -----------------------------------------------------------------------------------------------------------------

BASE = dict(
    hidden_size=768,
    num_attention_heads=12,
    intermediate_size=3072,
    patch_size=16,
    vocab_size=100,
    num_labels=50,
    image_size=112,
)
SIZES = ((112, 112), (96, 144), (160, 112))
TASKS = ("image_classification", "masked_image_modeling", "backbone", "model")


def small_job(seed: int) -> Job:
    made = drawn_job(seed)
    return made if seed % 3 else Job(made.config, made.task, weights(made, seed % 2 == 0, seed), made.inputs)


def base_job(seed: int, **settings) -> Job:
    """A model of base width: tasks, position encodings, sizes and kinds of weights in turn."""
    task, kind = TASKS[seed % len(TASKS)], KINDS[seed // len(TASKS) % len(KINDS)]
    size = SIZES[seed % len(SIZES)]
    positions = {name: name == kind for name in KINDS}
    made = job(task, seed, batch=1, **{**BASE, "num_hidden_layers": 3, **positions, **settings})
    if "image_size" in settings:
        size = (settings["image_size"],) * 2 if seed % 2 == 0 else (192, 256)
    return Job(made.config, task, weights(made, seed % 2 == 0, seed), resized(made, size, seed))


def whole_job(seed: int) -> Job:
    return base_job(seed, num_hidden_layers=12, image_size=224, vocab_size=8192, num_labels=1000)


def random_tokenizer(seed: int) -> Job:
    rng = np.random.default_rng(seed)
    config = DalleTokenizerConfig(
        num_groups=int(rng.integers(1, 5)),
        num_blocks_per_group=int(rng.integers(1, 4)),
        hidden_size=4 * int(rng.integers(1, 9)),
        vocab_size=int(rng.integers(2, 200)),
        input_channels=int(rng.choice([1, 3])),
        n_init=int(rng.integers(1, 20)) if seed % 4 else None,
        image_size=int(rng.integers(8, 41)),
    )
    size = tuple(map(int, rng.integers(config.pooling, 41, 2))) if seed % 2 else None
    return tokenizer_job(config, seed, int(rng.integers(1, 3)), size)


def weights(made: Job, matter: bool, seed: int):
    return (informative_weights if matter else random_weights)(
        made.config, made.task, seed, *(() if matter else ("float32",))
    )


def resized(made: Job, size: tuple[int, int], seed: int):
    """The inputs of a call with an image of that size."""
    rng = np.random.default_rng(seed)
    inputs = {"pixel_values": rng.standard_normal((1, made.config.num_channels, *size), dtype=np.float32)}
    if "bool_masked_pos" in made.inputs:
        ph, pw = made.config.patch_shape
        inputs["bool_masked_pos"] = rng.random((1, (size[0] // ph) * (size[1] // pw))) < 0.4
    return inputs


def turned_sums(tokenizer, rng) -> None:
    """Convolutions add their input channels up in another order, and their taps from the last to the first."""

    def conv2d(x, conv):
        order = rng.permutation(x.shape[1])
        turned = type(conv)(np.ascontiguousarray(conv.weight[:, order, ::-1, ::-1]), conv.bias)
        y = reference.conv2d(np.ascontiguousarray(x[:, order, ::-1, ::-1]), turned)
        return np.ascontiguousarray(y[:, :, ::-1, ::-1])

    ops = tokenizer.ops
    ops.conv2d, ops.relu_conv2d = conv2d, lambda x, conv: conv2d(np.maximum(x, 0), conv)
    ops.relu_conv2d_residual = lambda x, conv, gain, rest: rest + x.dtype.type(gain) * conv2d(np.maximum(x, 0), conv)


JOBS = {"small": small_job, "base": base_job, "whole": whole_job, "tokenizer": random_tokenizer}


# False alarms ---------------------------------------------------------------------------------------------------------


def margins(report: Report) -> dict[str, float]:
    """Over all arrays, the largest error in units of its limit, for each kind of limit."""
    rows = [row for row in report.compared if not row.is_choice]

    def peak(row):
        return row.own.peak_rel / budget.peak_limit(row.own_yard, row.dtype, row.leeway, row.own.worst_size)

    return {
        "own": max(row.own.rms_rel / row.own_limit for row in rows),
        "total": max(row.total.rms_rel / row.total_limit for row in rows if not row.ok or not excused(row)),
        "peak": max(map(peak, rows)),
    }


def excused(row) -> bool:
    """Whether the total error is that of a few numbers that enlarge what they inherit."""
    return row.total.rms_rel > row.total_limit


def correct_run(kind: str, seed: int) -> Report:
    """What the verifier says of the run of a seed, which is computed in another correct way."""
    made, rng = JOBS[kind](seed), np.random.default_rng(seed)
    ways = (turned_sums, None) if kind == "tokenizer" else WAYS
    way = ways[seed % len(ways)]
    model = (tokenizer_of if kind == "tokenizer" else model_of)(made, "numba" if way is None else "numpy")
    if way is not None:
        model.ops = SimpleNamespace(**vars(model.ops))
        way(model, rng)
    slices.clear()
    return check(made, model_source(made, model, "correct"))


def alarms(first: int, last: int, kind: str = "small") -> None:
    """Prints which of the correct runs of these seeds fail, and what the tail of the margins says of many more."""
    failed, found = 0, []
    for seed in range(first, last):
        report = correct_run(kind, seed)
        if not report.ok:
            failed += 1
            rows = [(row.name, row.status, round(row.own_ratio, 1), row.note) for row in report.rows if not row.ok]
            print(seed, report.task, rows[:2], flush=True)
        found.append({**margins(report), "slice": max(slices, default=0.0)})
        if len(found) % 500 == 0 or seed == last - 1:
            print(f"{len(found)} runs, {failed} alarms", flush=True)
            for limit in found[0]:
                print(f"{limit:6} {tail([one[limit] for one in found])}", flush=True)


def gradients(first: int, last: int) -> None:
    """The same of a tokenizer's gradients as PyTorch makes them."""
    from minibeit.verify.gradients import check_gradients, with_labels
    from minibeit.verify.torch_tokenizer import tokenizer_gradients

    failed, found = 0, []
    for seed in range(first, last):
        wanted = with_labels(tokenizer_job(seed=seed), seed)
        label, arrays = tokenizer_gradients(wanted)
        report = check_gradients(wanted, arrays, label)
        if not report.ok:
            failed += 1
            print(seed, [(row.name, row.status, round(row.own_ratio, 1)) for row in report.rows if not row.ok][:2])
        if not report.notes:  # behind a jump totals are another matter
            found.append(margins(report))
    print(f"{last - first} runs, {failed} alarms, {last - first - len(found)} with a gradient that jumps")
    for limit in found[0]:
        print(f"{limit:6} {tail([one[limit] for one in found])}")


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


def judged(fault: Fault, arrays_of, size: str = "small") -> Report:
    """The report on a model with that fault: small, or of base width at its own or at another size."""
    settings = fault.settings or {}
    made = job(fault.task, **settings) if size == "small" else job(fault.task, batch=1, **{**settings, **BASE})
    inputs = made.inputs if size != "resized" else resized(made, (96, 144), 0)
    made = Job(made.config, made.task, arrays_of(made.config, made.task, 0), inputs)
    model = model_of(made)
    model.ops = SimpleNamespace(**vars(model.ops))
    return check(made, model_source(made, fault.plant(model) or model, fault.name))


def fresh(config, task, seed):
    return random_arrays(config, param_shapes(config, task), seed, "float32")


def verdict_on(fault: Fault, report: Report) -> str:
    """How the diagnosis of a fault that was found stands: named, narrowed or false."""
    guilty = report.guilty
    if report.ok or guilty is None:
        return "warned" if report.blind else "missed"
    if guilty.name != fault.guilty:
        return "elsewhere"
    if "usual causes" in guilty.note or "nearest known mistake" in guilty.note:
        return "narrowed"
    return "named" if fault.says in guilty.note else "another name"


def faults(size: str = "small") -> None:
    """Prints for both kinds of weights what becomes of every fault that such a model can have."""
    every = [fault for fault in (*FAULTS, *NEW) if size == "small" or fault.task != "semantic_segmentation"]
    for kind, arrays_of in (("weights that matter", informative_weights), ("fresh weights", fresh)):
        counts: dict[str, int] = {}
        for fault in every:
            try:
                report = judged(fault, arrays_of, size)
            except (ValueError, IndexError) as error:  # a fault of the small model's grid
                counts["not possible"] = counts.get("not possible", 0) + 1
                print(f"  {fault.name}: {error}", flush=True)
                continue
            what = verdict_on(fault, report)
            counts[what] = counts.get(what, 0) + 1
            if what not in ("named", "warned"):
                guilty = report.guilty
                where = None if guilty is None else (guilty.name, guilty.note)
                print(f"  {what}: {fault.name}: {fault.guilty} ({fault.says}), found {where}", flush=True)
        print(f"{size}, {kind}: {len(every)} faults, {counts}", flush=True)


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "faults":
        faults(*rest)
    else:
        from minibeit.verify import judging

        judging.worst_slice = noting
        {"alarms": alarms, "gradients": gradients}[what](int(rest[0]), int(rest[1]), *rest[2:])
