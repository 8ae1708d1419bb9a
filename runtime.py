"""What every script needs and no method is about: the command line, processes, seeds, timing, checkpoints."""

import collections
import contextlib
import dataclasses
import errno
import functools
import hashlib
import importlib.metadata
import io
import itertools
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import tyro
from torch import nn
from tqdm import tqdm

from data import BadInput, disk_errors, writing


def command_line(parse, run=lambda action: action()):
    """run(what `parse()`, a call of tyro, makes of the arguments). Wrong arguments, which tyro answers with a box and status 2,
    any BadInput and a disk that is full or forbidden become one line on stderr and exit status 1."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed = parse()
    except SystemExit as e:
        if not e.code:
            raise  # --help
        text = [line.strip("│ ") for line in said.getvalue().splitlines() if line.startswith("│")]
        text = text[: next((i for i, line in enumerate(text) if line.startswith("───")), None)]
        raise SystemExit("error: " + " ".join(text or said.getvalue().split())) from None
    try:
        return run(parsed)
    except BadInput as e:  # perhaps on one rank alone: leave at once, and torchrun ends the others
        message = f"error: {e}"
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
            raise
        message = f"error: {e.filename or 'writing a file'}: {e.strerror}"
    raise SystemExit(message)  # out here, where nothing holds the loader any longer: its workers end by themselves


def later(f):
    """f with its arguments kept for later: tyro would call it while what it says is still being caught."""
    return functools.wraps(f)(lambda *args, **kwargs: functools.partial(f, *args, **kwargs))


def commands(functions, description):
    """The command line of a script with subcommands, {name: function}; a function's arguments are its flags."""
    command_line(lambda: tyro.extras.subcommand_cli_from_dict({name: later(f) for name, f in functions.items()}, description=description))


@dataclass
class Run:
    """The processes of a run. Alone or under torchrun, on GPUs or not: the same program."""

    device: torch.device
    rank: int
    world: int
    control: object = None  # a gloo group, for words between hosts that must not wait for GPUs

    @property
    def main(self):
        return self.rank == 0

    def any(self, flag):
        """True on every rank if flag is true on any."""
        if self.world == 1:
            return flag
        flag = torch.tensor(int(flag))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.control)
        return bool(flag)

    def gather(self, rows):
        """The lists of all ranks, end to end, on every rank."""
        lists = [rows]
        if self.world > 1:
            lists = [None] * self.world
            dist.all_gather_object(lists, rows, group=self.control)
        return [row for rows in lists for row in rows]

    def fail(self, message):
        """End every rank, with one message, for a reason that all of them know."""
        if self.main:
            print(f"error: {message}", file=sys.stderr, flush=True)
        if self.world > 1:
            dist.barrier(group=self.control)  # or torchrun, seeing another rank gone, would end the one that speaks
        raise SystemExit(1)

    def mean(self, stats):
        """A dict of scalar tensors, averaged over ranks, as floats of five digits."""
        values = torch.stack([v.detach().to(self.device, torch.float32) for v in stats.values()])
        if self.world > 1:
            dist.all_reduce(values)
        return {k: float(f"{v / self.world:.5g}") for k, v in zip(stats, values.tolist())}


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, counts):
        ctx.rank, ctx.counts = dist.get_rank(), counts
        padded = x.new_zeros(max(counts), x.shape[1])
        padded[: len(x)] = x
        out = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(out, padded)
        return torch.cat([rows[:n] for rows, n in zip(out, counts)])

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)  # each rank's loss has its own gradient for every row; DDP divides by the world size later
        start = sum(ctx.counts[: ctx.rank])
        return grad[start : start + ctx.counts[ctx.rank]], None


def follow_main(model, run):
    """Rank 0's buffers, such as batch norm's running statistics, on every rank: what a checkpoint holds."""
    for buffer in model.buffers() if run.world > 1 else ():
        dist.broadcast(buffer, 0)


def gather_rows(x):
    """Rows x (n, D) of all ranks, in rank order, with gradients back to the rank that owns them; and each rank's n, which may
    differ. -> (sum of n, D), list of n."""
    counts = [torch.zeros((), dtype=torch.long, device=x.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor(len(x), device=x.device))
    counts = [int(n) for n in counts]
    return _GatherRows.apply(x, counts), counts


class Clock:
    """Where the time of a step goes, on average since last read."""

    def __init__(self):
        self.steps, self.waited, self.since = 0, 0.0, time.perf_counter()

    @contextlib.contextmanager
    def waiting(self):
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def read(self, batch_size):
        n, seconds, waited = self.steps, time.perf_counter() - self.since, self.waited
        self.__init__()
        memory = {"memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)} if torch.cuda.is_available() else {}
        return {"data_ms": round(1e3 * waited / n, 1), "step_ms": round(1e3 * seconds / n, 1), "samples_per_s": round(batch_size * n / seconds, 2), **memory}


def start_run(device="auto", seed=0):
    """Join the process group if torchrun started us, choose the device, seed. -> Run. Raises BadInput without a GPU asked for, or with too few."""
    if device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: no GPU that this build of torch can use")
    cuda = device != "cpu" and torch.cuda.is_available()
    rank, world, local = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if cuda:
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if local >= gpus:
            raise BadInput(f"{here} processes on this machine but {gpus} GPU{'s' * (gpus > 1)}: --nproc_per_node={gpus}, or --device cpu")
        torch.cuda.set_device(local)
    control = None
    if world > 1:
        # torchrun --max-restarts starts processes again with the store of the last attempt (seen with --standalone, torch 2.13), in which
        # gloo finds the addresses of the dead: each attempt has names of its own
        store, _, _ = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world)
        control = dist.new_group(backend="gloo")
    torch.manual_seed(seed)
    return Run(torch.device("cuda", local) if cuda else torch.device("cpu"), rank, world, control)


def catch_signals():
    """From now on SIGTERM and Ctrl-C only fill the list returned, for the loop to leave when it is ready. One that comes seconds
    later kills; at once, it is the same one again: a scheduler signals every process, and torchrun passes it on to its own."""
    caught = []

    def handler(number, _):
        if caught and time.monotonic() > caught[0] + 3:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        caught.append(time.monotonic())

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)
    return caught


def leave_signals_to_parent(_):
    """For DataLoader workers: Ctrl-C and a scheduler's SIGTERM reach every process, and the parent still wants its batch. But SIGTERM is
    also how Python ends workers that are left over at its exit, and then it waits for them: so they leave, ten seconds later."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(10))


def read_log(path):
    """The lines of a log.jsonl, [] without one. A killed run may have left the last one torn."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def cut_log(path, step):
    """Leave only the lines up to `step` of a log.jsonl, none for step 0: a killed run has written past its checkpoint. -> those lines."""
    kept = [line for line in read_log(path) if line["step"] <= step and step]
    with writing(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
    return kept


def provenance(run, script):
    """What a run depends on besides its config and its data: the code (`script`, a __file__), the packages, the machine."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        revision = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        dirty = bool(subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True).stdout.strip())
    except (OSError, subprocess.CalledProcessError):
        revision = dirty = None  # not a checkout
    packages = {"torch": str(torch.__version__)}  # which, unlike the package's own, says for what CUDA it was built
    for name in ("triton", "numpy", "scipy", "pillow", "timm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else platform.machine()
    machine = {"processes": run.world, "device": device, "threads": torch.get_num_threads(), "python": platform.python_version()}
    return {"script": Path(script).name, "git": revision, "dirty": dirty, "packages": packages, "machine": machine}


def save_atomically(obj, path):
    """A reader, or a run killed at any moment or on a full disk, sees the old file or the new one."""
    with writing(path) as temporary, temporary.open("wb") as f:
        try:
            torch.save(obj, f)
        except RuntimeError as e:  # says nothing of a full disk itself
            raise e.__context__ if isinstance(e.__context__, OSError) else e


def read_checkpoint(path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except Exception as e:  # torch.load answers a broken file with half a dozen types
        raise BadInput(f"{path}: not a readable checkpoint ({type(e).__name__})") from None


def check_range(c, flags, low, high, what, rising=False):
    """Raises BadInput, saying `what` the values must be, for the first of the `flags`, fields of c, with one outside [low, high]."""
    for flag in flags.split():
        values = getattr(c, flag) if isinstance(getattr(c, flag), tuple) else (getattr(c, flag),)
        if not all(low <= v <= high for v in values) or (rising and list(values) != sorted(values)):
            raise BadInput(f"--{flag.replace('_', '-')} {' '.join(map(str, values))}: must be {what}")


def split_batch(c, world):
    """How a step's c.batch_size frames are made up of forward passes of c.group, or fewer if there are too many processes. -> group; passes of
    each process; the same in words. Raises BadInput where it does not come out even."""
    group = min(c.group, c.batch_size // world)
    if group < 1 or c.batch_size % (group * world):
        raise BadInput(f"--batch-size {c.batch_size}: not a multiple of --group {group} x {world} processes")
    accumulate = c.batch_size // (group * world)
    smaller = f" (not {c.group}: --batch-size is too small for so many processes)" * (group < min(c.group, c.batch_size))
    return group, accumulate, f"a step: {c.batch_size} frames = {world} processes x {accumulate} passes x {group} frames{smaller}"


def as_json(c, without=()):
    """A config as plain values that survive a checkpoint and a comparison (tuples become lists)."""
    return {k: v for k, v in json.loads(json.dumps(dataclasses.asdict(c))).items() if k not in without}


def config_of(saved, Config, path, script):
    """The Config of a last.pt's run. Raises BadInput for files that `script` did not write."""
    if not isinstance(saved, dict) or not {"model", "config", "step", "identity"} <= saved.keys() or saved.get("script", "simipu.py") != script:
        raise BadInput(f"{path}: not a last.pt of {script}")
    fields = {f.name for f in dataclasses.fields(Config)}
    return Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved["config"].items() if k in fields})


def load_exactly(model, tensors, path, made_by=None):
    """load_state_dict. Raises BadInput, one line, where names or shapes differ."""
    try:
        model.load_state_dict(tensors)
    except RuntimeError:  # a page of names
        raise BadInput(f"{path}: its weights are not those of its config" + f"; made by another revision ({made_by})?" * bool(made_by)) from None


def hash_of(state_dict):
    """A short hash of weights: names and bytes."""
    digest = hashlib.sha256()
    for name, value in state_dict.items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def differences(had, wanted):
    """What a run that was made with `had` would have to differ in to be `wanted` (dicts), in words: "" for nothing."""
    return "; ".join(f"{k}={had.get(k)}, not {v}" for k, v in wanted.items() if had.get(k) != v)


def resume(path, identity, model, optimizers):
    """Steps done, 0 without a checkpoint. identity: all that must be as it was, or the run would be another experiment; raises
    BadInput naming what differs."""
    if not path.exists():
        return 0
    saved = read_checkpoint(path)
    if not isinstance(saved, dict) or "identity" not in saved:
        raise BadInput(f"{path}: not a checkpoint of this program")
    differ = differences(saved["identity"], identity)
    if differ:
        raise BadInput(f"{path}: made with {differ}; give another --name, or delete it")
    model.load_state_dict(saved["model"])
    for optimizer, state in zip(optimizers, saved["optimizers"]):
        optimizer.load_state_dict(state)
    return saved["step"]


# -----------------------------------------------------------------------------
# the training loop, as far as it is the same for every task


def stream(dataset, batches, collate, workers, run):
    """Batches of a data set, loaded ahead by `workers` processes. Raises the BadInput that stands in a batch's place."""
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=batches, collate_fn=collate, num_workers=workers,
        worker_init_fn=leave_signals_to_parent, pin_memory=run.device.type == "cuda", prefetch_factor=4 if workers else None,
    )  # fmt: skip
    for batch in loader:
        if isinstance(batch, BadInput):
            raise batch
        yield batch


class Number:
    """A scalar on its way from the GPU: whoever asks for it waits for that scalar, not for all that was queued behind it."""

    def __init__(self, x):
        self.value = torch.empty((), dtype=torch.float32, pin_memory=x.is_cuda).copy_(x.detach(), non_blocking=True)
        self.arrived = torch.cuda.Event() if x.is_cuda else None
        if self.arrived:
            self.arrived.record()

    def __float__(self):
        if self.arrived:
            self.arrived.synchronize()
        return self.value.item()


def ahead(function, items, threads=4):
    """function(item) of each, in order, a few computed ahead of their use."""
    items, queue = iter(items), collections.deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            queue.extend(pool.submit(function, item) for item in itertools.islice(items, 2 * threads))
            while queue:
                result = queue.popleft().result()
                queue.extend(pool.submit(function, item) for item in itertools.islice(items, 1))
                yield result
        finally:
            pool.shutdown(cancel_futures=True)


class Loop:
    """The steps of a run that may be killed at any moment and goes on from its last checkpoint to the same numbers.

        loop = Loop(c, run, model, optimizers, identity, names, accumulate, what, judgement)    # loop.start: steps already done
        loop.begin(steps, next_batch, about, lines)                             # the first thing that writes
        for step in loop:
            loop.update(next_batch, rate)                                       # forward, backward, optimisers
            if loop.reporting: stats = loop.report(...)
            if loop.saving: loop.save(...)                                      # before judging, which a broken file may end
            if loop.judging: loop.judge()                                       # loop.judged: what it last found

    c has the fields out, name, log_every, save_every, eval_every, batch_size, amp. model(batch, report) -> loss, stats (a dict of scalar
    tensors). identity: what must be as it was on resuming, or the run would be another experiment. names: of the frames, for
    messages; a batch says under "index" which it holds. accumulate: forward passes per step. judgement() -> figures, logged as `what`, if there
    is anything to judge on; a run killed while it judged does so when it is started again, and so does a finished one.
    """

    def __init__(self, c, run, model, optimizers, identity, names, accumulate=1, what="", judgement=None):
        self.c, self.run, self.model, self.optimizers, self.identity, self.names = c, run, model, optimizers, identity, names
        self.accumulate, self.what, self.judgement, self.judged = accumulate, what, judgement, None
        self.folder = Path(c.out) / c.name
        self.start = self.done = resume(self.folder / "last.pt", identity, model, optimizers)
        self.groups = [g for o in optimizers for g in o.param_groups]  # after resuming, which makes new ones
        self.owned = [p for g in self.groups for p in g["params"]]
        assert len(self.owned) == len({id(p) for p in self.owned}) == sum(p.requires_grad for p in model.parameters())
        if run.any(self.start > 0) and not self.start:
            raise BadInput(f"{self.folder}/last.pt: some processes see it and some do not; --out must be on a disk that all nodes share")
        self.wrapped = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False) if run.world > 1 else model

    def begin(self, steps, next_batch, about, lines):
        """Write the log's header, print `lines`. next_batch(step): the next forward pass's batch, augmented as in that step."""
        self.steps, self.about = steps, about
        self.batch = next_batch(self.start) if self.start < steps else None  # before anything is written: a broken data set leaves no trace
        owed = False
        if self.run.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            judged = any(line["step"] == self.start and self.what in line for line in cut_log(self.folder / "log.jsonl", self.start))
            owed = bool(self.start and self.judgement) and (self.start >= steps or self.judges_at(self.start) and not judged)
            print("\n".join(lines), flush=True)
        self.owed = self.run.any(owed)
        self.log({"step": self.start, **about})
        self.asked_to_stop, self.stopping = catch_signals(), False

    def judges_at(self, step):
        return self.c.eval_every > 0 and step % self.c.eval_every == 0

    def __iter__(self):
        if self.owed:
            self.judge()
        self.model.train()
        self.clock, self.unchecked = Clock(), []
        self.bar = tqdm(total=self.steps, initial=self.start, disable=not self.run.main, dynamic_ncols=True, mininterval=1)
        with self.bar:  # closed before an error that ends the loop is said
            for step in range(self.start, self.steps):
                self.done = step + 1
                self.reporting = self.done % self.c.log_every == 0 or self.done == self.steps
                yield step
                if self.stopping:
                    break

    def update(self, next_batch, rate, clip=0.0):
        """One step of the optimisers, with every group's lr its initial_lr x rate; gradients are clipped to norm `clip`, 0 for not at
        all. Ends the run, the last good checkpoint kept, where a loss or a gradient is not finite."""
        c, run, step = self.c, self.run, self.done - 1
        for g in self.groups:
            g["lr"] = g["initial_lr"] * rate
        for i in range(self.accumulate):
            last = i == self.accumulate - 1
            with contextlib.nullcontext() if last or run.world == 1 else self.wrapped.no_sync():
                with torch.autocast(run.device.type, torch.bfloat16, enabled=c.amp and run.device.type == "cuda"):
                    loss, self.stats = self.wrapped(self.batch, self.reporting and last)
                (loss / self.accumulate).backward()
            self.unchecked.append((self.done, self.batch["index"], Number(loss)))
            with self.clock.waiting():
                self.batch = next_batch(step + last) if step + last < self.steps else None
        if step == self.start:
            assert all(p.grad is not None for p in self.owned), "a parameter that should learn got no gradient"
        if clip:
            self.stats["grad_norm"] = nn.utils.clip_grad_norm_(self.owned, clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.clock.steps += 1
        self.bar.update()

        # losses must be finite: the step before's are known without waiting for the GPU, this one's must be before anything is written
        self.stopping = run.any(bool(self.asked_to_stop))
        self.saving = self.done % c.save_every == 0 or self.done == self.steps or self.stopping
        self.judging = bool(self.judgement) and (self.done == self.steps or self.judges_at(self.done) and not self.stopping)
        due = [u for u in self.unchecked if self.reporting or self.saving or self.judging or u[0] < self.done]
        self.unchecked = self.unchecked[len(due) :]
        # a finite loss may have had a gradient that was not
        sound = not self.saving or bool(torch.stack([p.isfinite().all() for p in self.owned]).all())
        broken = [(at, self.names[i]) for at, index, loss in due if not (math.isfinite(float(loss)) and sound) for i in index.tolist()]
        if run.any(bool(broken)):
            self.bar.close()
            at, names = (sorted({row[i] for row in run.gather(broken)}) for i in (0, 1))
            run.fail(
                f"step {at[0]}: the loss or its gradient is not finite; frames {', '.join(names)}; the last good checkpoint, if there is one, stays in {self.folder}/"
            )

    def report(self, epoch):
        """A line of log.jsonl: the last pass's stats, averaged over ranks, the rates, the times. -> the stats."""
        stats = self.run.mean(self.stats)
        self.log({"step": self.done, "epoch": epoch, **stats, "lr": [g["lr"] for g in self.groups], **self.clock.read(self.c.batch_size)})
        return stats

    def log(self, line):
        if self.run.main:
            with disk_errors(path := self.folder / "log.jsonl"), path.open("a") as f:
                f.write(json.dumps(line) + "\n")

    def judge(self):
        """A line of log.jsonl; the time it takes is no step's."""
        self.judged = self.judgement()
        self.log({"step": self.done, self.what: self.judged})
        self.model.train()
        self.clock = Clock()

    def save(self, **more):
        """last.pt, with `more` in it."""
        if self.run.main:
            state = {"model": self.model.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers], "step": self.done, "identity": self.identity}
            save_atomically(state | self.about | more, self.folder / "last.pt")
