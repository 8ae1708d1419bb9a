"""What the compiler makes of every Triton kernel, on a laptop as on a GPU: they are compiled for Hopper (sm_90) and not
run.

    python kernels.py                            # seconds; needs Triton, but no GPU, no driver and no data

After a change to a kernel, before any time on a GPU: does it compile, how many registers does a thread need, does it
spill, how many warps can a multiprocessor hold. `fused` counts fused multiply-adds in the machine code: they round once
where torch rounds twice, and the sampling kernels' promise of equal indices everywhere holds only without them. What
runs fast is for `bench.py` on a GPU to say.
"""

import functools
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from unittest.mock import patch

import torch
import tyro

import encoders
import ops_triton as ops
import runtime
from bench import Table
from data import BadInput

if ops.triton:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction


@dataclass
class Sizes:
    samples: int = 8
    """Frames in the batch, each in two views."""
    num_points: int = 16384
    places: int = 1024


class Hopper:
    """As much of a driver as Triton's compiler asks for."""

    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)


def compile_all(o):
    """-> [(kernel's name, type of activations, its constants, compiled kernel)] of the launches of a pre-training step,
    forward and backward, in bfloat16 and float32. The operations are called as ever, but on tensors that have no
    memory.
    """
    launched, run = [], JITFunction.run
    tensor = functools.partial(torch.empty, device="meta")

    def compile_only(kernel, *args, grid, warmup, **meta):
        half = any(isinstance(t, torch.Tensor) and t.dtype == torch.bfloat16 for t in args)
        launched.append((kernel.__name__, "bfloat16" if half else "float32", meta, run(kernel, *args, grid=grid, warmup=True, **meta)))

    B, P = 2 * o.samples, o.places
    with patch.object(JITFunction, "run", compile_only), patch.object(ops, "_use_triton", lambda *_: True):
        for n, m in ((o.num_points, 4 * P), (3 * P // 2, P // 2)):
            ops.furthest_point_sample(tensor(B, n, 3), m)
        ops.furthest_point_sample_features(tensor(B, 4 * P, 3), tensor(B, 4 * P, encoders.AGGREGATION[0]), P)
        for n, m, radii, neighbours, mlps in zip((o.num_points, 4 * P, 2 * P), (4 * P, 2 * P, P), encoders.RADII, encoders.NEIGHBOURS, encoders.MLPS):
            for radius, k, (*_, width) in zip(radii, neighbours, mlps):
                idx = ops.ball_query(tensor(B, n, 3), tensor(B, m, 3), radius, k)
                for dtype in (torch.bfloat16, torch.float32):
                    ops.gather_max(tensor(B, n, width, dtype=dtype, requires_grad=True), idx).sum().backward()
        for dtype in (torch.bfloat16, torch.float32):
            feature_map = tensor(o.samples, 2048, 12, 39, dtype=dtype, requires_grad=True, memory_format=torch.channels_last)
            ops.bilinear_sample(feature_map, tensor(o.samples, P, 2)).sum().backward()
    return launched


def machine_code(kernel):
    """-> a thread's registers, its bytes in memory for want of registers, the kernel's fused multiply-adds:
    cuobjdump's, from Triton's package.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        said = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{what}:(\d+)", said)[1]) for what in ("REG", "STACK"))
    return registers, stack, len(re.findall(r"\bFFMA\b", said))


def report(o):
    if ops.triton is None:
        raise BadInput("Triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise BadInput("TRITON_INTERPRET=1: kernels would be interpreted, not compiled")
    triton.runtime.driver.set_active(Hopper())
    print(f"python kernels.py {' '.join(sys.argv[1:])}\ntriton {triton.__version__} for sm_90; {o.samples} frames, {o.num_points} points, {o.places} places")
    try:
        launched = compile_all(o)
    except ValueError as error:  # an operation's, about the sizes
        raise BadInput(str(error)) from None
    table, rows = Table({"kernel": 26, "type": 8, "blocks": 9}), []
    for name, activations, constants, kernel in launched:
        registers, stack, fused = machine_code(kernel)
        warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
        # a multiprocessor has 64 K registers, given to warps by the 256; 228 KB of shared memory, 1 KB of each
        # program's lost; 64 warps, 32 programs
        programs = min(65536 // (warps * -(-registers * 32 // 256) * 256), 228 * 1024 // (shared + 1024), 64 // warps, 32)
        blocks = " ".join(str(v) for constant, v in constants.items() if constant.isupper() and not isinstance(v, bool))
        row = {"kernel": name.strip("_"), "type": activations, "blocks": blocks, "warps": warps, "registers": registers, "stack, bytes": stack}
        row |= {"shared, bytes": shared, "resident warps": f"{warps * programs} of 64", "fused": fused}
        if row not in rows:
            rows.append(row)
            table.print({column: str(cell) for column, cell in row.items()})


def main():
    runtime.command_line(lambda: tyro.cli(Sizes), report)


if __name__ == "__main__":
    main()
