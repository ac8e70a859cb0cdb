"""The tokenizer that pre-training takes its visual tokens from: the encoder and decoder of DALL-E's discrete VAE.

config.py        sizes                               params.py       the weights as frozen dataclasses
network.py       the network, on the ops of the seam preprocess.py   images to pixels, and back
names.py         what files call the weights         files.py        reading and writing them
tokenizer.py     DalleTokenizer

Letters: B batch, C channels, V visual tokens, h x w the map, as everywhere.  Source: Ramesh et al. 2021 (DALL-E),
appendix A; the package dall_e of its authors.
"""
