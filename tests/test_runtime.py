"""The command line and the processes of a run. What they refuse is one line on stderr, and nothing is written."""

import ast
import dataclasses
import errno
import importlib.util
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.multiprocessing as mp
import tyro
from conftest import REPO
from test_data_kitti import fails
from test_loop import MINI, SMALL

import ablate
import data_check
import finetune_depth
import runtime
import simipu
from files import BadInput

# -----------------------------------------------------------------------------
# the command line


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--places", 300], ["--places 300", "--num-points 1024"]),  # 4 x 300 places of 1024 points: m > N
        (["--batch-size", 100], ["--batch-size 100", "6 frames"]),
        (["--batch-size", 6, "--group", 4], ["--batch-size 6", "--group 4"]),
        (["--group", 0], ["--group 0: must be 1 or more"]),
        (["--image-encoder", "resnet19"], ["resnet19"]),
        (["--image-encoder", "timm:resnet18"], ["timm:resnet18: No module named 'timm'"]),
        (["--intra-weight", 0, "--inter-weight", 0], ["nothing to learn"]),
        (["--image-scale", 640], ["--image-scale 640"]),
        (["--image-scale", 2400, 720, 640, 192], ["--image-scale 2400 720 640 192"]),
        (["--log-every", 0], ["--log-every 0"]),
        (["--point-features"], ["--point-features: nothing given"]),
        (["--point-features", "height", "height"], ["--point-features height height: give each once"]),
        (["--inter-stages", 4, 4], ["--inter-stages 4 4: give each once"]),
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
    done = run_script("simipu.py", "demo", "--data-root", scenes, *MINI, "--places", 300)
    fails(done.returncode, done.stderr, "--places 300", "--num-points 1024")
    done = run_script("simipu.py", "demo", "--plaices", 300)
    fails(done.returncode, done.stderr, "--plaices")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, says",
    [
        ([], "{demo, kitti, kitti_raw, kitti_odometry, waymo, nuscenes}"),
        (["nonsense"], "nonsense"),
        (["demo", "--places", "many"], "--places: invalid literal"),
        (["demo", "--matching", "best"], "--matching"),
        (["demo", "--image-scale"], "--image-scale 'must be"),
    ],
)
def test_arguments_that_tyro_refuses(run_here, tmp_path, arguments, says):
    status, out, err = run_here(simipu, *arguments)
    assert (status, out, err.count("\n")) == (1, "", 1) and err.startswith("error: "), err
    assert says.split("'")[0].strip() in err, err
    assert "│" not in err and not (tmp_path / "out").exists()


def test_help_lists_every_flag(run_script):
    done = run_script("simipu.py", "kitti", "--help")
    assert done.returncode == 0
    for field in simipu.Config.__dataclass_fields__:
        assert "--" + field.replace("_", "-") in done.stdout


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["kitti", "--data-rot", "x"], "Unrecognized options: --data-rot, x; similar: --data-root"),
        (["kitti", "--evl-splits", "--seeed", "4"], "; similar: --eval-splits, --seed, --splits"),
        (
            ["kitty", "--data-root", "x"],
            "; Available subcommands: demo, kitti, kitti_raw, kitti_odometry, waymo, nuscenes",
        ),
    ],
)
def test_what_tyro_suggests_stays_in_the_line(run_here, arguments, says):
    """V19."""
    status, _, err = run_here(simipu, *arguments)
    assert status == 1 and err.startswith("error: ") and err.count("\n") == 1 and err.endswith(says + "\n"), err


@pytest.mark.parametrize(
    "script, arguments, flag",
    [
        (simipu, ["demo", "--data-root", "a", "--data-root", "b"], "--data-root"),
        (simipu, ["demo", "--eval-splits", "--eval_splits=val"], "--eval-splits"),
        (simipu, ["demo", "--crop", 0.5, 1, "--seed", 1, "--crop", 0.2, 1], "--crop"),
        (finetune_depth, ["demo", "--splits", "a", "--name", "x", "--splits", "b", "c"], "--splits"),
        (data_check, ["--data-root", "a", "--data-root", "b"], "--data-root"),
        (ablate, ["--seeds", 0, "--seeds", 1], "--seeds"),
        (ablate, ["--seeds", 0, "--splits", "a", "--splits", "b"], "--splits"),  # passed on to the task's script
    ],
)
def test_a_list_given_twice_is_refused(run_here, tmp_path, script, arguments, flag):
    """R7: tyro would drop the first without a word."""
    status, _, err = run_here(script, *arguments)
    assert status == 1 and err == f"error: {flag}: given 2 times; give all its values after one {flag}\n"
    assert not list(tmp_path.iterdir())


def test_every_flag_of_several_values_is_known_as_a_list():
    """R7: of configs, and of functions that are commands."""
    for script in (simipu, finetune_depth):
        fields = {f.name for f in dataclasses.fields(script.Config) if str(f.type).startswith("tuple")}
        assert len(fields) >= 5
        assert set(runtime.list_flags(script.Config())) == {"--" + name.replace("_", "-") for name in fields}
    command = runtime.later(lambda some_list, number=3, *, others=None: None)
    assert runtime.list_flags((command(("a", "b"), others=["c"]), [])) == ["--some-list", "--others"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, (0.5, float("nan"))])
def test_ranges_exclude_what_is_no_number(value):
    """V10."""
    c = dataclasses.make_dataclass("C", ["some_flag"])(value)
    with pytest.raises(BadInput, match="^--some-flag .*: must be 0 or more$"):
        runtime.check_range(c, "some_flag", 0, 1e30, "0 or more")


def end(action, parse=None):
    """How a command line ends that does this: its exit status or message."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        runtime.command_line(parse or (lambda: action))
    except SystemExit as e:
        return e.code
    finally:
        signal.signal(signal.SIGINT, handler)


def failing(error):
    def action():
        raise error

    return action


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.ESTALE, errno.ENOTDIR, errno.ENAMETOOLONG])
def test_a_file_that_the_system_refuses_is_one_line(monkeypatch, number):
    """R9, for what no place in the code has a better line for."""
    monkeypatch.setattr(sys, "argv", ["x"])
    assert end(failing(OSError(number, os.strerror(number), "a/b"))) == f"error: a/b: {os.strerror(number)}"
    with pytest.raises(OSError, match="of a bug"):
        end(failing(OSError("of a bug")))


def test_ctrl_c_is_status_130_without_a_word(monkeypatch, capsys):
    """R18: while arguments are read and while the command works."""
    monkeypatch.setattr(sys, "argv", ["x"])
    assert end(lambda: os.kill(os.getpid(), signal.SIGINT) or time.sleep(60)) == 130
    assert end(None, parse=failing(KeyboardInterrupt())) == 130
    assert capsys.readouterr() == ("", "")


def scripts():
    return [path for path in sorted(REPO.glob("*.py")) if "__main__" in path.read_text()]


@pytest.mark.parametrize("script", scripts(), ids=lambda path: path.name)
def test_every_script_can_be_interrupted_from_its_first_line(script):
    """R18: importing torch takes seconds. What comes first after the docstring is what makes Ctrl-C silent."""
    first = ast.parse(script.read_text()).body[1:3]
    assert [ast.unparse(statement) for statement in first] == [
        "import signal",
        "if __name__ == '__main__':\n    signal.signal(signal.SIGINT, signal.SIG_DFL)",
    ]


def test_ctrl_c_while_it_is_imported(tmp_path):
    process = subprocess.Popen([sys.executable, REPO / "simipu.py", "demo"], cwd=tmp_path, stderr=subprocess.PIPE)
    maps = f"/proc/{process.pid}/maps"
    while process.poll() is None and "torch" not in open(maps).read():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode in (130, -signal.SIGINT) and said == b""


def test_an_output_that_nobody_reads_ends_it_quietly(tmp_path):
    """R18: `| head`, whether print fails or the interpreter at its exit."""
    program = "import runtime; runtime.command_line(lambda: lambda: [print(i) for i in range(int(input()))])"
    for lines in (10, 10_000):
        command = [sys.executable, "-c", program]
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(command, input=f"{lines}\n", stdout=writer, stderr=subprocess.PIPE, cwd=REPO, text=True)
        os.close(writer)
        assert (done.returncode, done.stderr) == (141, "")


def test_another_broken_pipe_is_not_taken_for_the_output(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(BrokenPipeError):
        end(failing(BrokenPipeError()))


# -----------------------------------------------------------------------------
# processes

TORCHRUN = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    "env, says",
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2 but no MASTER_ADDR, MASTER_PORT in the environment: torchrun"),
        ({"WORLD_SIZE": "2", **TORCHRUN}, "WORLD_SIZE=2 but no RANK in"),
        ({"WORLD_SIZE": "two", **TORCHRUN}, "WORLD_SIZE=two in the environment: not a number"),
        (
            {"WORLD_SIZE": "2", "RANK": "2", **TORCHRUN},
            "RANK=2, WORLD_SIZE=2 in the environment: a run of 2 has no such",
        ),
        ({"RANK": "1"}, "RANK=1, WORLD_SIZE=1 in the environment: a run of 1 has no such process"),
        (
            {"SLURM_NTASKS": "8"},
            "SLURM_NTASKS=8 but no WORLD_SIZE in the environment: start .* with torchrun, see docs",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "2", "SLURM_NTASKS": "1"}, "OMPI_COMM_WORLD_SIZE=2 but no WORLD_SIZE"),
        ({"PMI_SIZE": "2"}, "PMI_SIZE=2 but no WORLD_SIZE"),
    ],
)
def test_processes_of_which_the_environment_says_too_little(env, says):
    """R3, R16: srun or mpirun without torchrun, and WORLD_SIZE without its brothers."""
    with pytest.raises(BadInput, match="^" + says):
        runtime.place_among_processes(env)


@pytest.mark.parametrize(
    "env, place",
    [
        ({}, (0, 1, 0)),
        ({"SLURM_NTASKS": "1"}, (0, 1, 0)),
        ({"SLURM_NTASKS": "2", "WORLD_SIZE": "16", "RANK": "9", **TORCHRUN}, (9, 16, 1)),  # srun started torchrun
        ({"WORLD_SIZE": "1", "RANK": "0"}, (0, 1, 0)),
    ],
)
def test_processes_of_which_it_says_enough(env, place):
    assert runtime.place_among_processes(env) == place


def test_processes_that_do_not_meet_are_one_line(monkeypatch):
    for name, value in (TORCHRUN | {"WORLD_SIZE": "2", "RANK": "1", "MASTER_PORT": "none"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match="^MASTER_ADDR=127.0.0.1, MASTER_PORT=none: the 2 processes do not meet"):
        runtime.start_run("cpu")


def test_more_processes_than_gpus(monkeypatch):
    for name, value in (TORCHRUN | {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2", "RANK": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(BadInput, match="^2 processes on this machine but 1 GPU: --nproc_per_node=1, or --device cpu$"):
        runtime.start_run()


def test_processes_forked_while_signals_are_blocked_never_hear_of_them():
    """A pool's processes, which Ctrl-C reaches, too. The one that forks hears of it afterwards."""
    with pytest.raises(KeyboardInterrupt):
        with runtime.blocked(signal.SIGINT):
            pid = os.fork()
            os.kill(os.getpid(), signal.SIGINT)
            if not pid:
                os._exit(0)
            status = os.waitpid(pid, 0)[1]
    assert status == 0


def test_gathered_negatives_of_another_number_of_processes_are_another_run(run_here, scenes):
    """V3; and one process is told that it has no others."""
    start = ["demo", "--data-root", scenes, *MINI, "--gather-negatives"]
    status, out, _ = run_here(simipu, *start, "--max-steps", 1)
    assert status == 0 and "note: --gather-negatives: with one process there are no others" in out
    saved = torch.load("out/demo/last.pt", weights_only=True)
    assert saved["identity"]["processes"] == 1
    torch.save(saved | {"identity": saved["identity"] | {"processes": 2}}, "out/demo/last.pt")
    status, _, err = run_here(simipu, *start, "--max-steps", 2)
    assert status == 1 and err == (
        "error: out/demo/last.pt: made with processes=2, not 1; give another --name, or delete it\n"
    )


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
    y = x + torch.randn(24, 6, generator=g, dtype=torch.float64)
    return x, y, torch.randn(6, 5, generator=g, dtype=torch.float64)


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


@pytest.mark.parametrize(
    "batch, group, world, says",
    [
        (4, 4, 8, "--batch-size 4: fewer frames than the 8 processes"),
        (10, 4, 4, "--batch-size 10: not a multiple of 4 processes x passes of 2 frames (--group 4)"),
        (6, 4, 1, "--batch-size 6: not a multiple of 1 processes x passes of 4 frames (--group 4)"),
    ],
)
def test_batches_that_do_not_come_out_even(batch, group, world, says):
    with pytest.raises(BadInput) as error:
        runtime.split_batch(simipu.Config(batch_size=batch, group=group), world)
    assert str(error.value) == says


def test_the_flag_of_held_out_frames():
    c = simipu.Config(eval_splits=("a", "b"), eval_root=("r",))
    assert runtime.held_out_flag(c) == "--eval-splits a b"
    assert runtime.held_out_flag(dataclasses.replace(c, eval_splits=())) == "--eval-root r"
