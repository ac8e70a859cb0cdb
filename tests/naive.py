"""BEiT as plain loops over Python floats: the first tier of truth, written from the formulas, never fast.

Nothing here comes from `minibeit.ops`: sums use `math.fsum`, GELU `math.erfc`, and maps are processed pixel by pixel.
Arguments and results are arrays; in between there are only scalars.  Parameters are a dictionary by canonical name.

Letters: B batch, N tokens, P patches, D width, H heads, d head size, C channels, K classes, (gh, gw) patch grid.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np

ROOT = math.sqrt(2 / math.pi)


def dot(a, b) -> float:
    """The sum of products, rounded once."""
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


# Activations --------------------------------------------------------------------------------------------------------


def gelu(x: float) -> float:
    return 0.5 * x * math.erfc(-x / math.sqrt(2))


def gelu_tanh(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(ROOT * (x + 0.044715 * x**3)))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def softplus(x: float) -> float:
    return x if x > 40 else math.log1p(math.exp(x))


ACTIVATIONS: dict[str, Callable[[float], float]] = {
    "gelu": gelu,
    "gelu_10": lambda x: max(-10.0, min(10.0, gelu(x))),
    "gelu_accurate": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_new": gelu_tanh,
    "gelu_python": gelu,
    "gelu_python_tanh": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "hardswish": lambda x: x * max(0.0, min(6.0, x + 3)) / 6,
    "laplace": lambda x: 0.5 * (1 + math.erf((x - 0.707107) / (0.282095 * math.sqrt(2)))),
    "leaky_relu": lambda x: x if x >= 0 else 0.01 * x,
    "linear": lambda x: x,
    "mish": lambda x: x * math.tanh(softplus(x)),
    "quick_gelu": lambda x: x * sigmoid(1.702 * x),
    "relu": lambda x: max(x, 0.0),
    "relu2": lambda x: max(x, 0.0) ** 2,
    "relu6": lambda x: max(0.0, min(6.0, x)),
    "sigmoid": sigmoid,
    "silu": lambda x: x * sigmoid(x),
    "sqrtsoftplus": lambda x: math.sqrt(softplus(x)),
    "swish": lambda x: x * sigmoid(x),
    "tanh": math.tanh,
}


def activation(x: np.ndarray, name: str) -> np.ndarray:
    f = ACTIVATIONS[name]
    return np.array([f(value) for value in x.ravel().tolist()], np.float64).reshape(x.shape)


# Rows ---------------------------------------------------------------------------------------------------------------


def rows_of(x: np.ndarray) -> list[list[float]]:
    return np.asarray(x, np.float64).reshape(-1, x.shape[-1]).tolist()


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    out = []
    for row in rows_of(x):
        mean = math.fsum(row) / len(row)
        var = math.fsum((value - mean) ** 2 for value in row) / len(row)
        root = math.sqrt(var + eps)
        out.append([(v - mean) / root * w + b for v, w, b in zip(row, weight.tolist(), bias.tolist(), strict=True)])
    return np.array(out).reshape(x.shape)


def linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    columns = rows_of(weight.reshape(weight.shape[0], -1))
    offsets = [0.0] * len(columns) if bias is None else bias.tolist()
    out = [[dot(row, column) + b for column, b in zip(columns, offsets, strict=True)] for row in rows_of(x)]
    return np.array(out).reshape(*x.shape[:-1], len(columns))


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    exps = [math.exp(value - top) for value in row]
    total = math.fsum(exps)
    return [value / total for value in exps]


def mask_tokens(x: np.ndarray, mask: np.ndarray, token: np.ndarray) -> np.ndarray:  # (B, P, D)
    y = x.copy()
    for b, p in itertools.product(*map(range, mask.shape)):
        if mask[b, p]:
            y[b, p] = token[0, 0]
    return y


def mean_patches(x: np.ndarray) -> np.ndarray:  # (B, N, D) -> (B, D)
    B, N, D = x.shape
    return np.array([[math.fsum(x[b, 1:, i]) / (N - 1) for i in range(D)] for b in range(B)])


def tokens_to_map(x: np.ndarray, grid: tuple[int, int]) -> np.ndarray:  # (B, N, D) -> (B, D, gh, gw)
    (B, _, D), (gh, gw) = x.shape, grid
    y = np.empty((B, D, gh, gw))
    for b, i, row, column in itertools.product(range(B), range(D), range(gh), range(gw)):
        y[b, i, row, column] = x[b, 1 + row * gw + column, i]
    return y


def split_heads(x: np.ndarray, num_heads: int) -> np.ndarray:  # (B, N, D) -> (B, H, N, d)
    B, N, D = x.shape
    d = D // num_heads
    out = np.empty((B, num_heads, N, d))
    for b, h, n, i in itertools.product(range(B), range(num_heads), range(N), range(d)):
        out[b, h, n, i] = x[b, n, h * d + i]
    return out


def attention(q, k, v, bias=None, keep=None) -> tuple[np.ndarray, np.ndarray]:
    """(context (B, N, D), probabilities (B, H, N, N) before `keep`); bias (H, N, N)."""
    B, H, N, d = q.shape
    context, probs = np.empty((B, N, H * d)), np.empty((B, H, N, N))
    for b, h, n in itertools.product(range(B), range(H), range(N)):
        scores = [dot(q[b, h, n].tolist(), k[b, h, m].tolist()) / math.sqrt(d) for m in range(N)]
        if bias is not None:
            scores = [s + t for s, t in zip(scores, bias[h, n].tolist(), strict=True)]
        row = softmax(scores)
        probs[b, h, n] = row
        if keep is not None:
            row = [p * factor for p, factor in zip(row, keep[b, h, n].tolist(), strict=True)]
        for i in range(d):
            context[b, n, h * d + i] = dot(row, v[b, h, :, i].tolist())
    return context, probs


# The position bias --------------------------------------------------------------------------------------------------


def position_bias(table: np.ndarray, grid: tuple[int, int]) -> np.ndarray:  # (R, H) -> (H, N, N)
    """bias[h, a, b], straight from the definition: an offset in rows, an offset in columns, three special rows."""
    gh, gw = grid
    P, R, H = gh * gw, len(table), table.shape[1]
    assert (2 * gh - 1) * (2 * gw - 1) + 3 == R
    bias = np.empty((H, P + 1, P + 1))
    for a, b in itertools.product(range(P + 1), repeat=2):
        if a == 0 and b == 0:
            row = R - 1
        elif b == 0:
            row = R - 2
        elif a == 0:
            row = R - 3
        else:
            (ha, wa), (hb, wb) = divmod(a - 1, gw), divmod(b - 1, gw)
            row = (ha - hb + gh - 1) * (2 * gw - 1) + (wa - wb + gw - 1)
        bias[:, a, b] = table[row]
    return bias


def resize_table(table: np.ndarray, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    height, width = 2 * old[0] - 1, 2 * old[1] - 1
    H = table.shape[1]
    columns = []
    for h in range(H):
        picture = table[: height * width, h].reshape(1, 1, height, width)
        columns.append(resize_bilinear(picture, (2 * new[0] - 1, 2 * new[1] - 1)).ravel())
    return np.concatenate([np.stack(columns, 1), table[-3:]])


# Maps: (B, C, h, w) -------------------------------------------------------------------------------------------------


def pixels_of(x: np.ndarray):
    return itertools.product(*(range(n) for n in x.shape))


def conv2d(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    B, C, h, w = x.shape
    out, _, kh, kw = weight.shape
    y = np.empty((B, out, h, w))
    for b, o, r, c in pixels_of(y):
        terms = [0.0 if bias is None else float(bias[o])]
        for i, j in itertools.product(range(kh), range(kw)):
            rr, cc = r + i - kh // 2, c + j - kw // 2
            if 0 <= rr < h and 0 <= cc < w:
                terms += [float(weight[o, ch, i, j]) * float(x[b, ch, rr, cc]) for ch in range(C)]
        y[b, o, r, c] = math.fsum(terms)
    return y


def batch_norm(x, weight, bias, mean, var, eps=1e-5) -> np.ndarray:
    y = np.empty(x.shape)
    for b, c, i, j in pixels_of(x):
        y[b, c, i, j] = (x[b, c, i, j] - mean[c]) / math.sqrt(var[c] + eps) * weight[c] + bias[c]
    return y


def conv_transpose(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    B, C, h, w = x.shape
    y = np.empty((B, weight.shape[1], 2 * h, 2 * w))
    for b, o, r, c in pixels_of(y):
        y[b, o, r, c] = dot(x[b, :, r // 2, c // 2].tolist(), weight[:, o, r % 2, c % 2].tolist()) + bias[o]
    return y


def max_pool2x2(x: np.ndarray) -> np.ndarray:
    B, C, h, w = x.shape
    y = np.empty((B, C, h // 2, w // 2))
    for b, c, i, j in pixels_of(y):
        y[b, c, i, j] = max(float(x[b, c, 2 * i + di, 2 * j + dj]) for di in (0, 1) for dj in (0, 1))
    return y


def upsample2x2(x: np.ndarray) -> np.ndarray:
    B, C, h, w = x.shape
    y = np.empty((B, C, 2 * h, 2 * w))
    for b, c, i, j in pixels_of(y):
        y[b, c, i, j] = x[b, c, i // 2, j // 2]
    return y


def one_hot(ids: np.ndarray, V: int) -> np.ndarray:  # (B, h, w) -> (B, V, h, w)
    y = np.zeros((ids.shape[0], V, *ids.shape[1:]))
    for b, i, j in pixels_of(ids):
        y[b, ids[b, i, j], i, j] = 1.0
    return y


def adaptive_avg_pool(x: np.ndarray, size: int) -> np.ndarray:
    B, C, h, w = x.shape
    y = np.empty((B, C, size, size))
    for b, c, i, j in pixels_of(y):
        rows = range(math.floor(i * h / size), math.ceil((i + 1) * h / size))
        columns = range(math.floor(j * w / size), math.ceil((j + 1) * w / size))
        cell = [float(x[b, c, r, s]) for r in rows for s in columns]
        y[b, c, i, j] = math.fsum(cell) / len(cell)
    return y


def resize_bilinear(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    def weight(distance: float) -> float:
        return max(0.0, 1 - abs(distance))

    return _interpolate(x, size, weight, reach=1, clamp_position=True)


def resize_bicubic(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    def weight(distance: float) -> float:
        s, A = abs(distance), -0.75
        if s <= 1:
            return (A + 2) * s**3 - (A + 3) * s**2 + 1
        return A * s**3 - 5 * A * s**2 + 8 * A * s - 4 * A if s < 2 else 0.0

    return _interpolate(x, size, weight, reach=2, clamp_position=False)


def _interpolate(x, size, weight, reach: int, clamp_position: bool) -> np.ndarray:
    """Every target pixel as a weighted sum over its neighbourhood in the source; edge pixels are repeated."""
    B, C, h, w = x.shape
    y = np.empty((B, C, *size))

    def taps(target: int, old: int, new: int) -> list[tuple[int, float]]:
        position = (target + 0.5) * old / new - 0.5
        if clamp_position:
            position = max(position, 0.0)
        first = math.floor(position)
        steps = range(first - reach + 1, first + reach + 1)
        return [(min(max(step, 0), old - 1), weight(position - step)) for step in steps]

    for i, j in itertools.product(range(size[0]), range(size[1])):
        pairs = list(itertools.product(taps(i, h, size[0]), taps(j, w, size[1])))
        for b, c in itertools.product(range(B), range(C)):
            y[b, c, i, j] = math.fsum(float(x[b, c, r, s]) * wr * ws for (r, wr), (s, ws) in pairs)
    return y


# Losses -------------------------------------------------------------------------------------------------------------


def cross_entropy(logits: np.ndarray, labels: np.ndarray, ignore_index: int) -> float:
    terms = []
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        if label != ignore_index:
            top = max(row)
            terms.append(top + math.log(math.fsum(math.exp(v - top) for v in row)) - row[label])
    return math.fsum(terms) / len(terms) if terms else math.nan


def soft_cross_entropy(logits: np.ndarray, target: np.ndarray) -> float:
    losses = []
    for row, weights in zip(logits.tolist(), target.tolist()):
        probs = softmax(row)
        losses.append(-math.fsum(w * math.log(p) for w, p in zip(weights, probs)))
    return math.fsum(losses) / len(losses)


def mse_loss(prediction: np.ndarray, target: np.ndarray) -> float:
    squares = [(p - t) ** 2 for p, t in zip(prediction.ravel().tolist(), target.ravel().tolist(), strict=True)]
    return math.fsum(squares) / len(squares)


def bce_with_logits(logits: np.ndarray, target: np.ndarray) -> float:
    terms = []
    for x, t in zip(logits.ravel().tolist(), target.ravel().tolist(), strict=True):
        terms.append(t * softplus(-x) + (1 - t) * softplus(x))
    return math.fsum(terms) / len(terms)


# The model ----------------------------------------------------------------------------------------------------------


def embed(config, p, pixels: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:  # -> (B, N, D)
    B, C, height, width = pixels.shape
    ph, pw = config.patch_shape
    gh, gw = height // ph, width // pw
    weight, bias = p["beit.embeddings.patch.weight"], p["beit.embeddings.patch.bias"]
    D = len(bias)
    x = np.empty((B, 1 + gh * gw, D))
    for b in range(B):
        x[b, 0] = p["beit.embeddings.cls_token"][0, 0]
        for r, c in itertools.product(range(gh), range(gw)):
            if mask is not None and mask[b, r * gw + c]:
                token = p["beit.embeddings.mask_token"][0, 0].tolist()
            else:
                patch = pixels[b, :, r * ph : (r + 1) * ph, c * pw : (c + 1) * pw].ravel().tolist()
                token = [dot(patch, weight[o].ravel().tolist()) + float(bias[o]) for o in range(D)]
            x[b, 1 + r * gw + c] = token
    if "beit.embeddings.position_embeddings" in p:
        table = p["beit.embeddings.position_embeddings"][0]
        if (gh, gw) != config.grid:
            picture = table[1:].reshape(1, *config.grid, D).transpose(0, 3, 1, 2)
            patches = resize_bicubic(picture, (gh, gw)).transpose(0, 2, 3, 1).reshape(-1, D)
            table = np.concatenate([table[:1], patches])
        for b, n, i in itertools.product(range(B), range(1 + gh * gw), range(D)):
            x[b, n, i] += table[n, i]
    return x


def encode(config, p, pixels, mask=None) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(L + 1 hidden states, L attention maps)."""
    p = {name: array.astype(np.float64) for name, array in p.items()}
    grid = pixels.shape[2] // config.patch_shape[0], pixels.shape[3] // config.patch_shape[1]
    x = embed(config, p, pixels.astype(np.float64), mask)
    states, maps = [x], []
    for i in range(config.num_hidden_layers):
        bias = None
        for name in ("beit.shared_bias_table", f"beit.encoder.{i}.bias_table"):
            if name in p:
                part = position_bias(resize_table(p[name], config.grid, grid), grid)
                bias = part if bias is None else bias + part
        x, probs = _block(config, p, f"beit.encoder.{i}", x, bias)
        states.append(x)
        maps.append(probs)
    return states, maps


def _block(config, p, at: str, x: np.ndarray, bias) -> tuple[np.ndarray, np.ndarray]:
    eps, H = config.layer_norm_eps, config.num_attention_heads
    one = np.ones(x.shape[-1])
    y = layer_norm(x, p[f"{at}.norm1.weight"], p[f"{at}.norm1.bias"], eps)
    q, k, v = (
        split_heads(linear(y, p[f"{at}.attention.{name}.weight"], p.get(f"{at}.attention.{name}.bias")), H)
        for name in ("query", "key", "value")
    )
    context, probs = attention(q, k, v, bias)
    y = linear(context, p[f"{at}.attention.output.weight"], p[f"{at}.attention.output.bias"])
    x = x + p.get(f"{at}.lambda_1", one) * y
    y = layer_norm(x, p[f"{at}.norm2.weight"], p[f"{at}.norm2.bias"], eps)
    y = activation(linear(y, p[f"{at}.fc1.weight"], p[f"{at}.fc1.bias"]), config.hidden_act)
    y = linear(y, p[f"{at}.fc2.weight"], p[f"{at}.fc2.bias"])
    return x + p.get(f"{at}.lambda_2", one) * y, probs


def last_hidden_state(config, p, x: np.ndarray) -> np.ndarray:
    if config.use_mean_pooling:
        return x
    return layer_norm(x, p["beit.norm.weight"], p["beit.norm.bias"], config.layer_norm_eps)


def pooled(config, p, x: np.ndarray) -> np.ndarray:  # the last hidden state (B, N, D) -> (B, D)
    if not config.use_mean_pooling:
        return x[:, 0]
    return layer_norm(mean_patches(x), p["beit.pooler.weight"], p["beit.pooler.bias"], config.layer_norm_eps)


def classify(config, p, pixels) -> np.ndarray:  # -> (B, K)
    x = last_hidden_state(config, p, encode(config, p, pixels)[0][-1])
    return linear(pooled(config, p, x), p["classifier.weight"], p["classifier.bias"])


def predict_tokens(config, p, pixels, mask=None) -> np.ndarray:  # -> (B, P, V)
    x = last_hidden_state(config, p, encode(config, p, pixels, mask)[0][-1])
    x = layer_norm(x, p["norm.weight"], p["norm.bias"], config.layer_norm_eps)
    return linear(x[:, 1:], p["lm_head.weight"], p["lm_head.bias"])


def segment(config, p, pixels) -> tuple[np.ndarray, np.ndarray]:
    """(logits (B, K, 4 gh, 4 gw), auxiliary logits (B, K, gh, gw)), features by transformers' convention."""
    states, _ = encode(config, p, pixels)
    gh, gw = pixels.shape[2] // config.patch_shape[0], pixels.shape[3] // config.patch_shape[1]
    maps = []
    for i in config.out_indices:
        x = states[i - 1]
        maps.append(x[:, 1:].transpose(0, 2, 1).reshape(len(x), -1, gh, gw))

    def bn(at: str) -> tuple[np.ndarray, ...]:
        return tuple(p[f"{at}.{name}"] for name in ("weight", "bias", "running_mean", "running_var"))

    def deconv(x: np.ndarray, at: str) -> np.ndarray:
        return conv_transpose(x, p[f"{at}.weight"], p[f"{at}.bias"])

    def unit(x: np.ndarray, at: str) -> np.ndarray:
        return activation(batch_norm(conv2d(x, p[f"{at}.conv.weight"], None), *bn(f"{at}.bn")), "relu")

    up = activation(batch_norm(deconv(maps[0], "fpn.deconv1"), *bn("fpn.bn")), "gelu")
    levels = [deconv(up, "fpn.deconv2"), deconv(maps[1], "fpn.deconv3"), maps[2], max_pool2x2(maps[3])]

    head, top = "decode_head", levels[3]
    parts = [top]
    for j, scale in enumerate(config.pool_scales):
        cells = unit(adaptive_avg_pool(top, scale), f"{head}.psp_modules.{j}")
        parts.append(resize_bilinear(cells, top.shape[2:]))
    laterals = [unit(levels[j], f"{head}.lateral_convs.{j}") for j in range(3)]
    laterals.append(unit(np.concatenate(parts, 1), f"{head}.psp_bottleneck"))
    for j in (2, 1, 0):
        laterals[j] = laterals[j] + resize_bilinear(laterals[j + 1], laterals[j].shape[2:])
    outs = [unit(laterals[j], f"{head}.fpn_convs.{j}") for j in range(3)] + [laterals[3]]
    joined = np.concatenate([resize_bilinear(x, outs[0].shape[2:]) for x in outs], 1)
    logits = conv2d(
        unit(joined, f"{head}.fpn_bottleneck"), p[f"{head}.classifier.weight"], p[f"{head}.classifier.bias"]
    )

    head, y = "auxiliary_head", levels[2]
    for j in range(config.auxiliary_num_convs):
        y = unit(y, f"{head}.convs.{j}")
    if config.auxiliary_concat_input:
        y = unit(np.concatenate([levels[2], y], 1), f"{head}.conv_cat")
    return logits, conv2d(y, p[f"{head}.classifier.weight"], p[f"{head}.classifier.bias"])


# Training a tokenizer -------------------------------------------------------------------------------------------------


def _shares(values: list[float]) -> list[float]:
    top = max(values)
    total = math.fsum(math.exp(value - top) for value in values)
    return [math.exp(value - top) / total for value in values]


def gumbel_softmax(logits: np.ndarray, noise: np.ndarray, temperature: float) -> np.ndarray:
    B, V, h, w = logits.shape
    y = np.empty((B, V, h, w))
    for b, i, j in itertools.product(range(B), range(h), range(w)):
        y[b, :, i, j] = _shares(
            [(float(logits[b, v, i, j]) + float(noise[b, v, i, j])) / temperature for v in range(V)]
        )
    return y


def divergence_from_uniform(logits: np.ndarray) -> float:
    B, V, h, w = logits.shape
    terms = []
    for b, i, j in itertools.product(range(B), range(h), range(w)):
        shares = _shares([float(logits[b, v, i, j]) for v in range(V)])
        terms.append(math.fsum(q * math.log(q * V) for q in shares if q))
    return math.fsum(terms) / len(terms)


def logit_laplace_loss(statistics: np.ndarray, pixels: np.ndarray) -> float:
    C, terms = pixels.shape[1], []
    for b, c, i, j in itertools.product(*map(range, pixels.shape)):
        x, mean, s = float(pixels[b, c, i, j]), float(statistics[b, c, i, j]), float(statistics[b, C + c, i, j])
        density = math.exp(-abs(math.log(x / (1 - x)) - mean) / math.exp(s)) / (2 * math.exp(s) * x * (1 - x))
        terms.append(-math.log(density))
    return math.fsum(terms) / len(terms)
