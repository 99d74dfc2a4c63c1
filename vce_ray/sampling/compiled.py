"""The sampling step on CPUs (step.cpp), compiled on first use, which takes a second.

torch's operators reach half of the machine's speed on the few rows of a step if the matrices are small, have no
attention for one query per row over a short cache, and synchronize their threads a hundred times per step. They are
the fallback on machines without a C++ compiler, with a warning.
"""

from __future__ import annotations

import ctypes
import logging
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from vce_ray.env import COMPILE

SOURCE = Path(__file__).with_name("step.cpp")
FLAGS = ("-O3", "-march=native", "-ffast-math", "-fopenmp", "-fPIC", "-std=c++17")
TIMEOUT_S = 60
SLOWER = (
    f"sampling on this CPU runs at about half the speed, without compiled kernels: %s ({COMPILE.name}=0 silences this)"
)
log = logging.getLogger(__name__)


class CLayer(ctypes.Structure):
    """One layer, as declared in step.cpp."""

    _fields_ = [
        (name, ctypes.c_void_p) for name in ("before", "qkv", "out", "between", "gate_up", "down", "keys", "values")
    ]


class StepKernels:
    """The compiled functions. They take contiguous float32 CPU tensors and run on torch's own threads."""

    def __init__(self, library: Path):
        loaded = ctypes.CDLL(str(library))
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        self._multiply, self._step, self._gumbel = loaded.vce_multiply, loaded.vce_step, loaded.vce_gumbel
        self._multiply.argtypes, self._multiply.restype = [pointer] * 4 + [size] * 3, None
        self._step.argtypes = [pointer, size, *[pointer] * 8, *[size] * 7, ctypes.c_float]
        self._step.restype = None
        self._gumbel.argtypes, self._gumbel.restype = [pointer] * 3 + [size] * 2, None
        self.seconds: Tensor | None = None
        """For profiling: if this is a float64 tensor [3], steps add their seconds in norms, products and attention."""
        loaded.vce_panel.restype = size
        self.panel: int = loaded.vce_panel()
        """The number of rows of a packed matrix must be a multiple of this."""

    def pack(self, *matrices: Tensor) -> Tensor:
        """Copy matrices [out, in] into the layout of `multiply` and `step`: [panels, in, panel].

        A panel is a block of rows, stored column by column. The panels of several matrices of one size alternate.
        """
        panels = torch.stack([matrix.detach().unflatten(0, (-1, self.panel)) for matrix in matrices], dim=1)
        return panels.flatten(0, 1).transpose(1, 2).contiguous()

    def multiply(self, x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply x [R, in] with a packed matrix and add a bias, if given: [R, out]."""
        x, width = x.contiguous(), packed.shape[0] * packed.shape[2]
        out = x.new_empty(len(x), width)
        bias_pointer = None if bias is None else bias.data_ptr()
        self._multiply(x.data_ptr(), packed.data_ptr(), bias_pointer, out.data_ptr(), *x.shape, width)
        return out

    def step(
        self,
        layers: ctypes.Array[CLayer],
        last: Tensor,
        epsilon: float,
        embeds_RE: Tensor,
        place: tuple[Tensor, Tensor, Tensor, Tensor],
        cache_RKSD: Tensor,
        heads: int,
        feed_forward: int,
    ) -> Tensor:
        """Run one token of each row through all layers and the last norm: hidden states [R, E].

        Each row attends to its slots up to and including the one its own key and value are written to.

        Args:
            layers: packed weights, norms and caches.
            last: weight of the last norm.
            epsilon: epsilon of all norms.
            embeds_RE: embeddings of the tokens.
            place: cosines and signed sines of the rotary embedding by position, [S, D] each, then int64 [R] each: the
                slot of each row's token, and the position of each row's slot 0.
            cache_RKSD: keys of one layer, read for their shape only; they may have more rows than the step.
            heads: query heads, H.
            feed_forward: width of the feed-forward, F.
        """
        (cache_rows, key_heads, slots, width), rows = cache_RKSD.shape, len(embeds_RE)
        hidden = embeds_RE.clone(memory_format=torch.contiguous_format)
        scratch_width = embeds_RE.shape[1] + 2 * (heads + key_heads) * width + feed_forward
        scratch = embeds_RE.new_empty(rows * scratch_width)
        assert len(place[2]) == rows <= cache_rows and all(tensor.is_contiguous() for tensor in (*place, cache_RKSD))
        pointers = (tensor.data_ptr() for tensor in (last, hidden, scratch, *place))
        seconds = None if self.seconds is None else self.seconds.data_ptr()
        sizes = (rows, embeds_RE.shape[1], feed_forward, heads, key_heads, slots, width)
        self._step(layers, len(layers), *pointers, seconds, *sizes, epsilon)
        return hidden

    def gumbel(self, seeds_N: Tensor, steps_N: Tensor, size: int) -> Tensor:
        """Return `noise.gumbel_noise`, [N, size], without its eight temporaries of twice that size."""
        seeds_N, steps_N, out = seeds_N.contiguous(), steps_N.contiguous(), torch.empty(len(seeds_N), size)
        self._gumbel(*(tensor.data_ptr() for tensor in (seeds_N, steps_N, out)), *out.shape)
        return out


def step_kernels() -> StepKernels | None:
    """Return the kernels, compiled once per process; None if VCE_RAY_COMPILE is 0 or they cannot be compiled."""
    return _compile_once() if COMPILE.get() else None


@cache
def _compile_once() -> StepKernels | None:
    return compile_kernels()


def compile_kernels(flags: Sequence[str] = FLAGS) -> StepKernels | None:
    """Compile and load step.cpp for this machine.

    Returns None, with a warning in the log, if there is no compiler, if it fails, or if its output cannot be loaded.
    """
    if find_compiler() is None:
        log.warning(SLOWER, "there is no C++ compiler on PATH; install one (apt-get install g++) and start again")
        return None
    try:
        return build_kernels(flags)
    except CompileError as error:
        log.warning(SLOWER, error)
        return None


class CompileError(Exception):
    """The compiler failed, or its output cannot be loaded. The message is the compiler's."""


def find_compiler() -> str | None:
    """Return the path of the C++ compiler, or None if there is none."""
    return shutil.which("c++") or shutil.which("g++")


def build_kernels(flags: Sequence[str] = FLAGS) -> StepKernels:
    """Compile and load step.cpp for this machine, which has a compiler. Raises CompileError if that fails."""
    compiler = find_compiler()
    assert compiler is not None, "callers ask find_compiler first"
    try:
        with TemporaryDirectory() as folder:
            compiled, library = str(Path(folder, "step.o")), Path(folder, "step.so")
            # Linked in a step of its own, without -fopenmp and -ffast-math. The OpenMP symbols then resolve to the
            # runtime that torch has loaded, so both share one thread pool, and the library does not switch the whole
            # process to flushing denormal numbers to zero, as linking with -ffast-math does.
            for arguments in ([*flags, "-c", str(SOURCE), "-o", compiled], ["-shared", compiled, "-o", str(library)]):
                subprocess.run([compiler, *arguments], check=True, capture_output=True, text=True, timeout=TIMEOUT_S)
            return StepKernels(library)
    except subprocess.CalledProcessError as error:
        raise CompileError(error.stderr.strip()) from error
    except (OSError, subprocess.TimeoutExpired) as error:  # OSError: also no temporary folder
        raise CompileError(str(error)) from error
