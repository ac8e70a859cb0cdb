"""Commands that mpiexec or srun has started several times: who speaks, how many threads each has, how all end."""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from typing import TYPE_CHECKING

from .terminal import UsageError

if TYPE_CHECKING:
    from ..train.ranks import Ranks

# Where the mpiexec of Open MPI, that of MPICH and Intel, and Slurm's srun say how many they start, and which this is.
SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID")
FIRST_SPEAKS = 1.0  # seconds that the others wait with an error, which is usually that of the first as well


def started() -> int:
    """How many processes were started together, as the environment says; 1 where it says nothing."""
    return next((int(os.environ[name]) for name in SIZES if os.environ.get(name, "").isdecimal()), 1)


def rank() -> int:
    """The number of this process among those."""
    if started() == 1:
        return 0
    return next((int(os.environ[name]) for name in RANKS if os.environ.get(name, "").isdecimal()), 0)


def join(args: argparse.Namespace) -> None:
    """Sets `args.ranks`, and what follows from it: the first alone speaks, and those on one machine share its cores."""
    from ..images.ahead import MOST_WORKERS
    from ..machine import usable_cpus
    from ..ops import GPU_BACKENDS, default_backend
    from ..train.ranks import Ranks

    args.ranks = ranks = Ranks()
    if started() > 1:
        from ..train.mpi import world

        args.ranks = ranks = world()
        if ranks.count == 1:
            raise UsageError(
                f"expected {started()} ranks, as many as were started together, found one: mpi4py uses the MPI library "
                "of another mpiexec, or srun needs --mpi"
            )
        if (args.backend or default_backend()) in GPU_BACKENDS:
            args.ranks = ranks = _one_gpu_each(args, ranks)
        if args.threads is None and "MINIBEIT_NUM_THREADS" not in os.environ:
            args.threads = ranks.cores(usable_cpus())
    if args.workers is None:
        args.workers = min(MOST_WORKERS, ranks.cores(usable_cpus()))
    if not ranks.first:
        import logging

        args.quiet = True
        warnings.simplefilter("ignore")
        logging.getLogger("minibeit").setLevel(logging.ERROR)


def _one_gpu_each(args: argparse.Namespace, ranks: Ranks) -> Ranks:
    """Sets `args.device`, and returns ranks whose gradients are summed on their GPUs."""
    from ..train.nccl import on_device, own_device

    if args.device is not None:
        raise UsageError("--device: of several ranks each takes the GPU of its number; see CUDA_VISIBLE_DEVICES")
    args.device = own_device(ranks.local, ranks.on_host)
    return on_device(ranks, args.device)


def wait_for_the_first() -> None:
    """A moment in which the first rank, if it has the same error, says so and ends all."""
    if rank():
        time.sleep(FIRST_SPEAKS)


def end_all(code: int) -> None:
    """Ends the ranks that have joined this one, which would wait for it forever."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.COMM_WORLD.size > 1:
        sys.stderr.flush()
        mpi.COMM_WORLD.Abort(code)
