"""The run that may be killed at any moment and goes on from its last checkpoint to the same numbers.

`Loop` does what is around a training step: it counts, checks, logs, saves, judges, stops and resumes. The step itself,
forward, backward and optimisers, stands in the script. `stream` loads batches ahead in processes of their own.
"""

import contextlib
import json
import math
import os
import signal
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from files import BadInput, disk_errors, read_checkpoint, read_log, save_atomically, writing
from runtime import differences

IMPATIENT = 3  # seconds after a signal from when on another one kills: one that comes at once is the same one again
WORKER_LEAVES = (
    10  # seconds after a SIGTERM that a loading process lives on, so that its parent gets the batch it waits for
)


# -----------------------------------------------------------------------------
# batches


def stream(dataset, batches, collate, workers, run):
    """Batches of a data set, loaded ahead by `workers` processes. Raises the BadInput that stands in a batch's
    place.
    """
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=leave_signals_to_parent,
        pin_memory=run.device.type == "cuda",
        prefetch_factor=4 if workers else None,
    )
    for batch in loader:
        if isinstance(batch, BadInput):
            raise batch
        yield batch


def leave_signals_to_parent(_):
    """For loading processes. Ctrl-C and a scheduler's SIGTERM reach every process, and the parent still wants its
    batch.

    But SIGTERM is also how Python ends loading processes that are left over at its exit, and then it waits for them.
    So they leave, some seconds later.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_LEAVES))


def catch_signals():
    """From now on SIGTERM and Ctrl-C only fill the list returned, for the loop to leave when it is ready.

    One that comes seconds later kills. One that comes at once is the same one again: a scheduler signals every process,
    and torchrun passes it on to its own.
    """
    caught = []

    def handler(number, _):
        if caught and time.monotonic() > caught[0] + IMPATIENT:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        caught.append(time.monotonic())

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)
    return caught


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


def cut_log(path, step):
    """Leave only the lines up to `step` of a log.jsonl, none for step 0. -> those lines.

    A killed run has written past its checkpoint.
    """
    kept = [line for line in read_log(path) if line["step"] <= step and step]
    with writing(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
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


# -----------------------------------------------------------------------------
# the loop


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
            if loop.saving: loop.save(...)              # before judging, which a broken file may end
            if loop.judging: loop.judge()               # loop.judged: what it last found

    c has the fields out, name, log_every, save_every, eval_every, batch_size. identity: what must be as it was on
    resuming. names: of the frames, for messages; a batch says under "index" which it holds. judgement() -> figures,
    logged as `what`, if there is anything to judge on; a run killed while it judged does so when it is started again,
    and so does a finished one. loop.model is the model as it is to be called: on several processes it also averages
    gradients.
    """

    def __init__(self, c, run, model, optimizers, identity, names, what="", judgement=None):
        self.c, self.run, self.optimizers, self.identity, self.names = c, run, optimizers, identity, names
        self.what, self.judgement, self.judged = what, judgement, None
        self.folder = Path(c.out) / c.name
        self.start = self.done = resume(self.folder / "last.pt", identity, model, optimizers)
        self.groups = [group for o in optimizers for group in o.param_groups]  # after resuming, which makes new ones
        self.owned = [p for group in self.groups for p in group["params"]]
        assert len(self.owned) == len({id(p) for p in self.owned}), "a parameter belongs to two optimisers"
        assert len(self.owned) == sum(p.requires_grad for p in model.parameters()), (
            "a parameter belongs to no optimiser"
        )
        if run.any(self.start > 0) and not self.start:
            raise BadInput(
                f"{self.folder}/last.pt: some processes see it and some do not; --out must be on a disk that all nodes share"
            )
        self.bare, self.model = model, model
        if run.world > 1:
            self.model = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)

    def begin(self, steps, about, lines):
        """Write the log's header, and print `lines`."""
        self.steps, self.about = steps, about
        owed = False
        if self.run.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            logged = cut_log(self.folder / "log.jsonl", self.start)
            judged = any(line["step"] == self.start and self.what in line for line in logged)
            ended = self.start >= steps
            owed = bool(self.start and self.judgement) and (ended or (self.judges_at(self.start) and not judged))
            print("\n".join(lines), flush=True)
        self.owes_judgement = self.run.any(owed)
        self.log({"step": self.start, **about})
        self.asked_to_stop, self.stopping = catch_signals(), False

    def judges_at(self, step):
        return self.c.eval_every > 0 and step % self.c.eval_every == 0

    def __iter__(self):
        if self.owes_judgement:
            self.judge()
        self.bare.train()
        self.clock, self.unchecked = Clock(), []
        self.bar = tqdm(
            total=self.steps, initial=self.start, disable=not self.run.main, dynamic_ncols=True, mininterval=1
        )
        with self.bar:  # closed before an error that ends the loop is said
            for step in range(self.start, self.steps):
                self.done = step + 1
                self.reporting = self.done % self.c.log_every == 0 or self.done == self.steps
                yield step
                if self.stopping:
                    break

    def set_rate(self, share):
        """Every group's learning rate becomes this share of the one it began with."""
        for group in self.groups:
            group["lr"] = group["initial_lr"] * share

    @contextlib.contextmanager
    def sharing(self, last):
        """Processes average their gradients in the `last` backward pass of a step, not in those accumulated before."""
        with contextlib.nullcontext() if last or self.run.world == 1 else self.model.no_sync():
            yield
        if last and self.done == self.start + 1:
            assert all(p.grad is not None for p in self.owned), "a parameter that should learn got no gradient"

    def watch(self, loss, index):
        """Keep a pass's loss, to find out later, without waiting for the GPU, whether it was finite. index: its
        frames.
        """
        self.unchecked.append((self.done, index, Number(loss)))

    def waiting(self, next_batch, step):
        """next_batch(step); the time that it takes is the log's data_ms."""
        with self.clock.waiting():
            return next_batch(step)

    def stepped(self):
        """A step is done: what is due now? Ends the run, the last good checkpoint kept, where a loss or gradient is not
        finite.
        """
        c, last = self.c, self.done == self.steps
        self.clock.steps += 1
        self.bar.update()
        self.stopping = self.run.any(bool(self.asked_to_stop))
        self.saving = self.done % c.save_every == 0 or last or self.stopping
        self.judging = bool(self.judgement) and (last or (self.judges_at(self.done) and not self.stopping))
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

    def judge(self):
        """A line of log.jsonl. The time that it takes is no step's."""
        self.judged = self.judgement()
        self.log({"step": self.done, self.what: self.judged})
        self.bare.train()
        self.clock = Clock()

    def save(self, **more):
        """last.pt, with `more` in it."""
        if self.run.main:
            state = {
                "model": self.bare.state_dict(),
                "optimizers": [o.state_dict() for o in self.optimizers],
                "step": self.done,
                "identity": self.identity,
            }
            save_atomically(state | self.about | more, self.folder / "last.pt")
