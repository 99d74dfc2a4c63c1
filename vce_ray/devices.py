"""What a model runs on: limits of GPUs by data sheet, and what their compute capability allows. Plain figures.

Units: bytes, bytes/s, floating-point operations/s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vce_ray.errors import UserError

RESERVE = 0.06
"""Share of the memory left to the device's runtime and to whatever grows beside what is planned."""
Capability = tuple[int, int]
"""NVIDIA's compute capability, major and minor."""
NEEDED_CAPABILITY: dict[str, Capability] = {"bfloat16": (8, 0), "fp8": (8, 9)}
"""Compute capability that Triton's kernels need for a dtype: PTX has `.bf16` from sm_80 and `.e4m3` from sm_89."""


@dataclass(frozen=True)
class Device:
    """Limits of a device for models of one dtype."""

    name: str
    memory: float
    bandwidth: float
    arithmetic: float
    """Speed of dense matrix products in the dtype of the weights."""
    packs: bool = False
    """Whether float32 matrices read by a step are held a second time, in the layout of the compiled step."""
    kind: Literal["sheet", "gpu", "cpu"] = "cpu"
    """Where the limits are from: a GPU's data sheet, a measured GPU or a measured CPU."""
    capability: Capability | None = None
    """None for CPUs, which compute in every dtype."""

    @property
    def usable(self) -> float:
        """Memory that can be planned with."""
        return self.memory * (1 - RESERVE)

    def supports(self, *dtypes: str) -> bool:
        """Return whether sampling works in all of these dtypes of weights and cache."""
        needed = (NEEDED_CAPABILITY.get(dtype, (0, 0)) for dtype in dtypes)
        return self.capability is None or all(self.capability >= capability for capability in needed)


@dataclass(frozen=True)
class Card:
    """A GPU with the figures of its data sheet."""

    name: str
    memory: float
    bandwidth: float
    half: float
    """Dense matrix products in float16, and in bfloat16 if it has that, accumulated in float32, without sparsity."""
    single: float
    """Matrix products in float32, without TF32, which nothing here enables."""
    capability: Capability

    def device(self, dtype: str) -> Device:
        """Return the limits for weights of a dtype."""
        arithmetic = self.single if dtype == "float32" else self.half
        return Device(self.name, self.memory, self.bandwidth, arithmetic, kind="sheet", capability=self.capability)


CARDS = {
    card.name: card
    for card in (
        Card("b200", 180e9, 8.0e12, 2250e12, 80e12, (10, 0)),  # DGX B200 data sheet, an eighth; Blackwell brief (HGX)
        Card("h200", 141e9, 4.8e12, 989e12, 67e12, (9, 0)),  # H200 data sheet, SXM
        Card("h100", 80e9, 3.35e12, 989e12, 67e12, (9, 0)),  # H100 data sheet, SXM
        Card("a100-80gb", 80e9, 2.04e12, 312e12, 19.5e12, (8, 0)),  # A100 data sheet, SXM
        Card("a100-40gb", 40e9, 1.56e12, 312e12, 19.5e12, (8, 0)),  # A100 data sheet, SXM
        Card("l40s", 48e9, 0.864e12, 362e12, 91.6e12, (8, 9)),  # L40S data sheet
        Card("rtx4090", 24e9, 1.01e12, 165e12, 82.6e12, (8, 9)),  # Ada architecture white paper, appendix A
        Card("a10g", 24e9, 0.6e12, 70e12, 35e12, (8, 6)),  # A10G data sheet (AWS G5): half the A10's tensor cores
        Card("l4", 24e9, 0.3e12, 121e12, 30.3e12, (8, 9)),  # L4 data sheet: 242 with sparsity
        Card("t4", 16e9, 0.32e12, 65e12, 8.1e12, (7, 5)),  # T4 data sheet; float16 only
    )
}
"""GPUs that can be planned for by name, the largest first."""


def check_dtype(device: Device, dtype: str, use: str, fix: str) -> None:
    """Check that a device can compute in a dtype.

    Args:
        use: what is in this dtype, for the message.
        fix: what to do instead.

    Raises:
        UserError: it is a GPU of a lower compute capability than the dtype needs.
    """
    if device.capability is None or device.supports(dtype):
        return
    able = [name for name, card in CARDS.items() if card.device(dtype).supports(dtype)]
    raise UserError(
        f"{use} in {dtype} needs a GPU of compute capability {version(NEEDED_CAPABILITY[dtype])} or more "
        f"({', '.join(able)}), and {device.name} has {version(device.capability)}: {fix}"
    )


def version(capability: Capability) -> str:
    """Format a compute capability, such as 8.9."""
    return f"{capability[0]}.{capability[1]}"
