"""What a check is: a question about the machine, the store, the models or the cluster, and its answer in one line."""

from __future__ import annotations

from dataclasses import dataclass

from vce_ray.config import EMBEDDED


@dataclass(frozen=True)
class Asked:
    """What a run would use: its settings of the same names."""

    store: str = "runs"
    base: str = EMBEDDED
    judge: tuple[str, ...] = ()
    captioner: str | None = None
    refiner: str | None = None


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    name: str
    ok: bool
    """Whether a run can work."""
    found: str
    fix: str = ""
    """What to do, in one line; empty if nothing. If `ok`, this is a warning: a run works, but not as well."""

    @property
    def line(self) -> str:
        """The result in one line, as the command prints it."""
        state = "FIX" if not self.ok else "warn" if self.fix else "ok"
        return f"{state:<5} {self.name:<16} {self.found.rstrip('.')}" + (f". Fix: {self.fix}" if self.fix else "")
