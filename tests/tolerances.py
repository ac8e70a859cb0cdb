"""Every tolerance of the tests, in one table: a measured number, what was measured, and why it is not smaller.

Errors are root mean squares over a tensor, relative to the root mean square of the tensor itself.
"""

from __future__ import annotations

import numpy as np

EPS32 = float(np.finfo(np.float32).eps)
EPS64 = float(np.finfo(np.float64).eps)

# The yardstick for float32: our distance from a float64 run may be this many times PyTorch float32's own.  This is the
# promise, not a measured number.  Measured over 300 random models, 3132 tensors (test_live_parity): median 0.79, 99%
# 1.14, largest 1.63 for NumPy; 0.87, 1.21, 1.63 for numba.  At full size 1.2 at most.
FACTOR = 2.0

# A tensor that PyTorch gets right to FLOOR * EPS32 is one where it had luck: rounding exact numbers to float32 once
# costs 0.14 to 0.29 EPS32 (EPS32 / sqrt(12) at the bottom of a binade, half of that at its top).
# FACTOR times this floor is half a rounding step, the most a single correct rounding can cost.
FLOOR = 0.25

# The error of a loss, or of a handful of numbers, is a handful of draws, which are now and then all small.  The
# yardstick is then at least half a rounding step, or what float32 costs in the last hidden state (see parity.ratio).
FEW = 32
FEW_FLOOR = 0.5

# ops.reference in float64 beside loops in float64 that sum with math.fsum.  Measured: 1.9e-15 at most, where the
# bicubic weights come from another form of the same polynomial; 2.7e-16 at most for every other op.
NAIVE_OP = 4e-15

# Activations in float64 beside the scalar functions of math, relative to the larger of value and 1.  Measured: 4.0e-16.
NAIVE_ACTIVATION = 1e-15

# Whole tiny models in float64 beside the same loops.  Measured: 7.3e-16 at most over 98 tensors; four times that,
# since every BLAS adds up in an order of its own.
NAIVE_MODEL = 3e-15

# Whole tiny models in float64 beside PyTorch in float64 (goldens).  Measured: 6.3e-16 at most over 409
# tensors; five times that for the same reason.
GOLDEN64 = 3e-15

# Random models of up to five blocks in float64 beside PyTorch in float64.  Measured: 4.3e-15 at
# most over 150 models, in logits that nearly cancel; five times that.
LARGEST_MODEL64 = 2e-14

# ops.reference in float32 beside the loops in float64, in EPS32.  Measured: 1.4 at most (a square doubles the error of
# its argument, relu2), 0.92 at most for ops that are no such activation.
OP32 = 2.0
OP32_CASES = {
    "layer_norm large mean": 8.0,  # measured 5.7: the mean, 16 times the spread, takes four bits when it is subtracted
}

# Backward of an op beside five-point differences of its forward in float64, relative to the largest element.  Measured:
# 8.0e-10 at most (layer norm, whose fifth derivative is large), 3.7e-10 for every other op.
DIFFERENCES = 1e-9

# Backward of an op in float32 beside float64, in EPS32 of the gradient's root mean square.  Measured: 2.7 at most (the
# table of a single patch, whose terms cancel in part).
BACKWARD32 = 4.0

# The same of the CuPy backend in half precision, relative to 2^-10 (float16) and 2^-7 (bfloat16), for arguments that
# are rounded already: 0.72 at most.  Where a query attends nearly to one token alone, the product of its context and
# its gradient, for which the context is rounded (as in FlashAttention), cancels with that of the token: 2.4.
HALF_BACKWARD, HALF_BACKWARD_OF_ONE_TOKEN = 1.0, 4.0

# Gradients of whole random models in float64 beside PyTorch's, relative to each tensor's root mean square.  This is the
# promise.  Measured over 200 random models, 14,976 tensors: 5.9e-12 at most.
GRADIENT64 = 1e-11

# A gradient below this part of a model's largest is what is left of larger terms that cancel: a bias in front of a
# batch norm, or a weight before one whose channels have two values.  It is compared in units of this part.
REMAINDER = 1e-4

# Weights after twenty steps of AdamW in float64 beside PyTorch's, relative to each tensor's root mean square.  This is
# the promise.  Measured: 9.1e-17 for classification and masked modelling; 4.1e-12 for segmentation, whose biases before
# a batch norm have gradients of rounding alone, and Adam makes steps of any gradient.
STEPS64 = 1e-9

# A small tokenizer's logits and images in float32 beside float64, in EPS32.  Measured: logits 2.6 at most with NumPy,
# 2.8 with numba, whose 3x3 convolutions go by Winograd; images 0.9.
TOKENIZER32 = 4.0

# Logits of a float64 model for images in one batch beside one at a time, relative to the largest: BLAS adds up in
# another order for another number of rows.  Measured: 8.7e-16 at most over 30 draws of a tiny segmentation model; five
# times that, since every BLAS has an order of its own.
MODEL_IN_BATCHES = 4e-15

# Gradients of such a tokenizer with numba in float32 beside float64, in EPS32 of each gradient's root mean square.
# Measured over four seeds: 30 at most, NumPy 11.  Winograd's convolutions follow one another, and an activation that
# changes its sign within the error changes what ReLU lets through.  A wrong term would be off by 10^6.
TOKENIZER_GRADIENT32 = 60.0

# The same for ops with a 3x3 convolution, which go through Winograd's algorithm both ways.  Measured: 13.2 at most, in
# a kernel's gradient summed over 525 tiles; 10.5 where maps are enlarged first.
WINOGRAD_BACKWARD32 = 20.0

# Gradients of tiny models beside PyTorch's in float64 (golden_gradients), in float64 and, in EPS32, in float32.
# Measured: 1.8e-15 and 7.3 at most; 5.2e-14 and 211 where batch norms use the batch, of which the smallest map has two
# values per channel, whose difference is all that counts.
GOLDEN_GRADIENT64, GOLDEN_GRADIENT64_BATCH = 1e-14, 2e-13
GOLDEN_GRADIENT32, GOLDEN_GRADIENT32_BATCH = 20.0, 600.0

# Scores and features of a pipeline beside those of transformers' pipeline, both in float32, of a tiny checkpoint.
# Measured over twelve images: 7.2e-7 at most, of features up to 3.  Masks were equal; a pixel at which two classes are
# equal but for rounding may differ.
PIPELINE32, PIPELINE_MASKS = 3e-6, 0.002

# Weights of several ranks after twenty steps beside those of one process with the same batches, the distance relative
# to the length of the vector: only the order of sums differs.  These are the promises.  Measured with two and three
# ranks at a rate of 1e-3: in float64 1.4e-16, segmentation 2.5e-14; in float32 7.6e-8, segmentation 3.7e-8 without
# the biases that a batch norm takes away again, whose gradients are rounding alone (6.8e-6 with them).
RANKS64, RANKS32 = 1e-12, 1e-6

# Probabilities of attention computed from the queries, keys and bias tables in the explorer's page beside the model's.
# Measured over 12 images and three tiny models each, whose scores reach 30: 4.7e-5 with 16 bits, 0.0103 with 8.
EXPLORER_16_BITS, EXPLORER_8_BITS = 1e-4, 2e-2

# Low precision beside float32, in the reference.  One layer of 200 products with normal weights and inputs, measured
# over 10 draws: int8 8.9e-3 to 9.5e-3, of which a token's 256 levels and a channel's 255 have similar parts; bfloat16
# 2.3e-3 to 2.4e-3, 2^-8 / sqrt(3) from either side.
INT8_LINEAR, BFLOAT16_LINEAR = 1e-2, 2.6e-3

# All outputs of tiny models of every task, 4 draws: 9.5e-3 and 4.0e-3 at most.  Blocks add a scaled branch to a stream
# in float32, so errors hardly grow.
INT8_MODEL, BFLOAT16_MODEL = 1.5e-2, 6e-3

# Logits of the shipped classifier of digits beside float32, 360 held-out images.  Measured: 2.3e-3 and 8.5e-4, no image
# of another class.
INT8_DIGITS, BFLOAT16_DIGITS = 4e-3, 1.5e-3

# One layer of low precision with numba beside the reference.  int8: the integers are the same, what follows is
# float32.  bfloat16: sums of the same products in another order, and of pairs within vdpbf16ps.
# Measured: 6.4e-8 and 3.6e-7 at most.
INT8_SAME, BFLOAT16_SAME = 3e-7, 1e-6

# Attention with products of bfloat16 beside float32, scores of some units: measured 3.3e-3 at most.  numba beside the
# reference: 4.6e-6 at most, where a last bit of an exponential turns a rounding.
BFLOAT16_ATTENTION, BFLOAT16_ATTENTION_SAME = 5e-3, 2e-5

# Winograd's convolution with products of bfloat16 beside float32: measured 1.16e-2 alone, 6.4e-3 with batch norm and
# ReLU.  numba beside the reference, where a last bit of a transform turns a rounding: 5.4e-5 at most.
SHORT, SHORT_SAME = 1.6e-2, 3e-4
