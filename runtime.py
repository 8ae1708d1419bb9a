"""What every script needs and no method is about: processes, seeds, the command line, where a run came from."""

import collections
import contextlib
import dataclasses
import errno
import functools
import hashlib
import importlib.metadata
import inspect
import io
import itertools
import json
import os
import platform
import re
import select
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import tyro

from files import BadInput

DISK_SAYS_NO = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
LAUNCHED = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # how srun and mpirun say how many they start
INTERRUPTED, NOBODY_READS = 130, 141  # exit statuses: what a shell says of a program that SIGINT or SIGPIPE ended


# -----------------------------------------------------------------------------
# the command line


def command_line(parse, run=lambda action: action()):
    """run(what `parse()`, a call of tyro, makes of the arguments).

    These become one line on stderr and exit status 1: wrong arguments, which tyro answers with a box and status 2; any
    BadInput; a file that the system refuses. These end it without a word: Ctrl-C, with status 130, and an output that
    nobody reads any longer, as after `| head`, with 141.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # KeyboardInterrupt: what was begun is tidied up
    ending = None
    try:
        run(parsed_by(parse))
    except SystemExit as e:
        ending = SystemExit(e.code)
    except KeyboardInterrupt:
        ending = SystemExit(INTERRUPTED)
    except BadInput as e:  # perhaps on one rank alone: leave at once, and torchrun ends the others
        ending = SystemExit(f"error: {e}")
    except BrokenPipeError:
        if somebody_reads():
            raise  # it was another pipe
        ending = SystemExit(NOBODY_READS)
    except OSError as e:
        if not e.filename and e.errno not in DISK_SAYS_NO:
            raise
        ending = SystemExit(f"error: {e.filename or 'writing a file'}: {e.strerror}")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # from here on there is nothing to tidy up
    if not somebody_reads() and (ending is None or not ending.code):
        ending = SystemExit(NOBODY_READS)
    if ending:
        raise ending  # out here, where nothing holds the loader any longer: its workers end by themselves


def parsed_by(parse):
    """parse(), a call of tyro. Raises BadInput, one line, for what tyro refuses, and for lists that are given twice."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed = parse()
    except SystemExit as e:
        if not e.code:
            raise  # --help
        raise BadInput(box_text(said.getvalue())) from None
    given = [argument.partition("=")[0].replace("_", "-") for argument in sys.argv[1:] if argument.startswith("--")]
    for flag in list_flags(parsed):
        if given.count(flag) > 1:  # tyro would drop the first without a word
            raise BadInput(f"{flag}: given {given.count(flag)} times; give all its values after one {flag}")
    return parsed


def list_flags(parsed):
    """The flags with several values that a command has: of a config, of a function's arguments, or of several."""
    if isinstance(parsed, tuple):
        return [flag for part in parsed for flag in list_flags(part)]
    values = {}
    if dataclasses.is_dataclass(parsed):
        values = vars(parsed)
    elif isinstance(parsed, functools.partial):
        values = inspect.signature(parsed.func).bind_partial(*parsed.args, **parsed.keywords).arguments
    return ["--" + name.replace("_", "-") for name, value in values.items() if isinstance(value, (tuple, list))]


def somebody_reads():
    """Flush what was printed. -> False if the pipe that it went into is closed; what is printed later goes nowhere."""
    read = True
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(BrokenPipeError):
            stream.flush()
        if pipe_is_closed(stream):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # or Python says so at its exit
            read = False
    return read


def pipe_is_closed(stream):
    try:
        number = stream.fileno()
    except (OSError, ValueError):  # no file, as in a notebook
        return False
    poll = select.poll()
    poll.register(number, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def box_text(said):
    """The words in the first part of a box that tyro draws, and what it suggests in the others, on one line."""
    drawn = "│" in said  # else, where the terminal has no such characters, a title, and rules between the parts
    lines = [line.strip("│").rstrip() for line in said.splitlines() if line.startswith("│") or not drawn]
    parts = [[]]
    for line in lines:
        if re.fullmatch(r"\s*[─-]{3,}", line):
            parts.append([])
        else:
            parts[-1].append(line)
    parts = parts if drawn or len(parts) == 1 else parts[1:]
    first, *others = [" ".join(line.strip() for line in part).strip() for part in parts]
    words = [first] + [text for text in others if text.startswith("Available subcommands")]
    flags = [re.match(r" {1,6}(--[\w-]+)", line) for part in parts[1:] for line in part]  # deeper lines are help
    similar = sorted({flag[1] for flag in flags if flag and flag[1] not in sys.argv})
    words += [f"similar: {', '.join(similar)}"] if similar else []
    return "; ".join(words)


def later(f):
    """f with its arguments kept for later: tyro would call it while what it says is still being caught."""
    return functools.wraps(f)(lambda *args, **kwargs: functools.partial(f, *args, **kwargs))


def commands(functions, description):
    """The command line of a script with subcommands, {name: function}; a function's arguments are its flags."""
    functions = {name: later(f) for name, f in functions.items()}
    command_line(lambda: tyro.extras.subcommand_cli_from_dict(functions, description=description))


def check_range(c, flags, low, high, what, rising=False):
    """Raises BadInput for the first of the `flags`, fields of c, with a value outside [low, high]. NaN is outside.

    what: what the message says that values must be. rising: the values of a flag must not fall.
    """
    for flag in flags.split():
        value = getattr(c, flag)
        values = value if isinstance(value, tuple) else (value,)
        within = all(low <= v <= high for v in values)
        if not within or (rising and list(values) != sorted(values)):
            raise BadInput(f"--{flag.replace('_', '-')} {' '.join(map(str, values))}: must be {what}")


def held_out_flag(c):
    """The flag, with its values, that says what a run of config c is judged on, for messages."""
    flag, values = ("--eval-splits", c.eval_splits) if c.eval_splits else ("--eval-root", c.eval_root)
    return " ".join([flag, *values])


def split_batch(c, world):
    """How a step's c.batch_size frames become forward passes of c.group frames, or fewer if there are many processes.

    -> group; passes of each process; the same in words. Raises BadInput where it does not come out even.
    """
    check_range(c, "group", 1, 1e9, "1 or more")
    group = min(c.group, c.batch_size // world)
    if not group:
        raise BadInput(f"--batch-size {c.batch_size}: fewer frames than the {world} processes")
    if c.batch_size % (group * world):
        passes = f"{world} processes x passes of {group} frames (--group {c.group})"
        raise BadInput(f"--batch-size {c.batch_size}: not a multiple of {passes}")
    accumulate = c.batch_size // (group * world)
    words = f"a step: {c.batch_size} frames = {world} processes x {accumulate} passes x {group} frames"
    if group < min(c.group, c.batch_size):
        words += f" (not {c.group}: --batch-size is too small for so many processes)"
    return group, accumulate, words


# -----------------------------------------------------------------------------
# processes


@dataclass
class Run:
    """The processes of a run. Alone or under torchrun, on GPUs or not: the same program."""

    device: torch.device
    rank: int
    world: int
    control: object = None  # a gloo group, for words between hosts that must not wait for GPUs
    asked_to_stop: list = dataclasses.field(default_factory=list)  # when, by which signals a Loop catches
    broken: str = ""  # why this process cannot go on after the step in hand

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


def start_run(device="auto", seed=0):
    """Join the process group if torchrun started us, choose the device, seed. -> Run.

    Raises BadInput without a GPU that was asked for, or with fewer GPUs than processes.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: no GPU that this build of torch can use")
    cuda = device != "cpu" and torch.cuda.is_available()
    rank, world, local = place_among_processes(os.environ)
    if cuda:
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if local >= gpus:
            found = f"{gpus} GPU" if gpus == 1 else f"{gpus} GPUs"
            raise BadInput(f"{here} processes on this machine but {found}: --nproc_per_node={gpus}, or --device cpu")
        torch.cuda.set_device(local)
    control = join_processes(rank, world, "nccl" if cuda else "gloo") if world > 1 else None
    torch.manual_seed(seed)
    return Run(torch.device("cuda", local) if cuda else torch.device("cpu"), rank, world, control)


def mixed_precision(amp, device):
    """Context of a forward pass: bfloat16 autocast where --amp, "gpu", "always" or "never", asks for it. On a CPU it
    pays where /proc/cpuinfo lists avx512_bf16 or amx_bf16; elsewhere it is slower than float32.
    """
    wanted = amp == "always" or (amp == "gpu" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted)


def place_among_processes(env):
    """What torchrun says in the environment. -> this process's rank; processes; its rank on this machine.

    Raises BadInput where it is said in part, and where another launcher has started several processes without it: each
    would take itself for the whole run.
    """

    def number(name, default):
        try:
            return int(env.get(name, default))
        except ValueError:
            raise BadInput(f"{name}={env[name]} in the environment: not a number") from None

    for name in LAUNCHED if "WORLD_SIZE" not in env else ():
        if number(name, 1) > 1:
            raise BadInput(
                f"{name}={env[name]} but no WORLD_SIZE in the environment: start the processes of a run with torchrun, "
                f"see docs/pretraining.md; for a run of one process, unset {name}"
            )
    rank, world, local = number("RANK", 0), number("WORLD_SIZE", 1), number("LOCAL_RANK", 0)
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in env]
    if world > 1 and missing:
        raise BadInput(f"WORLD_SIZE={world} but no {', '.join(missing)} in the environment: torchrun sets all of them")
    if not 0 <= rank < world:
        raise BadInput(f"RANK={rank}, WORLD_SIZE={world} in the environment: a run of {world} has no such process")
    return rank, world, local


def join_processes(rank, world, backend):
    """Start torch.distributed. -> a further gloo group, see Run.control. Raises BadInput where nobody answers.

    torchrun --max-restarts starts processes again with the store of the last attempt (seen with --standalone, torch
    2.13), in which gloo finds the addresses of the dead. So each attempt has names of its own.
    """
    waiting = signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python would hear of Ctrl-C only after the wait
    try:
        store, _, _ = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
        return dist.new_group(backend="gloo")
    except (RuntimeError, ValueError) as e:
        where = f"MASTER_ADDR={os.environ['MASTER_ADDR']}, MASTER_PORT={os.environ['MASTER_PORT']}"
        raise BadInput(f"{where}: the {world} processes do not meet ({str(e).splitlines()[0]})") from None
    finally:
        signal.signal(signal.SIGINT, waiting)


def main_first(run, function):
    """function() on rank 0, and when it is through on the others, which read what it has left on the disk. -> its
    result, on every rank.
    """
    result = function() if run.main else None
    run.any(False)
    return result if run.main else function()


def follow_main(model, run):
    """Rank 0's buffers, such as batch norm's running statistics, on every rank: what a checkpoint holds."""
    if run.world > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


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
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        # each rank's loss has its own gradient for every row; DDP divides by the world size later
        grad = grad.contiguous()
        dist.all_reduce(grad)
        start = sum(ctx.counts[: ctx.rank])
        return grad[start : start + ctx.counts[ctx.rank]], None


def gather_rows(x):
    """Rows x (n, D) of all ranks, in rank order, with gradients back to the rank that owns them.

    -> rows (sum of n, D); list of each rank's n, which may differ.
    """
    counts = [torch.zeros((), dtype=torch.long, device=x.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor(len(x), device=x.device))
    counts = [int(n) for n in counts]
    return _GatherRows.apply(x, counts), counts


@contextlib.contextmanager
def blocked(*signals):
    """These wait until the end. For starting processes, which then never hear of them.

    Ctrl-C reaches all processes, and each would print a traceback; and Python loses one that comes while it forks.
    """
    caught = []  # in spite of the mask, if another thread gets it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    handlers = {number: signal.signal(number, lambda number, _: caught.append(number)) for number in signals}
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in caught:
            os.kill(os.getpid(), number)


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


# -----------------------------------------------------------------------------
# what a run is, and where it came from


def provenance(run, script):
    """What a run depends on besides its config and its data: code (`script`, a __file__), packages, machine."""
    git = ["git", "-C", str(Path(__file__).parent)]
    ask = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
    try:
        revision = ask([*git, "rev-parse", "HEAD"]).stdout.strip()
        dirty = bool(ask([*git, "status", "--porcelain", "-uno"]).stdout.strip())
    except (OSError, subprocess.CalledProcessError):
        revision = dirty = None  # not a checkout
    packages = {"torch": str(torch.__version__)}  # which, unlike the package's own, says for what CUDA it was built
    for name in ("triton", "numpy", "scipy", "pillow", "timm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else platform.machine()
    machine = {
        "processes": run.world,
        "device": device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    return {"script": Path(script).name, "git": revision, "dirty": dirty, "packages": packages, "machine": machine}


def as_json(c, without=()):
    """A config as plain values that survive a checkpoint and a comparison (tuples become lists)."""
    plain = json.loads(json.dumps(dataclasses.asdict(c)))
    return {k: v for k, v in plain.items() if k not in without}


def config_of(saved, Config, path, script):
    """The Config of a last.pt's run. Raises BadInput for files that `script` did not write."""
    ours = isinstance(saved, dict) and {"model", "config", "step", "identity"} <= saved.keys()
    if not ours or saved.get("script", "simipu.py") != script:
        raise BadInput(f"{path}: not a last.pt of {script}")
    fields = {f.name for f in dataclasses.fields(Config)}
    return Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved["config"].items() if k in fields})


def load_exactly(model, tensors, path, made_by=None):
    """load_state_dict. Raises BadInput, one line, where names or shapes differ. made_by: the file's git revision."""
    try:
        model.load_state_dict(tensors)
    except RuntimeError:  # a page of names
        hint = f"; made by another revision ({made_by})?" if made_by else ""
        raise BadInput(f"{path}: its weights are not those of its config{hint}") from None


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
