"""A step on CPUs (step.cpp), compiled when it is first needed, which takes a second.

torch's operators multiply the few rows of a step at half the machine's speed where matrices are small, have none for
one query of each row over a short cache, and wait for each other a hundred times a step. Where there is no C++
compiler they draw all the same.
"""

from __future__ import annotations

import ctypes
import logging
import shutil
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from vce_ray.env import COMPILE

SOURCE = Path(__file__).with_name("step.cpp")
FLAGS = ("-O3", "-march=native", "-ffast-math", "-fopenmp", "-fPIC", "-std=c++17")
TIMEOUT_S = 60
log = logging.getLogger(__name__)


class CLayer(ctypes.Structure):
    """One layer, as step.cpp reads it."""

    _fields_ = [
        (name, ctypes.c_void_p) for name in ("before", "qkv", "out", "between", "gate_up", "down", "keys", "values")
    ]


class StepKernels:
    """The compiled functions, on contiguous float32 tensors in a CPU's memory; they run on torch's own threads."""

    def __init__(self, library: Path):
        loaded = ctypes.CDLL(str(library))
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        self._norm, self._attend, self._gumbel = loaded.vce_norm, loaded.vce_attend, loaded.vce_gumbel
        self._multiply, self._step = loaded.vce_multiply, loaded.vce_step
        self._norm.argtypes, self._norm.restype = [pointer] * 3 + [size] * 2 + [ctypes.c_float], None
        self._multiply.argtypes, self._multiply.restype = [pointer] * 4 + [size] * 3, None
        self._step.argtypes = [pointer, size, *[pointer] * 8, *[size] * 7, ctypes.c_float]
        self._step.restype = None
        self.seconds: Tensor | None = None
        """Where a float64 [3] is set, steps add to it what norms, products and attention took."""
        loaded.vce_panel.restype = size
        self.panel: int = loaded.vce_panel()
        """The rows of a packed matrix are a multiple of it."""
        self._attend.argtypes, self._attend.restype = [pointer] * 8 + [size] * 5, None
        self._gumbel.argtypes, self._gumbel.restype = [pointer] * 3 + [size] * 2, None

    def norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """RMSNorm over the last dimension of x [..., E]."""
        x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        width = x.shape[-1]
        self._norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // width, width, epsilon)
        return out

    def pack(self, *matrices: Tensor) -> Tensor:
        """A copy of matrices [out, in] of one size, as `multiply` and `step` read it: panels of rows, of several
        matrices in turns, each column by column: [panels, in, panel]."""
        panels = torch.stack([matrix.detach().unflatten(0, (-1, self.panel)) for matrix in matrices], dim=1)
        return panels.flatten(0, 1).transpose(1, 2).contiguous()

    def multiply(self, x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
        """Products [R, out] of x [R, in] with a packed matrix, with a bias added."""
        x, width = x.contiguous(), packed.shape[0] * packed.shape[2]
        out = x.new_empty(len(x), width)
        given = None if bias is None else bias.data_ptr()
        self._multiply(x.data_ptr(), packed.data_ptr(), given, out.data_ptr(), *x.shape, width)
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
        """All layers' work on one token of each row, and the last norm: hidden states [R, E].

        Args:
            layers: their packed weights, norms and caches.
            last, epsilon: of the last norm; all norms have this epsilon.
            place: cos_SD, sin_SD, slot_R, first_R, as `attend` takes them.
            cache_RKSD: one of these, for its shape; it may have more rows.
        """
        (held, key_heads, slots, width), rows = cache_RKSD.shape, len(embeds_RE)
        hidden = embeds_RE.clone(memory_format=torch.contiguous_format)
        needed = embeds_RE.shape[1] + 2 * (heads + key_heads) * width + feed_forward
        scratch = embeds_RE.new_empty(rows * needed)
        assert len(place[2]) == rows <= held and all(tensor.is_contiguous() for tensor in (*place, cache_RKSD))
        pointers = (tensor.data_ptr() for tensor in (last, hidden, scratch, *place))
        seconds = None if self.seconds is None else self.seconds.data_ptr()
        sizes = (rows, embeds_RE.shape[1], feed_forward, heads, key_heads, slots, width)
        self._step(layers, len(layers), *pointers, seconds, *sizes, epsilon)
        return hidden

    def attend(
        self,
        projected: Tensor,
        cos_SD: Tensor,
        sin_SD: Tensor,
        slot_R: Tensor,
        first_R: Tensor,
        keys_RKSD: Tensor,
        values_RKSD: Tensor,
    ) -> Tensor:
        """Attention of one query of each row, [R, H * D], over its slots up to `slot_R`, into which its own key and
        value are written first.

        Args:
            projected: queries, keys and values, not yet rotated: [R, (H + 2 K) * D].
            cos_SD, sin_SD: the rotary embedding by position, the sines with the sign of their half.
            slot_R, first_R: int64: the slot of each row's token, and the position of the row's slot 0.
        """
        rows, key_heads, slots, width = keys_RKSD.shape
        heads = projected.shape[-1] // width - 2 * key_heads
        out = projected.new_empty(rows, heads * width)
        tensors = (projected, cos_SD, sin_SD, slot_R, first_R, keys_RKSD, values_RKSD, out)
        assert all(tensor.is_contiguous() for tensor in tensors)
        self._attend(*(tensor.data_ptr() for tensor in tensors), rows, heads, key_heads, slots, width)
        return out

    def gumbel(self, seeds_N: Tensor, steps_N: Tensor, size: int) -> Tensor:
        """`noise.gumbel_noise` of each seed at its step, [N, size], without its eight temporaries of twice the size."""
        seeds_N, steps_N, out = seeds_N.contiguous(), steps_N.contiguous(), torch.empty(len(seeds_N), size)
        self._gumbel(*(tensor.data_ptr() for tensor in (seeds_N, steps_N, out)), *out.shape)
        return out


@cache
def step_kernels() -> StepKernels | None:
    """The kernels, or None where they are switched off, no compiler is there, or what it makes cannot be loaded."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None or not COMPILE.get():
        return None
    with TemporaryDirectory() as folder:
        made, library = str(Path(folder, "step.o")), Path(folder, "step.so")
        try:
            # linked apart, without -fopenmp and -ffast-math: the names are then found in the OpenMP that torch has
            # loaded, whose threads the kernels share, and the process keeps its handling of tiny numbers
            for line in ([*FLAGS, "-c", str(SOURCE), "-o", made], ["-shared", made, "-o", str(library)]):
                subprocess.run([compiler, *line], check=True, capture_output=True, text=True, timeout=TIMEOUT_S)
            return StepKernels(library)
        except subprocess.CalledProcessError as error:
            reason = error.stderr.strip()
        except (OSError, subprocess.TimeoutExpired) as error:
            reason = str(error)
    log.warning("drawing on this CPU goes without compiled kernels, at about half the speed: %s", reason)
    return None


def compiled_for(*tensors: Tensor) -> StepKernels | None:
    """The kernels, where all these tensors are of the kind that they read."""
    if all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors):
        return step_kernels()
    return None
