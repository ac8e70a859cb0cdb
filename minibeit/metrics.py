"""How good predictions are: confusion matrices, accuracies, intersection over union, and intervals for all of them.

K is the number of classes.  A confusion matrix (K, K) has a row for each true class and a column for each predicted
one; matrices of several batches or images are added up, and scores are made from the sum.
"""

from __future__ import annotations

import math

import numpy as np

Z95 = 1.959963984540054  # the standard normal is within +-Z95 with probability 0.95
RESAMPLES = 1000
MOST_DRAWN = 1 << 24  # times that images are counted at once, in all resamples together: 128 MB


# Counting -------------------------------------------------------------------------------------------------------------


def confusion_matrix(
    truth: np.ndarray, predicted: np.ndarray, classes: int, ignore_index: int | None = None
) -> np.ndarray:  # two arrays of one shape -> (K, K) int64
    """How often class i was predicted as class j, at [i, j]; entries whose truth is `ignore_index` are left out.

    Raises ValueError for arrays of different shapes and for numbers that are no class.
    """
    truth, predicted = np.asarray(truth), np.asarray(predicted)
    if truth.shape != predicted.shape:
        raise ValueError(f"expected a prediction for each label, found shapes {predicted.shape} and {truth.shape}")
    if ignore_index is not None:
        counted = truth != ignore_index
        truth, predicted = truth[counted], predicted[counted]
    for what, array in (("label", truth), ("prediction", predicted)):
        if array.size and not (array.min() >= 0 and array.max() < classes):
            stray = array.min() if array.min() < 0 else array.max()
            ignored = "" if ignore_index is None else f" (or {ignore_index}, which is ignored)"
            raise ValueError(f"expected every {what} to be a class from 0 to {classes - 1}{ignored}, found {stray}")
    pairs = truth.astype(np.int64).ravel() * classes + predicted.astype(np.int64).ravel()
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def areas(confusion: np.ndarray) -> np.ndarray:  # (K, K) -> (3, K)
    """What scores are made of, for each class: how often it was predicted rightly, how often true, how often predicted.

    Three rows for each image are all that `segmentation_scores` and `segmentation_intervals` need.
    """
    return np.stack([np.diagonal(confusion), confusion.sum(1), confusion.sum(0)])


def ranks(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:  # (n, K), (n,) -> (n,)
    """How many classes come before the label's own; among equal logits those of lower number, as with argmax.

    A prediction is right in the top k where the rank is below k.
    """
    own = np.take_along_axis(logits, labels[:, None], 1)
    earlier = np.arange(logits.shape[1]) < labels[:, None]
    return ((logits > own) | ((logits == own) & earlier)).sum(1)


def kl_divergence(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:  # two of one shape -> without the axis
    """KL(p, q) = sum p (log p - log q), in nats, of the softmax p of logits `a` and q of `b` along `axis`; in float64.

    How much is lost if q is taken where p is right (Kullback and Leibler 1951); 0 only for equal distributions.
    """
    log_p, log_q = (_log_softmax(x.astype(np.float64), axis) for x in (a, b))
    return np.maximum((np.exp(log_p) * (log_p - log_q)).sum(axis), 0)  # rounding can leave it below 0


# Scores ---------------------------------------------------------------------------------------------------------------


def class_iou(counts: np.ndarray) -> np.ndarray:  # (..., 3, K) -> (..., K)
    """Intersection over union of each class from its `areas`; NaN for one that is neither true nor predicted anywhere.

    IoU = both / (true + predicted - both), Everingham et al. 2010 (PASCAL VOC).
    """
    both, true, predicted = np.moveaxis(counts, -2, 0)
    return _ratio(both, true + predicted - both)


def class_accuracy(counts: np.ndarray) -> np.ndarray:  # (..., 3, K) -> (..., K)
    """The share of each class that was predicted rightly (recall), from its `areas`; NaN for one that is not there."""
    both, true, _ = np.moveaxis(counts, -2, 0)
    return _ratio(both, true)


def pixel_accuracy(counts: np.ndarray) -> np.ndarray:  # (..., 3, K) -> (...)
    """The share of all entries that were predicted rightly, from the `areas` of the classes."""
    return _ratio(counts[..., 0, :].sum(-1), counts[..., 1, :].sum(-1))


def mean_of_known(values: np.ndarray) -> np.ndarray:  # (..., K) -> (...)
    """The mean over classes, leaving out NaN; NaN if there is nothing else."""
    known = ~np.isnan(values)
    return _ratio(np.where(known, values, 0).sum(-1), known.sum(-1))


def segmentation_scores(counts: np.ndarray) -> dict[str, np.ndarray]:  # (..., 3, K) -> three of (...)
    """mean_iou, mean_accuracy and pixel_accuracy of `areas` that were added up over all images.

    As in mmseg (mIoU, mAcc, aAcc) and torchmetrics: classes that no pixel has or is said to have do not count.
    """
    return {
        "mean_iou": mean_of_known(class_iou(counts)),
        "mean_accuracy": mean_of_known(class_accuracy(counts)),
        "pixel_accuracy": pixel_accuracy(counts),
    }


# Intervals ------------------------------------------------------------------------------------------------------------


def wilson(right: float, total: float) -> tuple[float, float]:
    """The 95% interval of a share, given how many of `total` independent trials were right; NaN for no trials.

    Source: Wilson 1927; it stays within 0 to 1 and holds for few trials, and for none or all of them right.
    """
    if total == 0:
        return math.nan, math.nan
    share, spread = right / total, Z95 * Z95 / total
    middle = (share + spread / 2) / (1 + spread)
    half = Z95 / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    low = 0.0 if right == 0 else max(0.0, middle - half)
    return low, 1.0 if right == total else min(1.0, middle + half)


def mean_interval(values: np.ndarray) -> tuple[float, float]:  # (n,) -> (low, high)
    """The 95% interval of a mean of independent values, by the normal distribution; NaN for fewer than two."""
    if len(values) < 2:
        return math.nan, math.nan
    mean, error = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values))
    return mean - Z95 * error, mean + Z95 * error


def ratio_interval(
    parts: np.ndarray, wholes: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:  # (n,), (n,) -> (low, high)
    """The 95% interval of sum(parts) / sum(wholes), given both for each image, by a bootstrap over images.

    NaN for fewer than two images.
    """
    if len(parts) < 2:
        return math.nan, math.nan
    sums = _resampled_sums(np.stack([parts, wholes], axis=1), resamples, seed)
    low, high = _middle(sums[:, 0] / sums[:, 1])
    return float(low), float(high)


def segmentation_intervals(
    counts: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, np.ndarray]:  # (n, 3, K) -> arrays (2, ...)
    """95% intervals (low, high) of the scores, and of `class_iou` and `class_accuracy` (2, K), from each image's areas.

    A bootstrap over images, since pixels of one image are not independent: each resample draws n of the n images with
    replacement, and the interval spans the middle 95% of what the resamples score.  NaN for fewer than two images.
    Source: Efron 1979.
    """
    n, _, K = counts.shape
    sums = _resampled_sums(counts.reshape(n, -1), resamples, seed).reshape(resamples, 3, K)
    figures = {**segmentation_scores(sums), "class_iou": class_iou(sums), "class_accuracy": class_accuracy(sums)}
    return {name: _middle(values) if n > 1 else np.full((2, *values.shape[1:]), np.nan) for name, values in
            figures.items()}  # fmt: skip


def _log_softmax(x: np.ndarray, axis: int) -> np.ndarray:
    shifted = x - x.max(axis, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis, keepdims=True))


def _resampled_sums(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:  # (n, m) -> (resamples, m)
    """The sums over the images of each resample, which draws n of n images; no more than fit into memory at a time."""
    rng, n, x = np.random.default_rng(seed), len(values), values.astype(np.float64)
    some, sums = max(1, MOST_DRAWN // n), []
    for first in range(0, resamples, some):
        drawn = rng.multinomial(n, np.full(n, 1 / n), size=min(some, resamples - first))  # how often each image is
        sums.append(drawn.astype(np.float64) @ x)
    return np.concatenate(sums)


def _middle(values: np.ndarray) -> np.ndarray:  # (resamples, ...) -> (2, ...)
    """The quantiles that enclose 95% of the values that are not NaN."""
    known = ~np.isnan(values).all(0)
    result = np.full((2, *values.shape[1:]), np.nan)
    result[:, known] = np.nanquantile(values[:, known], [0.025, 0.975], axis=0)
    return result


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole in float64, NaN where whole is 0."""
    part, whole = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    return np.divide(part, whole, out=np.full(np.broadcast_shapes(part.shape, whole.shape), np.nan), where=whole != 0)
