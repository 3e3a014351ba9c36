"""One run by several processes, each with a device of its own: `torchrun --nproc_per_node=N train.py ...`.

Each process (a rank) holds the frozen model and takes its share of every batch; what travels are the gradients of what
is trained. Rank 0 alone prints and writes. Without torchrun there is one rank, and nothing here does anything.
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
    """Another process of the run has ended, killed perhaps."""


def distributed_main(main: Callable[[], None]) -> Callable[[], None]:
    """A script's `main` as each process of torchrun runs it; an error that ends several of them is printed by one."""
    if not dist.is_torchelastic_launched():
        return main

    def run() -> None:
        store, rank, size = next(dist.rendezvous("env://"))
        try:
            backends = "cpu:gloo,cuda:nccl" if use_own_gpu() else "gloo"
            # All but no time limit: if one process ends, torchrun ends the others.
            limit = datetime.timedelta(days=7)
            dist.init_process_group(backends, store=store, rank=rank, world_size=size, timeout=limit)
            with open(os.devnull, "w") as silence, contextlib.redirect_stdout(silence if rank else sys.stdout):
                with one_line_errors():
                    main()
            with raise_rank_lost():  # or one that ends early can be torn down while its connections are in use
                dist.barrier()
        except (InputError, KeyboardInterrupt) as error:
            if store.add(str(error), 1) > 1:  # counts who has this message: the first prints it
                sys.exit(2)
            raise
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    return run


def use_own_gpu() -> bool:
    """Have "cuda" mean a GPU that no other process of the run uses; whether there are GPUs. InputError if too few."""
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
    """What this rank does of a list that all ranks have: every world_size-th item."""
    return items[rank() :: world_size()]


def unshard(items: list[T]) -> list[T]:
    """What all ranks made of their shares, in the order of the whole list."""
    if world_size() == 1:
        return items
    parts = all_gather(items)
    whole: list[Any] = [None] * sum(map(len, parts))
    for i, part in enumerate(parts):
        whole[i :: len(parts)] = part
    return whole


def all_gather(item: Any) -> list[Any]:
    """What each rank has for it, in the order of the ranks."""
    every: list[Any] = [None] * world_size()
    with raise_rank_lost():
        dist.all_gather_object(every, item)
    return every


def check_same_on_ranks(settings: dict[str, Any]) -> None:
    """InputError on every rank, the same, where the ranks' settings (name -> value) differ."""
    if world_size() == 1:
        return
    every = all_gather(settings)
    if differing := [name for name in every[0] if any(other.get(name) != every[0].get(name) for other in every)]:
        what = ", ".join(name.replace("_", " ") for name in differing)
        raise InputError(f"the processes differ in {what}: give all of them the same files and options")


def broadcast_from_rank0(choose: Callable[[], T]) -> T:
    """What a function gives on rank 0, for all ranks; so with an InputError of it."""
    if world_size() == 1:
        return choose()
    made: list[Any] = [None]
    if rank() == 0:
        try:
            made = [choose()]
        except InputError as error:
            made = [error]
    with raise_rank_lost():
        dist.broadcast_object_list(made)
    if isinstance(made[0], InputError):
        raise made[0]
    return made[0]


def all_reduce_sum(tensors: list[Tensor]) -> None:
    """Replace tensors by their sums over all ranks, in one message."""
    if world_size() == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    with raise_rank_lost():
        dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


@contextlib.contextmanager
def raise_rank_lost() -> Iterator[None]:
    """RankLost where a collective operation fails."""
    try:
        yield
    except RuntimeError as error:
        raise RankLost("another process of this run has ended") from error
