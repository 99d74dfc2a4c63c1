"""What lies between the matrix products of a step on CPUs (step.cpp), compiled when it is first needed.

torch has no operator for one query of each row over a short cache, and takes six for an RMSNorm; these take half a
second to compile and read the cache two to four times as fast. Where there is no C++ compiler, torch's operators do.
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


class StepKernels:
    """The compiled functions, on contiguous float32 tensors in a CPU's memory; they run on torch's own threads."""

    def __init__(self, library: Path):
        loaded = ctypes.CDLL(str(library))
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        self._norm, self._gate, self._attend = loaded.vce_norm, loaded.vce_gate, loaded.vce_attend
        self._gumbel = loaded.vce_gumbel
        self._norm.argtypes, self._norm.restype = [pointer] * 3 + [size] * 2 + [ctypes.c_float], None
        self._gate.argtypes, self._gate.restype = [pointer] * 2 + [size] * 2, None
        self._attend.argtypes, self._attend.restype = [pointer] * 8 + [size] * 5, None
        self._gumbel.argtypes, self._gumbel.restype = [pointer] * 3 + [size] * 3, None

    def norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """RMSNorm over the last dimension of x [..., E]."""
        x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        width = x.shape[-1]
        self._norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // width, width, epsilon)
        return out

    def gate(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up, of gates and what they gate joined in the last dimension [..., 2 F]: [..., F]."""
        width = gate_up.shape[-1] // 2
        out = gate_up.new_empty(*gate_up.shape[:-1], width)
        assert gate_up.is_contiguous()
        self._gate(gate_up.data_ptr(), out.data_ptr(), out.numel() // width, width)
        return out

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

    def gumbel(self, seeds_B: Tensor, steps_N: Tensor, size: int) -> Tensor:
        """`noise.gumbel_noise` of these steps, [N, B, size], without its eight temporaries of twice the size."""
        out = torch.empty(len(steps_N), len(seeds_B), size)
        assert seeds_B.is_contiguous() and steps_N.is_contiguous()
        tensors = (seeds_B, steps_N, out)
        self._gumbel(*(tensor.data_ptr() for tensor in tensors), len(steps_N), len(seeds_B), size)
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
    log.warning("drawing on this CPU goes without compiled kernels, at about two thirds of the speed: %s", reason)
    return None


def compiled_for(*tensors: Tensor) -> StepKernels | None:
    """The kernels, where all these tensors are of the kind that they read."""
    if all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors):
        return step_kernels()
    return None
