"""Fixtures of several test modules."""

import json
import os
import signal
import tempfile

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for models this small more threads only wait for each other
pytest.register_assert_rewrite("tests.helpers")

from tests.helpers import MR, ROWS  # noqa: E402
from tests.tiny import write_tiny_model  # noqa: E402

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the hub, nor depends on what its user's cache has
HF_HOME = tempfile.TemporaryDirectory()
os.environ["HF_HOME"] = HF_HOME.name
signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's `command &` is started with Ctrl-C ignored


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a tiny model, another of the same shape, one of another shape, and rows to train on."""
    folder = tmp_path_factory.mktemp("world")
    write_tiny_model(folder / "model")
    write_tiny_model(folder / "twin", seed=1)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "e2e").mkdir()
    for name in ("trainset", "devset", "testset_w_refs"):
        (folder / "e2e" / f"{name}.csv").write_text(f'mr,ref\n"{MR}",The Golden Lantern is a Thai pub.\n' * 1)
    return folder
