"""Data-parallel runs with torchrun, one process per device: `torchrun --nproc_per_node=N train.py ...`.

Each process (a rank) holds the frozen model and processes a part of every batch; only the gradients of the trained
parameters are exchanged. Rank 0 alone prints and writes files. Without torchrun there is a single rank, and the
functions of this module do nothing.
"""

import contextlib
import datetime
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from minprefix.system.errors import InputError, one_line_errors

T = TypeVar("T")


class RankLost(InputError):
    """Another process of the run has ended; it may have been killed."""


def distributed_main(main: Callable[[], None]) -> Callable[[], None]:
    """Wrap a script's `main` for torchrun: set up the process group, print on rank 0 only and each error only once."""
    if not dist.is_torchelastic_launched():
        return main

    def run() -> None:
        store, rank, size = next(dist.rendezvous("env://"))
        try:
            backends = "cpu:gloo,cuda:nccl" if use_own_gpu() else "gloo"
            # Practically no time limit: if one process ends, torchrun stops the others.
            limit = datetime.timedelta(days=7)
            dist.init_process_group(backends, store=store, rank=rank, world_size=size, timeout=limit)
            with open(os.devnull, "w") as silence, contextlib.redirect_stdout(silence if rank else sys.stdout):
                with one_line_errors():
                    main()
            with raise_rank_lost():  # wait for all ranks: one that exits early closes connections still in use
                dist.barrier()
        except (InputError, KeyboardInterrupt) as error:
            if store.add(str(error), 1) > 1:  # counts the ranks with this error: the first one prints it
                sys.exit(2)
            raise
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    return run


def use_own_gpu() -> bool:
    """Make this process's own GPU the current one and return True; False without GPUs. InputError if too few."""
    if not torch.cuda.is_available():
        return False
    processes, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if processes > gpus:
        raise InputError(f"{processes} processes on {gpus} GPUs: start fewer, or set CUDA_VISIBLE_DEVICES= for the CPU")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return True


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def shard(items: list[T]) -> list[T]:
    """This rank's part of a list that is the same on all ranks: every world_size-th item, starting at `rank`."""
    return items[rank() :: world_size()]


def unshard(items: list[T]) -> list[T]:
    """Gather the results that each rank computed for its `shard`, in the order of the whole list."""
    parts = all_gather(items)
    whole: list[Any] = [None] * sum(map(len, parts))
    for i, part in enumerate(parts):
        whole[i :: len(parts)] = part
    return whole


def all_gather(item: Any) -> list[Any]:
    """Gather a picklable object from each rank, in the order of the ranks."""
    if world_size() == 1:
        return [item]
    gathered: list[Any] = [None] * world_size()
    with raise_rank_lost():
        dist.all_gather_object(gathered, item)
    return gathered


def check_same_on_ranks(settings: dict[str, Any]) -> None:
    """Raise the same InputError on every rank if the ranks' settings (name -> value) differ."""
    first, *others = all_gather(settings)
    if differing := [name for name in first if any(other.get(name) != first[name] for other in others)]:
        names = ", ".join(name.replace("_", " ") for name in differing)
        raise InputError(f"the processes differ in {names}: give all of them the same files and options")


def broadcast_from_rank0(choose: Callable[[], T]) -> T:
    """Call a function on rank 0 and return its result on all ranks, or raise its InputError on all of them."""
    if world_size() == 1:
        return choose()
    result: list[Any] = [None]
    if rank() == 0:
        try:
            result = [choose()]
        except InputError as error:
            result = [error]
    with raise_rank_lost():
        dist.broadcast_object_list(result)
    if isinstance(result[0], InputError):
        raise result[0]
    return result[0]


def all_reduce_sum(tensors: list[Tensor]) -> None:
    """Replace each tensor by its sum over all ranks, with a single all-reduce."""
    if world_size() == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    with raise_rank_lost():
        dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


@contextlib.contextmanager
def raise_rank_lost() -> Iterator[None]:
    """Raise RankLost if a collective operation in the block fails."""
    try:
        yield
    except RuntimeError as error:
        raise RankLost("another process of this run has ended") from error
