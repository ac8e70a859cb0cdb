"""The BEiT encoder as plain functions `(ops, params, x, ...)`, bottom-up.

Reading order: `embeddings`, `position_bias`, `attention`, `block`, `encoder`.  No file here imports an array library:
arrays are handled by `ops` and by their own methods (`reshape`, `transpose`).

Letters, used in code, docstrings and errors throughout the package:

    B batch     N tokens (1 + P)     P patches = gh x gw     D width     H heads     d head size = D / H
    F mlp width     L blocks     K classes     R rows of the bias table     C channels     (gh, gw) patch grid

"BEiT section 2.3" and "BEiT appendix A" in a docstring refer to Bao et al., arXiv 2106.08254 v2.  docs/where.md maps
the concepts of the papers to functions, docs/background.md explains why BEiT is built as it is.
"""
