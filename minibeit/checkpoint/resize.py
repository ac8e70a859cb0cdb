"""Adapts a checkpoint to another image size: resizes its position bias tables and position embeddings, once.

Every method is linear and separable, that is one matrix per axis: new = rows @ old @ columns^T, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from ..config import BeitConfig
from ..loading_options import RESIZE_METHODS

Grid = tuple[int, int]


def resize_arrays(
    arrays: Mapping[str, np.ndarray], config: BeitConfig, image_size: int | tuple[int, int], method: str = "unilm"
) -> tuple[BeitConfig, dict[str, np.ndarray]]:
    """The config for `image_size` pixels and {canonical name: array} with every table and position embedding resized.

    `method` "unilm" is what the authors do before fine-tuning: tables by a cubic spline on geometric positions (square
    grids only), position embeddings bicubic.  "timm": tables linear on the same positions, embeddings bicubic with
    antialiasing.  "transformers": tables bilinear, embeddings bicubic, as its models do in every call.
    """
    changed = config.replace(image_size=image_size)
    old, new = config.grid, changed.grid
    resized = {}
    for name, array in arrays.items():
        if name.endswith("bias_table"):
            array = resize_stored_table(array, old, new, method)
        elif name.endswith("position_embeddings"):
            array = resize_stored_positions(array, old, new, method)
        resized[name] = array
    return changed, resized


def share_to_blocks(arrays: Mapping[str, np.ndarray], config: BeitConfig) -> tuple[BeitConfig, dict[str, np.ndarray]]:
    """Copies a pre-trained model's shared bias table to every block, as at the start of fine-tuning.

    Source: microsoft/unilm beit/run_class_finetuning.py.
    """
    if not config.use_shared_relative_position_bias:
        return config, dict(arrays)
    if config.use_relative_position_bias:
        raise ValueError("config: the blocks have position bias tables besides the shared one; keep both")
    changed = config.replace(use_shared_relative_position_bias=False, use_relative_position_bias=True)
    rest = {name: array for name, array in arrays.items() if name != "beit.shared_bias_table"}
    table = arrays["beit.shared_bias_table"]
    rest.update({f"beit.encoder.{i}.bias_table": table for i in range(config.num_hidden_layers)})
    return changed, rest


def usual_method(old: Grid, new: Grid) -> str:
    """The authors' method if it is defined for these grids, else timm's."""
    square = old[0] == old[1] and new[0] == new[1]
    return "unilm" if square and old[0] >= 3 else "timm"


def resize_stored_table(
    table: np.ndarray, old: Grid, new: Grid, method: str = "unilm"
) -> np.ndarray:  # (R, H) -> (R', H)
    """The bias table of grid `old` for grid `new`; its last three rows, those of the CLS token, stay as they are.

    Returns `table` itself if the grids are equal.  Raises ValueError for an unknown method, or with "unilm" for a grid
    that is not square.
    """
    _check_method(method)
    if old == new:
        return table
    if method == "unilm" and (old[0] != old[1] or new[0] != new[1]):
        raise ValueError(
            f"resize method 'unilm' is defined for square grids, found {_by(old)} to {_by(new)}; use 'timm'"
        )
    source, target = _offsets(old), _offsets(new)
    maker = {"unilm": spline_matrix, "timm": linear_matrix, "transformers": bilinear_matrix}[method]
    rows = _resize_maps(table[:-3].reshape(*source, -1), target, maker)
    return np.concatenate([rows.reshape(-1, table.shape[1]).astype(table.dtype), table[-3:]])


def resize_stored_positions(
    positions: np.ndarray, old: Grid, new: Grid, method: str = "unilm"
) -> np.ndarray:  # (1, P + 1, D) -> (1, P' + 1, D)
    """The position embeddings of grid `old` for grid `new`, bicubic; that of the CLS token is unchanged.

    "timm" applies antialiasing when shrinking (with Pillow's kernel); the others do not (PyTorch's kernel).
    """
    _check_method(method)
    if old == new:
        return positions
    maker = antialiased_bicubic_matrix if method == "timm" else bicubic_matrix
    patches = _resize_maps(positions[0, 1:].reshape(*old, -1), new, maker)
    patches = patches.reshape(1, -1, positions.shape[2]).astype(positions.dtype)
    return np.concatenate([positions[:, :1], patches], axis=1)


def _resize_maps(maps: np.ndarray, target: Grid, maker: Callable[[int, int], np.ndarray]) -> np.ndarray:
    """(h, w, n) -> (h', w', n) in float64."""
    rows, columns = maker(maps.shape[0], target[0]), maker(maps.shape[1], target[1])
    return np.einsum("ij,jkn,lk->iln", rows, maps.astype(np.float64), columns, optimize=True)


# Geometric positions (unilm and timm) -------------------------------------------------------------------------------


def geometric_positions(source: int, target: int) -> np.ndarray:  # -> (source,)
    """Positions of the `source` offsets of an old table on the axis -t ... t of a new one, t = target // 2.

    Near offsets stay about 1 apart, far ones move further apart: 0, 1, 1 + q, 1 + q + q^2, ... and their negatives,
    with q such that the last equals t.  q is the last midpoint of a bisection of [1.01, 1.5] to 1e-6.
    Source: run_class_finetuning.py of microsoft/unilm.
    """
    n, t = source // 2, target // 2
    left, right, q = 1.01, 1.5, 0.0
    while right - left > 1e-6:
        q = (left + right) / 2
        if (1 - q**n) / (1 - q) > t:
            right = q
        else:
            left = q
    right_half = np.cumsum(q ** np.arange(n))
    return np.concatenate([-right_half[::-1], [0.0], right_half])


def _offset_targets(target: int) -> np.ndarray:
    return np.arange(target) - target // 2.0


def spline_matrix(source: int, target: int) -> np.ndarray:  # -> (target, source)
    """Values of the interpolating cubic spline on geometric positions; targets beyond the ends are clamped.

    With more than four points the spline is "not-a-knot", as in FITPACK: the second and the second to last position are
    no knots.
    """
    if source == target:
        return np.eye(source)
    positions = geometric_positions(source, target)
    targets = np.clip(_offset_targets(target), positions[0], positions[-1])
    if source < 4:
        raise ValueError(f"resize method 'unilm' needs a grid of at least 3x3 patches, found {source // 2 + 1}")
    return not_a_knot_matrix(positions, targets)


def not_a_knot_matrix(x: np.ndarray, targets: np.ndarray) -> np.ndarray:  # -> (len(targets), len(x))
    """M such that M @ y are the values at `targets` of the not-a-knot cubic spline through (x, y); x rising, n >= 4.

    Solves for the second derivatives m at x: h[i-1] m[i-1] + 2 (h[i-1] + h[i]) m[i] + h[i] m[i+1] = 6 (slope
    difference); the end conditions are a continuous third derivative at the second and the second to last point.
    """
    n, h = len(x), np.diff(x)
    system, slopes = np.zeros((n, n)), np.zeros((n, n))
    for i in range(1, n - 1):
        system[i, i - 1 : i + 2] = h[i - 1], 2 * (h[i - 1] + h[i]), h[i]
        slopes[i, i - 1 : i + 2] = 6 / h[i - 1], -6 / h[i - 1] - 6 / h[i], 6 / h[i]
    system[0, :3] = h[1], -(h[0] + h[1]), h[0]
    system[-1, -3:] = h[-1], -(h[-2] + h[-1]), h[-2]
    second = np.linalg.solve(system, slopes)  # (n, n): m = second @ y
    left = np.clip(np.searchsorted(x, targets, side="right") - 1, 0, n - 2)  # each target's interval
    right, step = left + 1, h[left][:, None]
    a, b = (x[right] - targets)[:, None] / step, (targets - x[left])[:, None] / step
    bend = step**2 / 6 * ((a**3 - a) * second[left] + (b**3 - b) * second[right])
    return a * np.eye(n)[left] + b * np.eye(n)[right] + bend


def linear_matrix(source: int, target: int) -> np.ndarray:  # -> (target, source)
    """Linear interpolation between geometric positions; beyond the last one, its value."""
    if source == target:
        return np.eye(source)
    x = geometric_positions(source, target)
    return np.stack([np.interp(_offset_targets(target), x, unit) for unit in np.eye(source)], axis=1)


# Even positions (transformers, and position embeddings everywhere) --------------------------------------------------


def bilinear_matrix(source: int, target: int) -> np.ndarray:  # -> (target, source)
    """Linear interpolation between pixel centres, without antialiasing (align_corners=False)."""
    return _kernel_matrix(source, target, lambda d: np.maximum(0, 1 - np.abs(d)), 1, antialias=False)


def bicubic_matrix(source: int, target: int) -> np.ndarray:  # -> (target, source)
    """PyTorch's bicubic interpolation: A = -0.75, no antialiasing, edge pixels repeated."""
    return _kernel_matrix(source, target, lambda d: _cubic(d, -0.75), 2, antialias=False)


def antialiased_bicubic_matrix(source: int, target: int) -> np.ndarray:  # -> (target, source)
    """PyTorch's bicubic interpolation with antialias=True: A = -0.5, as in Pillow, and no pixels beyond the edge."""
    return _kernel_matrix(source, target, lambda d: _cubic(d, -0.5), 2, antialias=True)


def _kernel_matrix(
    source: int, target: int, kernel: Callable[[np.ndarray], np.ndarray], reach: int, antialias: bool
) -> np.ndarray:
    """Weights of the old pixels for every new one; for antialiasing the kernel is widened by the scale factor."""
    scale = source / target
    stretch = max(scale, 1.0) if antialias else 1.0
    centres = (np.arange(target) + 0.5) * scale - 0.5
    if not antialias and reach == 1:
        centres = np.maximum(centres, 0)
    margin = int(np.ceil(reach * stretch)) + 1
    pixels = np.arange(-margin, source + margin)
    weights = kernel((pixels[None, :] - centres[:, None]) / stretch)
    if antialias:
        inside = weights[:, margin : margin + source]
        return inside / inside.sum(axis=1, keepdims=True)
    return weights @ np.eye(source)[np.clip(pixels, 0, source - 1)]


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    """The cubic convolution kernel of Keys (1981)."""
    d = np.abs(distance)
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def _offsets(grid: Grid) -> Grid:
    return 2 * grid[0] - 1, 2 * grid[1] - 1


def _by(grid: Grid) -> str:
    return f"{grid[0]}x{grid[1]}"


def _check_method(method: str) -> None:
    if method not in RESIZE_METHODS:
        raise ValueError(f"resize method: expected one of {', '.join(RESIZE_METHODS)}, found {method!r}")
