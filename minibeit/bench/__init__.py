"""`minibeit bench`: how fast, against whom, and how far from what the machine can do.

workloads.py    shapes, random checkpoints, inputs      flops.py    floating-point operations by formula
contestants.py  minibeit and its peers, one interface   roof.py     the fastest that this CPU multiplies and adds
worker.py       the process that measures               measure.py  which processes, how often, in what order
gpu.py          minibeit and PyTorch on a GPU
profile.py      time per op                             report.py   table, JSON, markdown, bar chart
"""
