"""The command line and the processes of a run. What they refuse is one line on stderr, and nothing is written."""

import importlib.util

import pytest
import torch
import torch.multiprocessing as mp
import tyro
from test_data_kitti import fails
from test_loop import MINI, SMALL

import runtime
import simipu
from files import BadInput


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--places", 300], ["--places 300", "--num-points 1024"]),  # 4 x 300 places of 1024 points: m > N
        (["--batch-size", 100], ["--batch-size 100", "6 frames"]),
        (["--batch-size", 6, "--group", 4], ["--batch-size 6", "--group 4"]),
        (["--image-encoder", "resnet19"], ["resnet19"]),
        (["--image-encoder", "timm:resnet18"], ["timm:resnet18: No module named 'timm'"]),
        (["--intra-weight", 0, "--inter-weight", 0], ["nothing to learn"]),
        (["--image-scale", 640], ["--image-scale 640"]),
        (["--image-scale", 2400, 720, 640, 192], ["--image-scale 2400 720 640 192"]),
        (["--log-every", 0], ["--log-every 0"]),
        (["--crop", 1.0, 0.5], ["--crop 1.0 0.5"]),
        (["--crop", 0.01, 1.0], ["--crop 0.01 1.0"]),
        (["--shift", 0, -0.2], ["--shift 0.0 -0.2"]),
        (["--jitter", 0, 0, 0, 2], ["--jitter 0.0 0.0 0.0 2.0"]),
        (["--inter-weight", 0, "--init", "x.pth"], ["--inter-weight 0"]),
        (["--init", "nowhere.pth"], ["nowhere.pth: no such file"]),
        (["--eval-splits", "nonsense"], ["nonsense.txt: missing"]),
        (["--eval-splits", "trainval"], ["6 of its frames are trained on"]),
    ],
)
def test_flags_that_cannot_work(scenes, tmp_path, monkeypatch, flags, words):
    if "timm:resnet18" in flags and importlib.util.find_spec("timm"):
        pytest.skip("timm is installed here")
    monkeypatch.chdir(tmp_path)
    arguments = ["demo", "--data-root", scenes, *SMALL, "--workers", 0, "--max-steps", 1, *flags]
    c = tyro.extras.overridable_config_cli(simipu.PRESETS, args=list(map(str, arguments)))
    with pytest.raises(BadInput) as error:
        simipu.train(c)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value
    assert not (tmp_path / "out").exists()


def test_script_reports_bad_flags(run_script, scenes, tmp_path):
    fails(
        run_script("simipu.py", "demo", "--data-root", scenes, *MINI, "--places", 300),
        "--places 300",
        "--num-points 1024",
    )
    fails(run_script("simipu.py", "demo", "--plaices", 300), "--plaices")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, says",
    [
        ([], "{demo, kitti, kitti_raw}"),
        (["nonsense"], "nonsense"),
        (["demo", "--places", "many"], "--places: invalid literal"),
        (["demo", "--matching", "best"], "--matching"),
        (["demo", "--image-scale"], "--image-scale 'must be"),
    ],
)
def test_arguments_that_tyro_refuses(run_here, tmp_path, arguments, says):
    status, out, err = run_here(simipu, *arguments)
    assert (
        status == 1
        and out == ""
        and err.startswith("error: ")
        and err.count("\n") == 1
        and says.split("'")[0].strip() in err
    ), err
    assert "│" not in err and not (tmp_path / "out").exists()


def test_help_lists_every_flag(run_script):
    done = run_script("simipu.py", "kitti", "--help")
    assert done.returncode == 0
    for field in simipu.Config.__dataclass_fields__:
        assert "--" + field.replace("_", "-") in done.stdout


def test_more_processes_than_gpus(monkeypatch):
    for name, value in {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(BadInput, match="^2 processes on this machine but 1 GPU: --nproc_per_node=1, or --device cpu$"):
        runtime.start_run()


# -----------------------------------------------------------------------------
# --gather-negatives: two processes on halves of a batch are one process on all of it


def _gather_worker(rank, uneven, out):
    torch.distributed.init_process_group("gloo", init_method=f"file://{out}.meet", rank=rank, world_size=2)
    x, y, weight = _gather_problem()
    weight = torch.nn.Parameter(weight)
    cut = 9 if uneven else 12
    half = slice(0, cut) if rank == 0 else slice(cut, 24)
    loss, stats = simipu.info_nce(x[half] @ weight, y[half] @ weight, 0.07, gather=True)
    loss.backward()
    torch.distributed.all_reduce(weight.grad)  # what DDP does: the mean over ranks
    total = loss.detach().clone()
    torch.distributed.all_reduce(total)
    if rank == 0:
        torch.save({"loss": total / 2, "grad": weight.grad / 2, "chance": stats["chance"]}, out)
    torch.distributed.destroy_process_group()


def _gather_problem():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(24, 6, generator=g, dtype=torch.float64)
    return (
        x,
        x + torch.randn(24, 6, generator=g, dtype=torch.float64),
        torch.randn(6, 5, generator=g, dtype=torch.float64),
    )


@pytest.mark.parametrize("uneven", [False, True])
def test_gathered_negatives_equal_one_process_on_the_whole_batch(tmp_path, uneven):
    out = tmp_path / "result.pt"
    mp.spawn(_gather_worker, (uneven, out), nprocs=2)
    result = torch.load(out)
    x, y, weight = _gather_problem()
    weight.requires_grad_()
    loss, stats = simipu.info_nce(x @ weight, y @ weight, 0.07)
    loss.backward()
    torch.testing.assert_close(result["loss"], loss.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result["grad"], weight.grad, rtol=1e-10, atol=1e-12)
    assert result["chance"] == stats["chance"]
