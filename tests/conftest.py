"""Fixtures of several test modules."""

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    """For matrices this small more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
