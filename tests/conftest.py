"""Fixtures of several test modules."""

import os
import signal
import tempfile

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the hub, nor depends on what its user's cache has
HF_HOME = tempfile.TemporaryDirectory()
os.environ["HF_HOME"] = HF_HOME.name
signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's `command &` is started with Ctrl-C ignored


@pytest.fixture(scope="module")
def one_thread():
    """For matrices this small more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
