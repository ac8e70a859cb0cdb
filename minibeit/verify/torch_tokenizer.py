"""PyTorch's tokenizer as a source: FlavaImageCodebook and the decoder of the package dall_e, where there are such.

Both classes have four groups, and dall_e's at least 64 channels.  For other sizes, or where one is not installed, its
half is run by plain calls of torch.nn.functional.  Only `torch_runner` imports torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from ..tokenizer.config import DalleTokenizerConfig
from ..tokenizer.names import DALL_E, FLAVA, Naming
from .gradients import COTANGENT, GRADIENT, RELAXED
from .lockstep import Job
from .streams import RunSource
from .torch_runner import shared_tensor, torch_library
from .trace_names import TOKENS

Record = Callable[[str, Any], None]  # is given every array, a tensor, under its name in the half
GROUPS = 4  # of the classes
LEAST = {"hidden_size": 64, "vocab_size": 512, "n_init": 8}  # that dall_e takes


def tokenizer_source(job: Job, leave_out: tuple[str, ...] = ()) -> RunSource:
    """The run of PyTorch in float32 on the job's weights and pixels, without arrays that `leave_out` (globs) names.

    Raises ImportError naming the extra.
    """
    torch = torch_library()
    halves = _Halves(job.config, job.arrays, torch)
    names = [name for name in job.shapes() if not any(fnmatchcase(name, pattern) for pattern in leave_out)]

    def run(trace: Any) -> None:
        with torch.no_grad():
            halves.run(
                torch.from_numpy(np.array(job.inputs["pixel_values"], np.float32)),
                lambda logits: logits.argmax(1),
                TOKENS,
                lambda name, x: trace.record(name, x.numpy()),
            )

    return RunSource(halves.label, names, run)


def tokenizer_gradients(job: Job) -> tuple[str, dict[str, np.ndarray]]:
    """(label, every float32 gradient and cotangent by name) of a tokenizer in training; `job` has noise."""
    torch = torch_library()
    halves = _Halves(job.config, job.arrays, torch, learned=True)
    given = {name: torch.from_numpy(np.array(array, np.float32)) for name, array in job.inputs.items()}
    tensors: dict[str, Any] = {}

    def keep(name: str, x: Any) -> None:
        x.retain_grad()
        tensors[name] = x

    def relaxed(logits: Any) -> Any:
        return torch.softmax((logits + given["noise"]) / given["temperature"], 1)

    pixels = given["pixel_values"]
    with torch.enable_grad():
        logits, statistics = halves.run(pixels, relaxed, RELAXED, keep)
        halves.loss(logits, statistics, pixels, given["divergence_weight"]).backward()
    found = {COTANGENT + name: x.grad.numpy() for name, x in tensors.items()}
    found |= {GRADIENT + name: x.grad.numpy() for name, x in halves.parameters.items()}
    return halves.label, found


class _Halves:
    """Encoder and decoder in PyTorch, on the memory of `arrays`."""

    def __init__(
        self, config: DalleTokenizerConfig, arrays: Mapping[str, np.ndarray], torch: Any, learned: bool = False
    ) -> None:
        self.config, self.torch = config, torch
        self.parameters = {
            name: torch.nn.Parameter(shared_tensor(array, torch), requires_grad=learned)
            for name, array in arrays.items()
        }
        self.modules = {"encoder": self._flava(), "decoder": self._dall_e()}
        classes = [type(module).__module__.split(".")[0] for module, _ in filter(None, self.modules.values())]
        by = f" ({', '.join(classes)})" if classes else ""
        self.label = f"PyTorch {torch.__version__.split('+')[0]} float32{by}"

    def run(self, pixels: Any, choose: Callable[[Any], Any], name: str, record: Record) -> tuple[Any, Any]:
        """Logits and statistics; what `choose` makes of the logits is recorded as `name` and goes to the decoder."""
        logits = self._half("encoder", pixels, record)
        chosen = choose(logits)
        record(name, chosen)
        if self.config.n_init is None:
            return logits, None
        if chosen.ndim == 3:
            chosen = self.torch.nn.functional.one_hot(chosen, self.config.vocab_size).permute(0, 3, 1, 2).float()
        return logits, self._half("decoder", chosen, record)

    def loss(self, logits: Any, statistics: Any, pixels: Any, weight: Any) -> Any:
        """The mean of -log p(pixel) under the logit-Laplace distribution, and the divergence from uniform tokens.

        Source: Ramesh et al. 2021, appendix A.3.
        """
        torch, C = self.torch, pixels.shape[1]
        mean, log_scale = statistics[:, :C], statistics[:, C:]
        logit = torch.log(pixels / (1 - pixels))
        nats = torch.abs(logit - mean) * torch.exp(-log_scale) + log_scale + torch.log(2 * pixels * (1 - pixels))
        log_p = torch.log_softmax(logits, 1)
        divergence = (log_p.exp() * (log_p + np.log(self.config.vocab_size))).sum(1).mean()
        return nats.mean() + weight * divergence

    def _half(self, kind: str, x: Any, record: Record) -> Any:
        def noted(name: str, x: Any) -> None:
            record(f"{kind}.{name}", x)

        module = self.modules[kind]
        return self._by_functions(kind, x, noted) if module is None else self._by_class(kind, *module, x, noted)

    # The classes ----------------------------------------------------------------------------------------------------

    def _flava(self) -> tuple[Any, Naming] | None:
        c, flava = self.config, _module("transformers.models.flava")
        if flava is None or c.num_groups != GROUPS:
            return None
        config = flava.FlavaImageCodebookConfig(
            num_blocks_per_group=c.num_blocks_per_group,
            hidden_size=c.hidden_size,
            vocab_size=c.vocab_size,
            input_channels=c.input_channels,
        )
        with self.torch.device("meta"):
            made = flava.FlavaImageCodebook(config)
        return self._filled(made, "encoder", FLAVA)

    def _dall_e(self) -> tuple[Any, Naming] | None:
        c, dall_e = self.config, _module("dall_e")
        if dall_e is None or c.num_groups != GROUPS or any((getattr(c, k) or 0) < n for k, n in LEAST.items()):
            return None
        made = dall_e.Decoder(
            n_init=c.n_init,
            n_hid=c.hidden_size,
            n_blk_per_group=c.num_blocks_per_group,
            output_channels=c.input_channels,
            vocab_size=c.vocab_size,
        )
        return self._filled(made, "decoder", DALL_E)

    def _filled(self, module: Any, kind: str, naming: Naming) -> tuple[Any, Naming]:
        for name, parameter in self.parameters.items():
            if name.startswith(kind):
                path, _, leaf = naming.translate(name.partition(".")[2]).rpartition(".")
                setattr(module.get_submodule(path), leaf, parameter)
        return module, naming

    def _by_class(self, kind: str, module: Any, naming: Naming, x: Any, record: Record) -> Any:
        last = "logits" if kind == "encoder" else "statistics"
        handles = []
        for path, name in _hooks(self.config, naming, kind, last):
            hook = _recording(record, name)
            handles.append(module.get_submodule(path).register_forward_hook(hook))
        try:
            return module.blocks(x)
        finally:
            for handle in handles:
                handle.remove()

    # Functions ------------------------------------------------------------------------------------------------------

    def _by_functions(self, kind: str, x: Any, record: Record) -> Any:
        c, F = self.config, self.torch.nn.functional

        def kept(name: str, x: Any) -> Any:
            record(name, x)
            return x

        def conv(name: str, x: Any) -> Any:
            weight = self.parameters[f"{kind}.{name}.weight"]
            return F.conv2d(x, weight, self.parameters[f"{kind}.{name}.bias"], padding=weight.shape[2] // 2)

        x = kept("input", conv("input", x))
        for i in range(c.num_groups):
            for j in range(c.num_blocks_per_group):
                at = f"groups.{i}.blocks.{j}"
                widened = f"{kind}.{at}.identity.weight" in self.parameters
                identity = kept(f"{at}.identity", conv(f"{at}.identity", x)) if widened else x
                for k in range(3):
                    x = kept(f"{at}.path.{k}", conv(f"{at}.path.{k}", F.relu(x)))
                x = kept(f"{at}.output", identity + c.gain * conv(f"{at}.path.3", F.relu(x)))
            if i < c.num_groups - 1 and kind == "encoder":
                x = kept(f"groups.{i}.pooled", F.max_pool2d(x, 2))
            elif i < c.num_groups - 1:
                x = kept(f"groups.{i}.enlarged", F.interpolate(x, scale_factor=2, mode="nearest"))
        return kept("logits" if kind == "encoder" else "statistics", conv("output", F.relu(x)))


def _hooks(config: DalleTokenizerConfig, naming: Naming, kind: str, last: str) -> Iterator[tuple[str, str]]:
    """(path of a module, the name of its result) for what a class of four groups computes."""

    def path(layer: str) -> str:
        return naming.translate(f"{layer}.weight").rpartition(".")[0]

    between, name = ("pool", "pooled") if kind == "encoder" else ("upsample", "enlarged")
    widths = config.widths if kind == "encoder" else config.widths[::-1]
    yield path("input"), "input"
    width = widths[0] if kind == "encoder" else config.n_init
    for i in range(GROUPS):
        for j in range(config.num_blocks_per_group):
            at = f"groups.{i}.blocks.{j}"
            inner = path(f"{at}.path.0")
            block = inner[: inner.index(".res_path")]
            if width != widths[i]:
                yield path(f"{at}.identity"), f"{at}.identity"
            width = widths[i]
            for k in range(3):
                yield path(f"{at}.path.{k}"), f"{at}.path.{k}"
            yield block, f"{at}.output"
        if i < GROUPS - 1:
            yield f"{block.rpartition('.')[0]}.{between}", f"groups.{i}.{name}"
    yield "blocks.output", last


def _recording(record: Record, name: str) -> Callable[..., None]:
    return lambda module, args, result: record(name, result)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
