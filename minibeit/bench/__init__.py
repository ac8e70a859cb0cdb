"""`minibeit bench`: the speed of minibeit, of its peers, and the share of the machine's peak.

workloads.py    shapes, random checkpoints, inputs      flops.py    floating-point operations by formula
contestants.py  minibeit and its peers, one interface   roof.py     peak multiply-add rate of this CPU
worker.py       the process that measures               measure.py  which processes, how often, in what order
gpu.py          minibeit and PyTorch on a GPU
profile.py      time per op                             report.py   table, JSON, markdown, bar chart
"""
