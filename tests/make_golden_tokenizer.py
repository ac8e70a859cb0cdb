"""Writes tests/data/tokenizer/: small tokenizers saved by the classes they are for, and what those compute in float64.

    python tests/make_golden_tokenizer.py          needs torch, transformers and dall_e

`dall_e` is the package of DALL-E's authors.  Its classes want at least 64 channels and 512 tokens; their checks are
switched off here, so that the files are small.

encoder.pkl, decoder.pkl     whole modules, as published: a zip archive, and the older stream of pickles
state_dicts.pt               {"encoder": state dict, "decoder": state dict} of the same weights
flava.safetensors, .bin      FlavaImageCodebook; the .bin below `image_codebook.`, beside other tensors
expected.safetensors         pixels, logits, tokens, and the image of the tokens
"""

from pathlib import Path

import attr
import dall_e
import numpy as np
import torch
import transformers
from dall_e.utils import Conv2d, unmap_pixels
from safetensors.torch import save_file
from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

FOLDER = Path(__file__).parent / "data" / "tokenizer"
HIDDEN, TOKENS, INITIAL = 4, 24, 8


def convolve(self, x):
    """Conv2d.forward in the dtype of its weights; as published it converts to float32."""
    return torch.nn.functional.conv2d(x, self.w, self.b, padding=(self.kw - 1) // 2)


def unmapped(x):
    """unmap_pixels, which refuses float64, in float64."""
    made = torch.clamp((x - 0.1) / (1 - 2 * 0.1), 0, 1)
    assert torch.allclose(made.float(), unmap_pixels(x.float()), atol=1e-6)
    return made


def shake(module, seed):
    """Weights and biases drawn anew, no bias zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        spread = 0.3 if parameter.ndim == 1 else 1.5 * parameter[0].numel() ** -0.5
        parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))


def balance(output, logits):
    """Takes the mean of every token's logits from its bias, so that tokens differ from place to place."""
    output.sub_(logits.mean((0, 2, 3)).to(output.dtype))


def main():
    FOLDER.mkdir(exist_ok=True)
    attr.validators.set_disabled(True)
    encoder = dall_e.Encoder(n_hid=HIDDEN, vocab_size=TOKENS)
    decoder = dall_e.Decoder(n_hid=HIDDEN, vocab_size=TOKENS, n_init=INITIAL)
    shake(encoder, 0)
    shake(decoder, 1)
    coarse = torch.rand(2, 3, 6, 8, generator=torch.Generator().manual_seed(3))
    pixels = 0.8 * torch.nn.functional.interpolate(coarse, scale_factor=4) + 0.1
    balance(encoder.blocks.output.conv.b, encoder(pixels))
    torch.save(encoder, FOLDER / "encoder.pkl")
    torch.save(decoder, FOLDER / "decoder.pkl", _use_new_zipfile_serialization=False)
    torch.save({"encoder": encoder.state_dict(), "decoder": decoder.state_dict()}, FOLDER / "state_dicts.pt")
    flava = FlavaImageCodebook(FlavaImageCodebookConfig(hidden_size=HIDDEN, vocab_size=TOKENS))
    shake(flava, 2)
    balance(flava.blocks.output.conv.bias, flava(pixels))
    save_file(flava.state_dict(), FOLDER / "flava.safetensors", {"format": "pt"})
    larger = {f"image_codebook.{name}": tensor for name, tensor in flava.state_dict().items()}
    torch.save({"flava.text_model.embeddings.weight": torch.zeros(3, 2), **larger}, FOLDER / "flava.bin")

    with torch.inference_mode():
        own = encoder(pixels)
    Conv2d.forward = convolve
    with torch.inference_mode():
        logits = encoder.double().blocks(pixels.double())
        tokens = logits.argmax(1)
        one_hot = torch.nn.functional.one_hot(tokens, TOKENS).permute(0, 3, 1, 2).double()
        statistics = decoder.double().blocks(one_hot)
        expected = {
            "pixels": pixels,
            "logits": logits,
            "tokens": tokens,
            "statistics": statistics,
            "image": unmapped(torch.sigmoid(statistics[:, :3])),
            "flava_logits": flava.double()(pixels.double()),
        }
    error = ((own - logits).square().mean() / logits.square().mean()).sqrt()
    metadata = {
        "float32_error": f"{float(error):.4g}",  # of the logits of PyTorch in float32, relative to their rms
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
    }
    save_file({name: array.contiguous() for name, array in expected.items()}, FOLDER / "expected.safetensors", metadata)
    print(f"{len(np.unique(tokens))} of {TOKENS} tokens occur among {tokens.numel()}")


if __name__ == "__main__":
    main()
