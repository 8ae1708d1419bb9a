"""How bench.py measures: sides of a row in turns, stages of a step, memory kept and memory moved; and its tables."""

import contextlib
import json
import math
import statistics
import time
from collections import Counter
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ops_triton as ops
from files import disk_errors

# -----------------------------------------------------------------------------
# tables

WIDTHS = {  # at least, in characters; else the column's name decides
    "op": 22, "shape": 30, "ours, ms": 15, "peer": 17, "peer, ms": 15, "ratio": 5, "same": 5,
    "stage": 22, "ms": 15, "share": 6, "saved, MB": 9,
    "kernel": 26, "type": 8, "blocks": 9,
}  # fmt: skip


class Table:
    """Rows of cells {column: text}, printed as they come; other columns than the last row's begin a new table."""

    def __init__(self):
        self.columns = None

    def print(self, cells):
        widths = [max(len(name), WIDTHS.get(name, 0)) for name in cells]
        if list(cells) != self.columns:
            self.columns = list(cells)
            print("\n" + self.line(self.columns, widths))
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
        print(self.line(cells.values(), widths), flush=True)

    def line(self, texts, widths):
        return "| " + " | ".join(f"{text:{width}}" for text, width in zip(texts, widths)) + " |"


def number(x):
    return f"{x:.0f}" if x >= 99.5 else f"{x:.3g}"


def spread(runs):
    return f"{number(statistics.median(runs))} ({number(min(runs))})"


# -----------------------------------------------------------------------------
# what is measured: time, memory kept, memory moved


def stamp(clock):
    """This moment: seconds of the clock; without one an event on the GPU's stream, which nobody waits for."""
    if clock:
        return clock()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(start, end):
    """Between two stamps; events must have happened."""
    if isinstance(start, float):
        return 1e3 * (end - start)
    return start.elapsed_time(end)


class Timeline:
    """The stages of one step. They nest; time belongs to the innermost. Nothing waits for a GPU before `read`."""

    def __init__(self, clock):
        self.clock, self.stage, self.marks = clock, "", []

    def enter(self, stage):
        self.stage = stage
        self.marks.append((stage, stamp(self.clock)))

    def timed(self, stage, function):
        """The function as a stage. A function that it returns, to be called later, belongs to the stage, too."""

        def wrapped(*args):
            outer = self.stage
            self.enter(stage)
            result = function(*args)
            self.enter(outer)
            return self.timed(stage, result) if callable(result) else result

        return wrapped

    @contextlib.contextmanager
    def watch(self, stages):
        """Stages inside a model's forward, told from outside: {stage: [(owner, name of a function), ...]}."""
        with contextlib.ExitStack() as patches:
            for stage, functions in stages.items():
                for owner, name in functions:
                    patches.enter_context(patch.object(owner, name, self.timed(stage, getattr(owner, name))))
            yield

    def read(self):
        """Milliseconds by stage, a Counter."""
        total = Counter()
        for (stage, start), (_, end) in zip(self.marks, self.marks[1:]):
            total[stage] += milliseconds(start, end)
        return total


@contextlib.contextmanager
def saved_for_backward(weights, stage=lambda: "all"):
    """Yields a Counter: bytes kept for the backward pass, by the stage that saved them; each storage once."""
    seen = {p.untyped_storage().data_ptr() for p in weights}
    size = Counter()

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            size[stage()] += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield size


class Traffic(TorchDispatchMode):
    """Counts, in `bytes` by stage, what operations read and write: each operand and each result once, whole.

    Views and allocations are free. Batch norm and convolution's backward pass read some operands twice, a gather reads
    only a part of one. On a CPU, where they are numpy's and scipy's, the point operations are not seen.
    """

    FREE = ("aten::_unsafe_view", "aten::empty", "aten::new_empty")  # besides the views that say so
    # operations that do not read their first operand
    UNREAD = ("aten::copy_", "aten::fill_", "aten::zero_", "aten::new_")
    UNREAD += ("aten::zeros_like", "aten::ones_like", "aten::full_like")

    def __init__(self, stage):
        super().__init__()
        self.stage, self.bytes = stage, Counter()

    def count(self, values):
        for t in values:
            if isinstance(t, torch.Tensor):
                elements = math.prod(size for size, stride in zip(t.shape, t.stride()) if stride)
                self.bytes[self.stage()] += t.itemsize * elements

    def touched(self, function, args, kwargs, result):
        """What an operation reads, writes in place, and makes."""
        schema = function._schema
        values = [*args, *(kwargs.get(argument.name) for argument in schema.arguments[len(args) :])]
        given = list(zip(schema.arguments, values))
        read = [value for argument, value in given if not argument.is_out]
        if function.name().startswith(self.UNREAD):
            read = read[1:]
        written = [value for argument, value in given if argument.alias_info and argument.alias_info.is_write]
        results = result if len(schema.returns) > 1 else [result]
        made = [value for returned, value in zip(schema.returns, results) if not returned.alias_info]
        return read, written, made

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if not function.is_view and not function.name().startswith(self.FREE):
            self.count(tree_leaves(self.touched(function, args, kwargs, result)))
        return result

    def __enter__(self):
        launch = ops._launch  # kernels are no operations of torch's

        def counted_launch(kernel, grid, *args, **meta):
            self.count(args)
            launch(kernel, grid, *args, **meta)

        self.kernels = patch.object(ops, "_launch", counted_launch)
        self.kernels.start()
        return super().__enter__()

    def __exit__(self, *error):
        self.kernels.stop()
        return super().__exit__(*error)


# -----------------------------------------------------------------------------
# ours beside the peers


class Meter:
    """Measures the sides of a row, prints the row, and keeps it in `lines`, as it goes to --json.

    A side is a function of the dtype that activations should have. clock: a CPU's, of seconds; a GPU has its own.
    """

    def __init__(self, device, repeats, clock=time.perf_counter):
        self.device, self.repeats = device, repeats
        self.cuda = device.type == "cuda"
        self.clock = None if self.cuda else clock
        self.dtype = torch.bfloat16 if self.cuda else torch.float32  # of activations while the clock runs
        self.clock_runs = False  # until it does, peers must give the same results
        self.weights = []  # which autograd saves, too, but which are there anyway
        self.table, self.lines = Table(), []

    def autocast(self, dtype):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)

    def trained(self, function, x, weights=()):
        """Forward and backward of function(x), as a side of a row."""
        inputs = {d: x.detach().to(d).requires_grad_(x.requires_grad) for d in (torch.float32, self.dtype)}

        def side(dtype):
            with self.autocast(dtype):
                out = function(inputs[dtype])
            wanted = [t for t in (inputs[dtype], *weights) if t.requires_grad]
            return out.detach(), *torch.autograd.grad(out, wanted, out.detach())

        return side

    def time(self, function, *args):
        """-> milliseconds; on a GPU also the MB that the allocator had to add, else None."""
        if self.cuda:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        start = stamp(self.clock)
        function(*args)
        end = stamp(self.clock)
        if not self.cuda:
            return milliseconds(start, end), None
        torch.cuda.synchronize()
        return milliseconds(start, end), (torch.cuda.max_memory_allocated() - before) / 1e6

    def copy_gb_per_s(self):
        """What a copy far larger than the caches reads and writes: the memory's roofline."""
        source = torch.zeros(2**30 if self.cuda else 2**27, dtype=torch.uint8, device=self.device)
        target = torch.zeros_like(source)
        fastest = min(self.time(target.copy_, source)[0] for _ in range(10))
        return 2 * len(source) / fastest / 1e6

    def first_runs(self, side):
        """One run in float32 and one to warm up. -> the first one's results, MB that the second one saved."""
        self.clock_runs = False
        results = side(torch.float32)
        self.clock_runs = True
        with saved_for_backward(self.weights) as size:
            side(self.dtype)
        return results, size.total() / 1e6

    def compare(self, op, shape, ours, peers, differ, limit):
        """One row for each of the peers, {name: side}, that fits into memory. -> {"ours" or a peer: its figures}.

        differ(ours, peer) is the error between two sides' results, of which more than `limit` is a wrong answer.
        """
        sides, results, figures = {}, {}, {}
        for name, side in {"ours": ours, **peers}.items():
            try:
                results[name], saved = self.first_runs(side)
            except torch.OutOfMemoryError:
                if name == "ours":
                    raise
                print(f"\n{op}, {shape}, {name}: out of memory", flush=True)
                continue
            sides[name], figures[name] = side, {"runs": [], "saved_mb": saved}
        names = list(sides)
        for i in range(self.repeats):
            for name in reversed(names) if i % 2 else names:
                ms, peak = self.time(sides[name], self.dtype)
                figures[name]["runs"].append(ms)
                if self.cuda:
                    figures[name]["peak_mb"] = peak
        for peer in names[1:]:
            error = differ(results["ours"], results[peer])
            row = {"op": op, "shape": shape, "peer": peer, "error": error, "same": error <= limit}
            self.add(row, figures["ours"], figures[peer])
        return figures

    def add(self, row, ours, peer):
        """A row of `compare`, with two sides' figures and what follows from them: printed and kept."""
        for role, figures in (("ours", ours), ("peer", peer)):
            row |= {f"{role}_{key}": figure for key, figure in figures.items()}
            row[f"{role}_ms"] = statistics.median(figures["runs"])
            row[f"{role}_min_ms"] = min(figures["runs"])
        row["ratio"] = row["peer_ms"] / row["ours_ms"]
        self.lines.append(row)

        cells = {"op": row["op"], "shape": row["shape"], "ours, ms": spread(ours["runs"]), "peer": row["peer"]}
        cells |= {"peer, ms": spread(peer["runs"]), "ratio": number(row["ratio"])}
        for kind in ("saved", "peak") if self.cuda else ("saved",):
            a, b = ours[f"{kind}_mb"], peer[f"{kind}_mb"]
            cells[f"{kind}, MB: ours / peer"] = f"{number(a)} / {number(b)}" if a else ""
        error = f"{row['error']:.0e}" if row["error"] else "exact"
        cells["same"] = error if row["same"] else f"NO: {error}"
        self.table.print(cells)

    def write(self, path):
        """The rows so far, one JSON object a line."""
        with disk_errors(path):
            path.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
