"""Writes tests/data/formats/: one small checkpoint per format, each made by the software whose format it is.

    python tests/make_golden_formats.py          needs torch and safetensors
    python tests/make_golden_formats.py flax     needs transformers<5, flax, jax (another environment)

The values are random (seed 0) with NaN, infinities, subnormals and signed zeros; expected*.safetensors hold them as the
home software had them, bfloat16 widened to float32.
"""

import argparse
import collections
import io
import sys
import types
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

FOLDER = Path(__file__).parent / "data" / "formats"


def state(torch):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5, 6, generator=generator)
    values[0, :5] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-42])
    shared = torch.randn(4, 3, generator=generator)
    return collections.OrderedDict(
        {
            "encoder.weight": values,
            "encoder.bias": torch.nn.Parameter(torch.randn(7, generator=generator)),
            "half": values.half(),
            "brain": values.bfloat16(),
            "double": values.double(),
            "transposed": torch.randn(3, 4, 2, generator=generator).permute(2, 0, 1),
            "sliced": torch.randn(6, 8, generator=generator)[1::2, ::3],
            "shared.a": shared,
            "shared.b": shared[1:],
            "scalar": torch.tensor(2.5),
            "empty": torch.zeros(0, 3),
            "index": torch.arange(10).reshape(2, 5) - (1 << 40),
            "mask": torch.tensor([True, False, True]),
            "bytes": torch.arange(5, dtype=torch.uint8),
            "small": torch.arange(-2, 3, dtype=torch.int8),
            "num_batches_tracked": torch.tensor(7),
        }
    )


def expected(torch, tensors):
    numbers = {name: tensor.detach() for name, tensor in tensors.items()}
    return {
        name: np.array((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy(), order="C")
        for name, tensor in numbers.items()
    }


def unilm_like(torch, tensors):
    """The layout of a training checkpoint of unilm."""
    args = argparse.Namespace(model="beit_base", lr=5e-4, betas=[0.9, 0.98], device=torch.device("cpu"), none=None)
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    scalars = {"max_accuracy": np.float64(85.2), "best": np.int64(3), "seen": {1, 2}, "size": torch.Size([2, 3])}
    return {
        "model": tensors,
        "optimizer": optimizer,
        "args": args,
        "epoch": 29,
        "scaler": {"scale": 65536.0},
        **scalars,
    }


def dall_e_like(torch):
    """A whole pickled module with the class names of DALL-E's encoder.pkl."""
    classes = {}
    sys.modules["dall_e"] = types.ModuleType("dall_e")
    for module, names in {"dall_e.encoder": ("Encoder", "EncoderBlock"), "dall_e.utils": ("Conv2d",)}.items():
        sys.modules[module] = types.ModuleType(module)
        for name in names:
            classes[name] = type(name, (torch.nn.Module,), {"__module__": module})
            setattr(sys.modules[module], name, classes[name])
    torch.manual_seed(0)
    conv = classes["Conv2d"]()
    conv.w = torch.nn.Parameter(torch.randn(4, 3, 1, 1))
    conv.b = torch.nn.Parameter(torch.randn(4))
    block = classes["EncoderBlock"]()
    layers = {"relu_1": torch.nn.ReLU(), "conv_1": conv, "pool": torch.nn.MaxPool2d(2), "id": torch.nn.Identity()}
    block.res_path = torch.nn.Sequential(collections.OrderedDict(layers))
    encoder = classes["Encoder"]()
    encoder.device = torch.device("cpu")
    encoder.blocks = torch.nn.Sequential(collections.OrderedDict({"block_1": block}))
    return encoder


def main() -> None:
    import torch
    from safetensors.torch import save_file as save_torch

    FOLDER.mkdir(parents=True, exist_ok=True)
    tensors = state(torch)
    note = {"seed": "0", "torch": torch.__version__, "numpy": np.__version__}
    save_file(expected(torch, tensors), FOLDER / "expected.safetensors", note)
    contiguous = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    save_torch(contiguous, FOLDER / "tensors.safetensors", {"format": "pt"})
    torch.save(unilm_like(torch, tensors), FOLDER / "unilm.pth")
    torch.save(unilm_like(torch, tensors), FOLDER / "legacy.pth", _use_new_zipfile_serialization=False)
    torch.save(
        {"state_dict": tensors, "meta": {"CLASSES": ("wall", "sky"), "PALETTE": [[1, 2, 3], [4, 5, 6]]}},
        FOLDER / "mmseg.pth",
        pickle_protocol=4,
    )
    torch.save(dall_e_like(torch), FOLDER / "encoder.pkl")
    arrays = {name: tensor.detach().numpy() for name, tensor in tensors.items() if name != "brain"}
    arrays["fortran"] = np.asfortranarray(arrays["double"])
    for path in FOLDER.glob("*.safetensors"):
        path.chmod(0o644)
    for name, save in (("arrays.npz", np.savez), ("compressed.npz", np.savez_compressed)):
        buffer = io.BytesIO()
        save(buffer, **arrays)
        (FOLDER / name).write_bytes(buffer.getvalue())


def main_flax() -> None:
    import flax
    import jax
    import jax.numpy as jnp
    import transformers
    from flax.serialization import msgpack_serialize
    from flax.traverse_util import flatten_dict

    config = transformers.BeitConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        use_relative_position_bias=True, num_labels=3, use_mean_pooling=True,
    )  # fmt: skip
    model = transformers.FlaxBeitForImageClassification(config, seed=0)
    params = flatten_dict(model.params, sep="/")
    generator = np.random.default_rng(0)
    params = {name: generator.standard_normal(value.shape, np.float32) for name, value in sorted(params.items())}
    model.params = flax.traverse_util.unflatten_dict(params, sep="/")
    model.save_pretrained(FOLDER / "flax")
    (FOLDER / "flax" / "config.json").rename(FOLDER / "flax_config.json")
    (FOLDER / "flax" / "flax_model.msgpack").rename(FOLDER / "flax_model.msgpack")
    (FOLDER / "flax").rmdir()
    note = {"seed": "0", "transformers": transformers.__version__, "flax": flax.__version__, "jax": jax.__version__}
    save_file(params, FOLDER / "expected_flax.safetensors", note)
    (FOLDER / "expected_flax.safetensors").chmod(0o644)

    wide = np.arange(30, dtype=np.float32).reshape(5, 6) / 7
    flax.serialization.MAX_CHUNK_SIZE = 50  # makes the chunks that arrays over 2^30 bytes have
    params = {"a": {"chunked": wide, "brain": jnp.asarray(wide, jnp.bfloat16)}, "s": np.float32(2.5)}
    others = {"params": params, "step": 7}
    (FOLDER / "flax_chunked.msgpack").write_bytes(msgpack_serialize(others))


if __name__ == "__main__":
    main_flax() if sys.argv[1:] == ["flax"] else main()
