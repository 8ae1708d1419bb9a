"""The run that may be killed: first around a model of two numbers, in this process, then the real script."""

import contextlib
import dataclasses
import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

import files
import loop
import runtime
import simipu
from files import BadInput
from loop import Loop, stream

TINY = "--places 32 --num-points 1024 --point-hidden 32 --image-hidden 32 --embed-dim 32 --batch-size 4 --log-every 1"
SMALL = [*TINY.split(), "--image-scale", 160, 64]
MINI = ["--eval-splits", *SMALL, "--workers", 0]  # no splits: no evaluation at the end
SAME = ("intra", "inter", "intra_top1", "inter_top1", "match_m", "intra_positive", "inter_negative", "inter_std")


def read_log(folder):
    """Its steps, without what it was started with and how it was judged."""
    return [line for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "lr" in line]


def figures(folder):
    return [[line[k] for k in ("step", "epoch", *SAME)] for line in read_log(folder)]


# -----------------------------------------------------------------------------
# around a model of two numbers


@dataclasses.dataclass
class Config:
    out: str
    name: str = "tiny"
    log_every: int = 1
    save_every: int = 100
    keep_every: int = 0
    eval_every: int = 0
    max_steps: int = 0
    epochs: int = 1
    batch_size: int = 2


class Numbers(torch.utils.data.Dataset):
    """Item i is i, after special[i]() in a loading process."""

    def __init__(self, special=()):
        self.special, self.parent = dict(special), os.getpid()

    def __getitem__(self, key):
        if key in self.special and os.getpid() != self.parent:
            self.special[key]()
        return key


def collate(keys):
    return {"x": torch.tensor(keys, dtype=torch.float32)[:, None], "index": torch.tensor(keys)}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """tiny(steps, ...): a run, as a script makes it. -> its Loop, after it.

    dataset, workers: see `stream`; step i has the items 2 i and 2 i + 1. after(loop): called after every step.
    """
    monkeypatch.chdir(tmp_path)

    def train(steps, dataset=None, workers=0, after=lambda _: None, judgement=None, run=None, **flags):
        c, run = Config("out", **flags), run or runtime.Run(torch.device("cpu"), 0, 1)
        torch.manual_seed(0)
        model = torch.nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)
        names = [f"frame {i}" for i in range(2 * steps)]
        around = Loop(c, run, model, [optimizer], {"seed": 0}, names, "match", judgement)
        batches = [[2 * i, 2 * i + 1] for i in range(around.start, steps)]
        loaded = stream(dataset or Numbers(), batches, collate, workers, run)
        next_batch = lambda step: next(loaded) if step < steps else None
        batch = next_batch(around.start)
        around.begin(steps, {}, [])
        for step in around:
            loss = around.model(batch["x"]).square().mean()
            loss.backward()
            around.watch(loss, batch["index"])
            batch = around.waiting(next_batch, step + 1)
            optimizer.step()
            optimizer.zero_grad()
            around.stepped()
            if around.reporting:
                around.report(0, {"loss": loss})
            if around.saving:
                around.save()
            if around.judging:
                around.judge()
            after(around)
        return around

    handlers = {number: signal.getsignal(number) for number in (*loop.ASKING, signal.SIGCHLD)}
    yield train
    for number, handler in handlers.items():
        signal.signal(number, handler)


def ending(run, *arguments, **flags):
    """How a run ends: an exit status, or what it refuses."""
    try:
        run(*arguments, **flags)
    except SystemExit as e:
        return e.code or 0
    except BadInput as e:
        return str(e)


def at(step, act):
    """For `after`: act() after that step."""
    return lambda around: act() if around.done == step else None


def losses(folder="out/tiny"):
    lines = map(json.loads, open(f"{folder}/log.jsonl"))
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def checkpoint(path="out/tiny/last.pt"):
    saved = torch.load(path, weights_only=True)
    return saved["step"], flat([saved["model"], saved["optimizers"]])


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, None), (signal.SIGHUP, None), (signal.SIGINT, 130)])
def test_asked_to_stop_it_saves_and_leaves(tiny, capsys, number, status):
    """And goes on to the same bits. A signal in the middle of a step is one step's affair; Ctrl-C is told the shell."""
    whole = tiny(6, name="whole")
    assert ending(tiny, 6, after=at(2, lambda: send(number))) == status
    assert checkpoint()[0] == 3 and list(losses()) == [1, 2, 3]
    assert "asked to stop: step 3 is saved, and the same command goes on from there" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # nothing is left that would swallow the next one
    assert tiny(6).start == 3
    assert losses() == losses(whole.folder) and checkpoint() == checkpoint(whole.folder / "last.pt")


def test_asked_again(tiny, monkeypatch):
    """A scheduler's second SIGTERM does not keep a long step from being saved; a second Ctrl-C kills."""
    monkeypatch.setattr(loop, "IMPATIENT", -1)
    numbers = []
    again = at(2, lambda: [send(number) for number in numbers])
    numbers += [signal.SIGTERM, signal.SIGTERM, signal.SIGHUP]
    assert not ending(tiny, 6, after=again) and checkpoint()[0] == 3
    numbers += [signal.SIGINT]
    pid = os.fork()
    if not pid:
        tiny(6, after=again, name="killed")
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == signal.SIGINT and not os.path.exists("out/killed/last.pt")


def test_a_terminal_that_closes_is_nothing_to_nohup(tiny):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert not tiny(4, after=at(2, lambda: send(signal.SIGHUP))).stopping


def test_asked_to_stop_while_it_judges(tiny):
    """All is saved before a judgement, however seldom that is asked for, so it can leave at once; it judges when it is
    started again.
    """

    def judgement():
        send(signal.SIGTERM)
        time.sleep(60)

    assert ending(tiny, 6, judgement=judgement, eval_every=3) == 0 and checkpoint()[0] == 3
    assert tiny(6, judgement=lambda: 1, eval_every=3).start == 3
    judged = [line["step"] for line in files.read_log(files.Path("out/tiny/log.jsonl")) if "match" in line]
    assert judged == [3, 6]


def test_a_bar_that_nobody_reads_ends_the_run_quietly(tiny, monkeypatch):
    """R18, `2>&1 | head`: saved, status 141."""

    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stderr", open(writer, "w"))
    assert ending(tiny, 6) == 141 and checkpoint()[0] == 1
    with contextlib.suppress(BrokenPipeError):
        sys.stderr.close()


# ---- checkpoints ----


def no_links(*_):
    raise OSError(errno.EPERM, "this disk knows none")


def test_keep_every_keeps_checkpoints(tiny, monkeypatch):
    """step_N.pt is the last.pt of its step, by a link or by a copy; a run that goes on leaves them, and a kill between
    the two files costs none.
    """
    tiny(5, keep_every=2)
    assert [checkpoint(f"out/tiny/step_{n}.pt")[0] for n in (2, 4)] == [2, 4] and checkpoint()[0] == 5
    second = checkpoint("out/tiny/step_2.pt")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "link", lambda *_: sys.exit("killed"))
        assert ending(tiny, 8, keep_every=2) == "killed" and checkpoint()[0] == 5
    monkeypatch.setattr(os, "link", no_links)
    tiny(8, keep_every=2)
    assert checkpoint("out/tiny/step_8.pt") == checkpoint() and checkpoint()[0] == 8
    assert checkpoint("out/tiny/step_2.pt") == second
    assert sorted(os.listdir("out/tiny")) == ["last.pt", "log.jsonl", *(f"step_{n}.pt" for n in (2, 4, 6, 8))]
    tiny(8, name="whole", keep_every=2)
    assert checkpoint("out/whole/step_6.pt") == checkpoint("out/tiny/step_6.pt")


def test_what_a_killed_process_left_half_written_goes(tiny):
    """V5: its temporary names hold its number. Those of living processes and other people's files stay."""
    tiny(1)
    stay = [f"last.{os.getpid()}.tmp.pt", f"own.{os.getppid()}.tmp.json", "notes.tmp.txt", "a.1.pt"]
    for name in ["last.999999999.tmp.pt", "step_2.999999999.tmp.pt", *stay]:
        open(f"out/tiny/{name}", "w").close()
    tiny(2)
    assert sorted(os.listdir("out/tiny")) == sorted(["last.pt", "log.jsonl", *stay[1:]])  # its own name was used


def test_two_writers_of_a_file_do_not_mix(tmp_path):
    """V5: each has a name of its own to write to."""
    with files.writing(tmp_path / "last.pt") as ours:
        pid = os.fork()
        if not pid:
            with files.writing(tmp_path / "last.pt") as theirs:
                theirs.write_text("theirs")
            os._exit(0)
        ours.write_text("our")
        os.waitpid(pid, 0)
        assert (tmp_path / "last.pt").read_text() == "theirs"
    assert (tmp_path / "last.pt").read_text() == "our" and len(os.listdir(tmp_path)) == 1


# ---- the folder ----


def test_one_run_at_a_time_in_a_folder(tiny):
    """R3. The lock goes with its process, whatever became of its children, which may outlive it."""
    tiny(1)
    before = open("out/tiny/log.jsonl").read()
    held = loop.lock(files.Path("out/tiny/log.jsonl"))
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    assert ending(tiny, 2) == "out/tiny: another process is at work on this run; give another --name"
    assert open("out/tiny/log.jsonl").read() == before
    held.close()
    assert tiny(2).start == 1
    child.kill()


def test_a_run_that_came_between(tiny):
    """Another process makes the folder, saves and ends while this one still loads its first batch."""
    first = runtime.Run(torch.device("cpu"), 0, 1)

    class Slow(Numbers):
        def __getitem__(self, key):
            if not os.path.exists("out"):
                tiny(1)
            return key

    with pytest.raises(BadInput, match="^out/tiny: another run has begun there meanwhile$"):
        tiny(1, dataset=Slow(), run=first)


def nothing_mounted():
    os.symlink("/not/mounted", "out")


def a_file():
    open("out", "w").close()


@pytest.mark.parametrize(
    "before, name, says",
    [
        (nothing_mounted, "tiny", "File exists"),
        (a_file, "tiny", "Not a directory"),
        (lambda: None, "x" * 300, "File name too long"),
    ],
)
def test_a_folder_that_cannot_be_made_is_one_line_that_names_out(tiny, before, name, says):
    """R9: whatever the disk says."""
    before()
    with pytest.raises(BadInput, match=f"^--out out --name {name}: no folder for the run \\(.*{says}\\)$"):
        tiny(1, name=name)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EISDIR, errno.ENOENT, errno.EACCES])
def test_an_error_of_the_disk_is_one_line_that_names_out(tiny, monkeypatch, number):
    def fail(path, *_, **__):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(files.Path, "mkdir", fail)
    with pytest.raises(BadInput, match=f"^--out out .*out/tiny: {os.strerror(number)}"):
        tiny(1)


@pytest.mark.parametrize("name", ["", " ", ".", "..", "../x", "a/../../b", "/tmp/x"])
def test_a_name_that_leaves_out_is_refused(tiny, name):
    """R18."""
    with pytest.raises(BadInput, match="--name '.*': the name must be that of a folder inside --out"):
        tiny(1, name=name)


def test_a_name_of_several_parts(tiny):
    assert str(tiny(1, name="ablation/SimIPU/0").folder) == "out/ablation/SimIPU/0"


# ---- processes ----


@pytest.mark.parametrize("other", [{"step": 3}, {"frames": "other"}, {"max_steps": 9}])
def test_processes_that_would_go_different_ways_end(tiny, capsys, other):
    """V4: one line, instead of waiting for each other for ever."""
    run = runtime.Run(torch.device("cpu"), 0, 1)
    run.gather = lambda rows: [*rows, rows[0] | other]
    with pytest.raises(SystemExit) as ended:
        tiny(2, run=run)
    (key,) = other
    said = capsys.readouterr().err
    assert ended.value.code == 1 and said.count("\n") == 1 and not os.path.exists("out")
    assert said.startswith("error: out/tiny: process 0 of the run has ") and f"{key}=" in said, said


# ---- loading processes ----


@pytest.fixture
def hasty(monkeypatch):
    """Loading processes are looked at after a second, and given up soon."""
    monkeypatch.setattr(loop, "LOOK", 1)
    monkeypatch.setattr(loop, "PATIENCE", 1)


def loaders():
    return multiprocessing.active_children()


def shell_kill(number, pids):
    """A signal that is not the parent's."""
    subprocess.run(["kill", f"-{int(number)}", *map(str, pids)], check=True)


def test_loading_processes_outlive_what_is_sent_to_all(tiny):
    """V1: a scheduler's SIGTERM reaches them, too, and the parent may need longer for its step than any patience. They
    leave when the parent says so.
    """
    run = runtime.Run(torch.device("cpu"), 0, 1)
    loaded = stream(Numbers(), [[i] for i in range(20)], collate, 2, run)
    next(loaded)
    pids = [process.pid for process in loaders()]
    assert len(pids) == 2
    for number in loop.ASKING:
        shell_kill(number, pids)
    assert [int(batch["index"]) for batch in loaded] == list(range(1, 20))
    loaded = stream(Numbers(), [[i] for i in range(20)], collate, 1, run)
    next(loaded)
    (process,) = loaders()
    process.terminate()
    process.join(5)
    assert process.exitcode == 0


def test_loading_processes_leave_when_their_parent_is_killed(tmp_path):
    def parent():
        loaded = stream(Numbers(), [[i] for i in range(20)], collate, 1, runtime.Run(torch.device("cpu"), 0, 1))
        next(loaded)
        (tmp_path / "pid").write_text(str(loaders()[0].pid))
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=parent)
    process.start()
    process.join()
    deadline = time.time() + 30
    while files.lives(int((tmp_path / "pid").read_text())) and time.time() < deadline:
        time.sleep(0.05)
    assert not files.lives(int((tmp_path / "pid").read_text()))


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


def full(*_):
    raise RuntimeError("unable to write to file </torch_1>: No space left on device (28)")


def fill_shared_memory():
    torch.Tensor.share_memory_ = full


def hang():
    time.sleep(600)


@pytest.mark.parametrize(
    "special, says",
    [
        (kill_self, "a loading process was killed by SIGKILL; if that was for lack of memory, give fewer --workers"),
        (fill_shared_memory, "No space left on device (28)); give fewer --workers, or in Docker --shm-size=2g"),
        (hang, "no batch from the loading processes in "),
        (lambda: os._exit(3), "a loading process ended with status 3; --workers 0 shows why"),
    ],
)
def test_a_lost_loading_process_ends_the_run_in_one_line_after_saving(tiny, hasty, capsys, special, says):
    """R1, R16: killed, unable to hand over, silent. The step in hand is finished, and the run goes on to the same bits.
    Without a first batch nothing is written.
    """
    whole = tiny(12, name="whole", workers=1)
    capsys.readouterr()
    status = ending(tiny, 12, dataset=Numbers({13: special}), workers=1)  # of step 7
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    step = checkpoint()[0]
    assert status == 1 and len(error) == 1 and says in error[0] and 2 <= step <= 6, error
    assert error[0].endswith(f"; step {step} is saved, and the same command goes on from there")
    assert not loaders()
    assert tiny(12).start == step
    assert losses() == losses(whole.folder) and checkpoint() == checkpoint(whole.folder / "last.pt")
    assert says in ending(tiny, 12, dataset=Numbers({1: special}), workers=1, name="new")
    assert not os.path.exists("out/new")


def test_asked_to_stop_while_the_loading_processes_hang(tiny, hasty, monkeypatch):
    """A step of several passes needs its next batch to be finished: this process loads it."""
    monkeypatch.setattr(loop, "PATIENCE", 600)
    run = runtime.Run(torch.device("cpu"), 0, 1)
    loaded = stream(Numbers({4: hang}), [[i] for i in range(9)], collate, 1, run)
    assert [int(next(loaded)["index"]) for _ in range(4)] == [0, 1, 2, 3]
    timer = threading.Timer(0.2, run.asked_to_stop.append, [0.0])
    timer.start()
    assert int(next(loaded)["index"]) == 4 and not run.broken and not loaders()
    assert int(next(loaded)["index"]) == 5


def test_an_error_of_the_data_set_is_not_taken_for_a_lost_process(tiny, hasty):
    def fail():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        tiny(12, dataset=Numbers({13: fail}), workers=1)


def test_a_broken_frame_ends_the_run_after_saving(tiny, capsys):
    """The step before it needs it not."""

    class Broken(Numbers):
        def __getitem__(self, key):
            if key == 6:
                raise BadInput("frame 6: broken")
            return key

    assert ending(tiny, 9, dataset=Broken()) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: frame 6: broken; step 3 is saved")
    assert checkpoint()[0] == 3


@pytest.mark.parametrize(
    "workers, batches, megabytes, says",
    [
        (
            4,
            1000,
            64,
            "--workers 4: 17 batches of 7.2 MB are loaded ahead, and /dev/shm has 64.0 MB free; --workers 1 fits",
        ),
        (4, 1000, 10, "; --workers 0 fits, or in Docker --shm-size=245m"),
        (4, 1000, 123, ""),
        (4, 8, 64, ""),  # a short run
    ],
)
def test_shared_memory_is_compared_with_what_is_loaded_ahead(monkeypatch, workers, batches, megabytes, says):
    """R1: before anything is written, and for all processes of a machine together."""
    boxes = [torch.zeros(2), (torch.zeros(3), "a name")]  # of different lengths, as lists
    batch = {"image": torch.empty(7_200_000 - 28, dtype=torch.uint8), "index": torch.zeros(1).long(), "boxes": boxes}
    if not says:
        loop.check_shared_memory(batch, workers, batches, megabytes * 1e6)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(BadInput) as error:
        loop.check_shared_memory(batch, workers, batches, megabytes * 1e6)
    assert says in str(error.value)


def test_a_small_shared_memory_ends_a_run_before_it_begins(tiny, monkeypatch):
    monkeypatch.setattr(loop.shutil, "disk_usage", lambda _: files.Path("/").stat() and type("", (), {"free": 64}))
    with pytest.raises(BadInput, match="^--workers 2: 9 batches of 0.0 MB are loaded ahead"):
        tiny(20, workers=2)
    assert not os.path.exists("out")


# -----------------------------------------------------------------------------
# the real script


# sizes change, gradients accumulate
RESUMED = ["--eval-splits", *TINY.split(), "--workers", 0, "--image-scale", 96, 64, 192, 96]
RESUMED += ["--group", 1, "--save-every", 3, "--max-steps", 7]


def start(folder, *arguments, launcher=()):
    """A run of the script in the background."""
    command = [sys.executable, *launcher, simipu.__file__, "demo", *arguments]
    return subprocess.Popen(
        list(map(str, command)),
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def wait_until(what, process):
    deadline = time.time() + 600
    while time.time() < deadline and not what():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    assert what()


def assert_same_run(one, other):
    """Every line of the log, and every bit of the last checkpoint's weights and optimisers."""
    assert figures(one) == figures(other)
    a, b = (torch.load(folder / "last.pt", weights_only=True) for folder in (one, other))
    for part in ("model", "optimizers", "step"):
        assert flat(a[part]) == flat(b[part]), part


def test_killed_during_a_save_resumes_exactly(scenes, tmp_path):
    """kill -9 while the second checkpoint is being written: the first one is whole, and the run goes on from it to the
    same bits. Stopping by --max-steps and going on is the same.
    """
    whole = start(tmp_path, "--data-root", scenes, *RESUMED, "--name", "whole")
    assert whole.wait(600) == 0, whole.stderr.read()
    process, out = start(tmp_path, "--data-root", scenes, *RESUMED), tmp_path / "out" / "demo"
    temporary = out / f"last.{process.pid}.tmp.pt"
    try:
        wait_until(lambda: (out / "last.pt").exists(), process)
        wait_until(temporary.exists, process)
    finally:
        process.kill()
    process.wait()
    saved = torch.load(out / "last.pt", weights_only=True)
    assert temporary.exists() and saved["step"] == 3 and read_log(out)[-1]["step"] >= 6
    # written first: of a finished run, never an older one
    assert torch.load(out / "backbone.pt", weights_only=True)["step"] == 6
    again = start(tmp_path, "--data-root", scenes, *RESUMED)
    assert again.wait(600) == 0, again.stderr.read()
    assert not temporary.exists()
    assert_same_run(out, tmp_path / "out" / "whole")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full, the disk that is always full")
def test_a_full_disk_is_one_line_and_costs_the_steps_since_the_last_save(run_here, scenes, tmp_path):
    out = tmp_path / "out" / "demo"
    run = lambda steps: run_here(simipu, "demo", "--data-root", scenes, *MINI, "--max-steps", steps)
    assert run(2)[0] == 0
    (out / f"last.{os.getpid()}.tmp.pt").symlink_to("/dev/full")
    status, _, err = run(3)
    assert (status, err.splitlines()[-1]) == (1, "error: out/demo/last.pt: not written (No space left on device)")
    assert torch.load(out / "last.pt", weights_only=True)["step"] == 2
    assert run(3)[0] == 0
    assert [line["step"] for line in read_log(out)] == [1, 2, 3]
    says = r"^log\.jsonl: not written \(No space left on device\)$"
    with pytest.raises(BadInput, match=says), files.disk_errors("log.jsonl"), open("/dev/full", "w") as f:
        f.write("{}")


def children(pid):
    said = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(child) for child in said.split()]


def test_torchrun_restarts_a_killed_worker_and_loses_nothing(scenes, tmp_path):
    """Two processes; one of them is killed after the first checkpoint; torchrun starts both again, from that
    checkpoint.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    arguments = ["--data-root", scenes, *RESUMED, "--batch-size", 2, "--max-steps", 12]
    whole = start(tmp_path, *arguments, "--name", "whole", launcher=launcher)
    assert whole.wait(600) == 0, whole.stderr.read()
    process, out = start(tmp_path, *arguments, launcher=launcher), tmp_path / "out" / "demo"
    try:
        wait_until(lambda: (out / "log.jsonl").exists() and len(read_log(out)) >= 4, process)
        os.kill(children(process.pid)[-1], signal.SIGKILL)
        assert process.wait(600) == 0, process.stderr.read()
    finally:
        process.kill()
    headers = [line for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "git" in line]
    assert headers[0]["step"] == 0 and len(headers) == 2 and headers[1]["step"] in (3, 6, 9)
    assert_same_run(out, tmp_path / "out" / "whole")


def flat(state):
    """Nested dicts and lists of tensors as one comparable list."""
    if torch.is_tensor(state):
        return state.flatten().tolist()
    if isinstance(state, dict):
        state = list(state.values())
    return [flat(v) for v in state] if isinstance(state, list) else state


@pytest.mark.parametrize("launcher", [(), ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")])
def test_sigterm_saves_and_leaves(scenes, tmp_path, launcher):
    """As a scheduler sends it: to every process there is, the loading one too. (torchrun itself ends with 1, whatever
    its workers do.)
    """
    arguments = ["--data-root", scenes, *MINI, "--workers", 1, "--max-steps", 500, "--save-every", 500]
    process, out = start(tmp_path, *arguments, launcher=launcher), tmp_path / "out" / "demo"
    try:
        wait_until(lambda: (out / "log.jsonl").exists() and len(read_log(out)) >= 3, process)
        os.killpg(process.pid, signal.SIGTERM)
        status = process.wait(300)
    finally:
        process.kill()
    assert status == (1 if launcher else 0), process.stderr.read()
    assert torch.load(out / "last.pt", weights_only=True)["step"] == read_log(out)[-1]["step"] < 500
