"""Many images on many machines: Dask carries shards of them to its workers, and Parquet files hold what these find.

    from minibeit import BeitForImageClassification, BeitImageProcessor
    from minibeit.cluster import Classify, find, run_on_dask

    work = Classify(BeitForImageClassification.from_pretrained(folder), BeitImageProcessor.from_pretrained(folder))
    print(run_on_dask(find(["s3://bucket/photos/"]), work, "results", dask="tcp://scheduler:8786").sentence())

A program that starts workers on its own machine (`dask="local"`, the default) needs `if __name__ == "__main__":` around
such lines, since each worker imports it.  Needs the extra `cluster`; docs/cluster.md says more.

extra.py      the libraries of the extra         places.py   images by path and by address, lists of them, copies
folder.py     shards on disk, the manifest       works.py    what is computed of a list of images
engine.py     the run, in the process that the user started        worker.py   the run, in Dask's workers
"""

from ..places import is_address
from .engine import LOCAL, SHARD_SIZE, Summary, run_on_dask
from .places import find
from .works import Classify, Features, Segment

__all__ = ["LOCAL", "SHARD_SIZE", "Classify", "Features", "Segment", "Summary", "find", "is_address", "run_on_dask"]
