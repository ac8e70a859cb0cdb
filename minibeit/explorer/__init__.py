"""The explorer: what a model does with one image, as one HTML page that needs nothing else.

`exploration.explore` is `minibeit.explore`; `minibeit explore` is its command.  Reading order: `attention` takes what
the page needs out of a forward pass, `regions` and `outcome` compute what the model says and what changes when patches
are masked, `pack` makes arrays small, `page` puts everything into `page.html` with `page.css` and the scripts.
"""
