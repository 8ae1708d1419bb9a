"""The run that may be killed at any moment and goes on from its last checkpoint to the same numbers.

`Loop` does what is around a training step: it counts, checks, logs, saves, judges, stops and resumes. The step itself,
forward, backward and optimisers, stands in the script. `stream` loads batches ahead in processes of their own.
"""

import contextlib
import errno
import fcntl
import functools
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import threading
import time
import weakref
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import track
from files import BadInput, disk_errors, read_checkpoint, remove_stale, save_atomically, unless_bad, writing
from runtime import INTERRUPTED, NOBODY_READS, blocked, differences

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # a scheduler, Ctrl-C, a terminal that is gone
IMPATIENT = 3  # seconds after a signal from when on Ctrl-C kills

PREFETCH = 4  # batches that each loading process works ahead
LOOK = 5  # seconds without a batch after which the loading processes are looked at
PATIENCE = 600  # seconds without a batch after which they are given up
SHARED = Path("/dev/shm")  # where loading processes put their batches, on Linux; Docker gives it 64 MB
MORE_SHARED = "give fewer --workers, or in Docker --shm-size=2g"

LOCKED = weakref.WeakSet()  # open files that hold a lock
GIVEN_UP = []  # loaders, kept until the process ends: taking one down could wait for what will not come


# -----------------------------------------------------------------------------
# batches


class Lost(Exception):
    """The loading processes will not hand over another batch. The message says why, and what to do about it."""


def stream(dataset, batches, collate, workers, run):
    """Batches of a data set, in order, loaded ahead by `workers` processes. batches: lists of keys, the same each time.

    Raises the BadInput that stands in a batch's place. Where the loading processes are lost, by their death, a full
    shared memory or a hanging disk, the step in hand is to be finished and saved all the same: from then on this
    process loads, and run.broken tells the Loop to end. If they never brought a batch, that is the BadInput.
    """
    load = functools.partial(DataLoader, dataset, pin_memory=run.device.type == "cuda", generator=torch.Generator())
    done = 0
    if workers:
        try:
            for batch in loaded_ahead(load, batches, collate, workers, run):
                yield unless_bad(batch)
                done += 1
        except Lost as e:
            if not done:
                raise BadInput(str(e)) from None
            if not run.asked_to_stop:
                run.broken = str(e)
    for batch in load(batch_sampler=itertools.islice(batches, done, None), collate_fn=collate):
        yield unless_bad(batch)


def loaded_ahead(load, batches, collate, workers, run):
    """The batches of a DataLoader with processes. Raises Lost, and BadInput where shared memory is too small."""
    free = shutil.disk_usage(SHARED).free if SHARED.is_dir() else math.inf
    loader = load(
        batch_sampler=batches,
        collate_fn=functools.partial(hand_over, collate),
        num_workers=workers,
        prefetch_factor=PREFETCH,
        timeout=LOOK,
        worker_init_fn=functools.partial(serve, os.getpid()),
    )
    others = set(multiprocessing.active_children())
    with blocked(*ASKING):
        batches_of_loader = iter(loader)
    processes = set(multiprocessing.active_children()) - others
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise a death in the middle of a step
    first = True
    try:
        while True:
            batch = next_in_time(batches_of_loader, processes, run)
            if batch is None:
                return
            if isinstance(batch, str):
                raise Lost(f"a loading process cannot hand over its batch ({batch}); {MORE_SHARED}")
            if first and not isinstance(batch, BadInput):
                check_shared_memory(batch, workers, len(batches), free)
            first = False
            yield batch
    except Lost:
        for process in processes:
            process.kill()
            process.join(1)
        GIVEN_UP.append(batches_of_loader)
        raise


def next_in_time(batches_of_loader, processes, run):
    """The next batch, None after the last. Raises Lost for a process that died and for one that never answers; if the
    run was asked to stop, soon for one that does not answer.
    """
    since = time.monotonic()
    while True:
        try:
            return next(batches_of_loader, None)
        except (RuntimeError, OSError, EOFError) as e:
            if "in DataLoader worker process" in str(e):
                raise  # from the data set
            dead = [process.exitcode for process in processes if not lives_on(process)]
            if dead:
                raise Lost(words_for_a_death(dead[0])) from None
            if "DataLoader timed out" not in str(e):
                raise Lost(f"a batch of a loading process cannot be had ({e}); {MORE_SHARED}") from None
            seconds = time.monotonic() - since
            if seconds > PATIENCE or run.asked_to_stop:
                raise Lost(f"no batch from the loading processes in {seconds:.0f} seconds; is a disk away?") from None


def lives_on(process):
    process.join(0.1)  # what it had sent may be missed before its death is known
    return process.exitcode is None


def words_for_a_death(status):
    """What to say of a loading process that ended, and why that may be. status: as multiprocessing tells it."""
    if status >= 0:
        return f"a loading process ended with status {status}; --workers 0 shows why"
    name = signal.Signals(-status).name
    if name == "SIGBUS":
        return f"a loading process was killed by {name}: shared memory is full; {MORE_SHARED}"
    return f"a loading process was killed by {name}; if that was for lack of memory, give fewer --workers"


def check_shared_memory(batch, workers, batches, free):
    """Raises BadInput if the batches that are loaded ahead, each as large as this one, do not fit.

    free: bytes of shared memory before anything was loaded; all processes of a machine share them.
    """
    size = sum(tensor.nbytes for tensor in tensors_in(batch)) * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    ahead = min(PREFETCH * workers + 1, batches)
    if ahead * size > free:
        fit = max(int(free / size - 1) // PREFETCH, 0)
        raise BadInput(
            f"--workers {workers}: {ahead} batches of {size / 1e6:.1f} MB are loaded ahead, and {SHARED} has "
            f"{free / 1e6:.1f} MB free; --workers {fit} fits, or in Docker --shm-size={2 * ahead * size / 1e6:.0f}m"
        )


def tensors_in(batch):
    """All tensors of nested dicts and lists."""
    if torch.is_tensor(batch):
        return [batch]
    parts = batch.values() if isinstance(batch, dict) else batch
    nested = isinstance(batch, (dict, list, tuple))
    return [tensor for part in parts for tensor in tensors_in(part)] if nested else []


def hand_over(collate, samples):
    """For loading processes: collate, into shared memory. -> the words of the error if that is full.

    The queue that carries batches would do so later, and lose the batch and the error.
    """
    batch = collate(samples)
    try:
        for tensor in tensors_in(batch):
            tensor.share_memory_()
    except (OSError, RuntimeError) as e:
        return str(e).splitlines()[0]
    return batch


def serve(parent, _):
    """For loading processes: leave when the parent has gone or says so, and not before.

    Ctrl-C and a scheduler's SIGTERM reach every process, and the parent still wants its batch. They are blocked, but a
    thread waits for the parent's own SIGTERM, with which Python ends processes that are left over at its exit.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
    if hasattr(signal, "sigtimedwait"):
        threading.Thread(target=leave_with, args=(parent, os.getppid()), daemon=True).start()
    else:  # macOS: a SIGTERM that reaches all processes may cost the steps since the last checkpoint
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])


def leave_with(parent, born_of):
    """born_of: the parent, or a server that forks for it and ends with it."""
    sent = None
    while os.getppid() == born_of and not (sent and sent.si_pid == parent):
        sent = signal.sigtimedwait([signal.SIGTERM], 1)
    os._exit(0)


# -----------------------------------------------------------------------------
# what is measured on the way


class Clock:
    """Where the time of a step goes, on average since it was last read."""

    def __init__(self):
        self.steps, self.waited, self.since = 0, 0.0, time.perf_counter()

    @contextlib.contextmanager
    def waiting(self):
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def read(self, batch_size):
        """-> figures for a line of the log. The clock starts again."""
        seconds = time.perf_counter() - self.since
        figures = {
            "data_ms": round(1e3 * self.waited / self.steps, 1),
            "step_ms": round(1e3 * seconds / self.steps, 1),
            "samples_per_s": round(batch_size * self.steps / seconds, 2),
        }
        if torch.cuda.is_available():
            figures["memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        self.__init__()
        return figures


class Number:
    """A scalar on its way from the GPU: whoever asks waits for that scalar, not for all that was queued behind it."""

    def __init__(self, x):
        self.value = torch.empty((), dtype=torch.float32, pin_memory=x.is_cuda).copy_(x.detach(), non_blocking=True)
        self.arrived = torch.cuda.Event() if x.is_cuda else None
        if self.arrived:
            self.arrived.record()

    def __float__(self):
        if self.arrived:
            self.arrived.synchronize()
        return self.value.item()


# -----------------------------------------------------------------------------
# the log and the checkpoint of a run


def lock(path):
    """An open file, which keeps other runs out of its folder until it is closed or this process ends.

    Raises BadInput if another run has it.
    """
    file = path.open("ab", buffering=0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno in (errno.EAGAIN, errno.EACCES):
            raise BadInput(f"{path.parent}: another process is at work on this run; give another --name") from None
        # other errors are those of a disk that knows no locks
    LOCKED.add(file)
    return file


def let_go():
    """In a new process: a lock lives as long as anybody has its file open, and a child may outlive the run."""
    for file in list(LOCKED):
        file.close()


os.register_at_fork(after_in_child=let_go)


def cut_log(path, step):
    """Leave only the lines up to `step` of a log.jsonl, none for step 0. -> those lines.

    A killed run has written past its checkpoint. The file stays the same one, for its lock.
    """
    kept, read, end = [], 0, 0
    for text in path.read_bytes().splitlines(keepends=True):
        read += len(text)
        with contextlib.suppress(ValueError):  # a line that the kill has torn
            line = json.loads(text)
            if line["step"] <= step and step:
                kept.append(line)
                end = read
    os.truncate(path, end)
    return kept


def resume(path, identity, model, optimizers):
    """Load last.pt into a model and its optimisers. -> steps done, 0 without a checkpoint.

    identity: all that must be as it was, or the run would be another experiment. Raises BadInput naming what differs.
    """
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


def link(path, other):
    """`other` becomes a further name of the file, or, on a disk that knows no links, a copy. Whole or not at all."""
    with writing(other) as temporary:
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)


# -----------------------------------------------------------------------------
# the loop


class Bar(tqdm):
    """A bar that ends where nobody reads it any longer, and not the run, which has something to save."""

    unread = False

    def display(self, *args, **kwargs):
        try:
            return super().display(*args, **kwargs)
        except BrokenPipeError:
            self.disable = self.unread = True


class Loop:
    """What is around the steps of a run.

        loop = Loop(c, run, model, optimizers, identity, names, "match", judgement)     # loop.start: steps already done
        batch = next_batch(loop.start)                  # before anything is written: a broken data set leaves no trace
        loop.begin(steps, about, lines)                 # the first thing that writes
        for step in loop:
            loop.set_rate(share)
            with loop.sharing(last):                    # gradients over processes, in the last pass of a step alone
                loss, stats = loop.model(batch, ...)
                loss.backward()
            loop.watch(loss, batch["index"])            # is it finite?
            batch = loop.waiting(next_batch, step + 1)
            ...                                         # clip, optimisers
            loop.stepped()
            if loop.reporting: loop.report(epoch, stats)
            if loop.saving: loop.save(...)              # before judging, which may be killed, or end at a broken file
            if loop.judging: loop.judge()               # loop.judged: what it last found
        if not loop.stopping:
            ...                                         # pictures
            loop.end()

    c has the fields out, name, log_every, save_every, keep_every, max_steps, epochs, batch_size; eval_every where there
    is a judgement; track if the run may be shown elsewhere (track.py). identity: what must be as it was on resuming.
    names: of the frames, for messages; a batch says under "index" which it holds. judgement() -> figures, logged as
    `what`, if there is anything to judge on; a run killed while it judged does so when it is started again, and so does
    a finished one. loop.model is the model as it is to be called: on several processes it also averages gradients.

    A run that is asked to stop, by SIGTERM, Ctrl-C or a terminal that closes, finishes its step, saves and leaves; so
    does one whose next batch cannot be had, and that is an error then. One process at a time works in a run's folder.
    """

    def __init__(self, c, run, model, optimizers, identity, names, what="", judgement=None):
        self.c, self.run, self.optimizers, self.identity, self.names = c, run, optimizers, identity, names
        self.what, self.judgement, self.judged = what, judgement, None
        if not inside(c.out, c.name):
            raise BadInput(f"--out '{c.out}' --name '{c.name}': the name must be that of a folder inside --out")
        self.folder, self.lock, self.tracker = Path(c.out) / c.name, None, None
        track.imported(self.tracked)
        for group in (group for o in optimizers for group in o.param_groups):
            group["initial_lr"] = group["lr"]  # goes into checkpoints, and comes back with them
        with self.naming_folder():
            if run.main and self.folder.is_dir():
                self.lock = lock(self.folder / "log.jsonl")
            self.start = self.done = self.saved = resume(self.folder / "last.pt", identity, model, optimizers)
        self.agree()
        self.groups = [group for o in optimizers for group in o.param_groups]  # after resuming, which makes new ones
        self.owned = [p for group in self.groups for p in group["params"]]
        learning = sum(p.requires_grad for p in model.parameters())
        assert len(self.owned) == len({id(p) for p in self.owned}), "a parameter belongs to two optimisers"
        assert len(self.owned) == learning, "a parameter belongs to no optimiser"
        self.bare, self.model = model, model
        if run.world > 1:
            self.model = nn.parallel.DistributedDataParallel(model, forward_sync_buffers=False)
        self.stopping, self.status, self.free_to_leave = False, 0, False

    @property
    def tracked(self):
        return getattr(self.c, "track", "none")

    @contextlib.contextmanager
    def naming_folder(self):
        """Raises BadInput, naming the flags, for what the disk says of the run's folder."""
        try:
            yield
        except OSError as e:
            flags = f"--out {self.c.out} --name {self.c.name}"
            raise BadInput(f"{flags}: no folder for the run ({e.filename or self.folder}: {e.strerror})") from None

    def agree(self):
        """End the run where processes would go different ways, each waiting for the others: another checkpoint, as on
        disks that not all nodes share, other data, other flags.
        """
        rhythm = ("log_every", "save_every", "keep_every", "eval_every", "max_steps", "epochs")
        mine = {"step": self.start} | self.identity | {name: getattr(self.c, name, None) for name in rhythm}
        first, *others = self.run.gather([mine])
        for rank, theirs in enumerate(others, start=1):
            differ = differences(first, theirs)
            if differ:
                why = "--out and the data must look the same on all nodes"
                self.run.fail(f"{self.folder}: process 0 of the run has {differ} as process {rank} has; {why}")

    def begin(self, steps, about, lines):
        """Write the log's header, and print `lines`."""
        self.steps, self.about = steps, about
        owed = False
        if self.run.main:
            with self.naming_folder():
                self.take_folder()
            logged = cut_log(self.folder / "log.jsonl", self.start)
            self.tracker = track.start(self.tracked, self.folder, self.c.name, logged)
            judged = any(line["step"] == self.start and self.what in line for line in logged)
            ended = self.start >= steps
            owed = bool(self.start and self.judgement) and (ended or (self.judges_at(self.start) and not judged))
            print("\n".join(lines), flush=True)
        self.owes_judgement = self.run.any(owed)
        self.log({"step": self.start, **about})

    def take_folder(self):
        """Make it, if need be, and make sure that no other run has it or had it since this one looked for last.pt."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.lock:
            self.lock = lock(self.folder / "log.jsonl")
            if (self.folder / "last.pt").exists():
                raise BadInput(f"{self.folder}: another run has begun there meanwhile")
        remove_stale(self.folder)

    def judges_at(self, step):
        return self.c.eval_every > 0 and step % self.c.eval_every == 0

    def keeps_at(self, step):
        return self.c.keep_every > 0 and step % self.c.keep_every == 0

    def __iter__(self):
        with self.catching_signals():
            if self.owes_judgement:
                self.judge()
            self.bare.train()
            self.clock, self.unchecked = Clock(), []
            bar = {"total": self.steps, "initial": self.start, "dynamic_ncols": True, "mininterval": 1}
            with Bar(**bar, disable=not self.run.main) as self.bar:  # closed before an error that ends the loop is said
                for step in range(self.start, self.steps):
                    self.done = step + 1
                    self.reporting = self.done % self.c.log_every == 0 or self.done == self.steps
                    yield step
                    if self.stopping:
                        break
            self.stopping = self.run.any(bool(self.stopping or self.run.asked_to_stop))
        if self.stopping:
            self.leave()

    def set_rate(self, share):
        """Every group's learning rate becomes this share of the one it began with."""
        for group in self.groups:
            group["lr"] = group["initial_lr"] * share

    @contextlib.contextmanager
    def sharing(self, last):
        """Processes average their gradients in the `last` backward pass of a step, not in those accumulated before."""
        alone = last or self.run.world == 1
        with contextlib.nullcontext() if alone else self.model.no_sync():
            yield
        if last and self.done == self.start + 1:
            assert all(p.grad is not None for p in self.owned), "a parameter that should learn got no gradient"

    def watch(self, loss, index):
        """Keep a pass's loss, to find out later, without waiting for the GPU, if it was finite. index: its frames."""
        self.unchecked.append((self.done, index, Number(loss)))

    def waiting(self, next_batch, step):
        """next_batch(step); the time that it takes is the log's data_ms. None if the run is to end before that step."""
        ahead = step == self.done  # for the next step: the one in hand can be finished and saved without it
        if ahead and self.run.asked_to_stop:
            return None
        try:
            with self.clock.waiting():
                return next_batch(step)
        except BadInput as e:
            if not ahead:
                raise
            self.run.broken = str(e)
            return None

    def stepped(self):
        """A step is done: what is due now? Ends the run, the last good checkpoint kept, where a loss or gradient is not
        finite.
        """
        c, last = self.c, self.done == self.steps
        self.clock.steps += 1
        self.bar.update()
        self.stopping = self.run.any(bool(self.run.asked_to_stop or self.run.broken or self.bar.unread))
        self.judging = bool(self.judgement) and (last or (self.judges_at(self.done) and not self.stopping))
        due = self.done % c.save_every == 0 or self.keeps_at(self.done)
        self.saving = due or last or self.stopping or self.judging
        self.end_unless_finite()

    def end_unless_finite(self):
        """The losses of the step before are known without waiting for the GPU. This step's must be before anything is
        written.
        """
        writes = self.reporting or self.saving or self.judging
        due = [entry for entry in self.unchecked if writes or entry[0] < self.done]
        self.unchecked = self.unchecked[len(due) :]
        sound = True
        if self.saving:  # a finite loss may have had a gradient that was not
            sound = bool(torch.stack([p.isfinite().all() for p in self.owned]).all())
        broken = []  # (step, name of a frame)
        for at, index, loss in due:
            if not (sound and math.isfinite(float(loss))):
                broken += [(at, self.names[i]) for i in index.tolist()]
        if self.run.any(bool(broken)):
            self.bar.close()
            broken = self.run.gather(broken)
            first = min(at for at, _ in broken)
            frames = ", ".join(sorted({name for _, name in broken}))
            kept = f"the last good checkpoint, if there is one, stays in {self.folder}/"
            self.run.fail(f"step {first}: the loss or its gradient is not finite; frames {frames}; {kept}")

    def report(self, epoch, stats):
        """A line of log.jsonl: a pass's stats, averaged over ranks, the rates, the times. -> the averaged stats."""
        stats = self.run.mean(stats)
        rates = {"lr": [group["lr"] for group in self.groups]}
        self.log({"step": self.done, "epoch": epoch, **stats, **rates, **self.clock.read(self.c.batch_size)})
        return stats

    def log(self, line):
        path = self.folder / "log.jsonl"
        if self.run.main:
            with disk_errors(path), path.open("a") as f:
                f.write(json.dumps(line) + "\n")
        if self.tracker:
            self.tracker.add(line)

    def judge(self):
        """A line of log.jsonl. The time that it takes is no step's."""
        # alone and with all that there is saved, nothing is lost by leaving in its middle
        self.free_to_leave = self.run.world == 1 and self.saved == self.done
        self.judged = self.judgement()
        self.free_to_leave = False
        self.log({"step": self.done, self.what: self.judged})
        self.bare.train()
        self.clock = Clock()

    def save(self, **more):
        """last.pt, with `more` in it, and every keep_every steps step_N.pt, the same file."""
        if self.run.main:
            state = {
                "model": self.bare.state_dict(),
                "optimizers": [o.state_dict() for o in self.optimizers],
                "step": self.done,
                "identity": self.identity,
            }
            last = self.folder / "last.pt"
            path = self.folder / f"step_{self.done}.pt" if self.keeps_at(self.done) else last
            save_atomically(state | self.about | more, path)
            if path != last:  # in this order: a run killed between them comes by here again
                link(path, last)
        self.saved = self.done

    def end(self):
        """After the run's pictures, which are shown where the run is."""
        if self.tracker:
            for path in sorted(self.folder.glob("*.png")):
                self.tracker.picture(path, self.done)
            self.tracker.close()

    # ---- asked to stop ----

    @contextlib.contextmanager
    def catching_signals(self):
        """SIGTERM, Ctrl-C and the loss of the terminal only ask the loop to leave when it is ready."""
        caught = [n for n in ASKING if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]  # nohup
        handlers = {number: signal.signal(number, self.asked) for number in caught}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def asked(self, number, _):
        """Ctrl-C again, seconds later, kills: somebody is impatient. At once it is the same one again, for torchrun
        passes it on to its own. Schedulers repeat SIGTERM before they kill, and a step may take longer than that.
        """
        now, before = time.monotonic(), self.run.asked_to_stop
        if number == signal.SIGINT and before and now > before[0] + IMPATIENT:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not before and number == signal.SIGINT:
            self.status = INTERRUPTED
        before.append(now)
        if self.free_to_leave:
            raise SystemExit(self.status)

    def leave(self):
        """After the save of a run that was asked to stop, or has to. Raises SystemExit unless that was by SIGTERM."""
        if self.tracker:
            self.tracker.close()
        saved = f"step {self.done} is saved, and the same command goes on from there"
        broken = self.run.gather([self.run.broken] if self.run.broken else [])
        if broken:
            self.run.fail(f"{broken[0]}; {saved}")
        if self.run.main:
            print(f"asked to stop: {saved}", flush=True)
        if self.bar.unread:
            raise SystemExit(NOBODY_READS)
        if self.status:
            raise SystemExit(self.status)


def inside(folder, name):
    """Is `name` that of a folder in the other folder?"""
    path = Path(name)
    return bool(folder and name.strip() and path.parts) and not path.is_absolute() and ".." not in path.parts
