import os
import subprocess
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: kernels run in its interpreter
REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import pytest

import synthetic


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """Eight small built-in scenes, six for training and two held out, in KITTI's object layout."""
    root = tmp_path_factory.mktemp("data") / "synthetic"
    synthetic.write_dataset(root, frames=8, seed=0, width=416, height=128, progress=False)
    return root


@pytest.fixture(scope="session")
def kitti():
    """A KITTI object root given by SIMIPU_KITTI, with real frames in train, val and test."""
    if "SIMIPU_KITTI" not in os.environ:
        pytest.skip("SIMIPU_KITTI is not set")
    return Path(os.environ["SIMIPU_KITTI"])


@pytest.fixture
def run_script(tmp_path):
    """run_script("simipu.py", "demo", ..., processes=2): a script of the repo as a user starts it, in an empty folder."""

    def run(script, *arguments, processes=0, timeout=300, env=()):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else [sys.executable]
        command = [*launcher, str(REPO / script), *map(str, arguments)]
        threads = {"OMP_NUM_THREADS": "1"} if processes > 1 else {}
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=timeout, env={**os.environ, **threads, **dict(env)})

    return run
