"""What became of each part of an accelerated model, as a table."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Part:
    """One backbone, BiFPN or head of a model, and what became of it.

    Attributes:
        name: of the module in the model.
        kind: its class.
        reason: why it was left alone; empty when it was replaced.
        difference: largest difference of the fused result from a float64 one on the sample input,
            as a fraction of the largest value; None when it was not computed.
        own_difference: the same of the module's own layers.
        own_ms, fused_ms: median times; None when they were not measured.
    """

    name: str
    kind: str
    reason: str = ""
    difference: float | None = None
    own_difference: float | None = None
    own_ms: float | None = None
    fused_ms: float | None = None

    @property
    def replaced(self) -> bool:
        """Whether the part runs on fused ops now."""
        return not self.reason


@dataclass(frozen=True)
class Report:
    """What :func:`accelerate` did; prints as a table.

    Attributes:
        parts: every backbone, BiFPN and head that was found.
        own_ms, fused_ms: median times of the whole network on the sample input.
        sample: what the sample input was, in words.
    """

    parts: list[Part]
    own_ms: float | None = None
    fused_ms: float | None = None
    sample: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def replaced(self) -> list[str]:
        """Names of the modules that run on fused ops now."""
        return [part.name for part in self.parts if part.replaced]

    @property
    def largest_difference(self) -> float:
        """Of all replaced parts, as a fraction of a part's largest value."""
        return max((p.difference or 0.0 for p in self.parts if p.replaced), default=0.0)

    @property
    def gain(self) -> float | None:
        """How many times faster the whole network became; None when it was not measured."""
        return self.own_ms / self.fused_ms if self.own_ms and self.fused_ms else None

    def __str__(self) -> str:
        rows = [["part", "class", "", "before, ms", "after, ms", "gain", "difference"]]
        whole = Part("whole network", "", own_ms=self.own_ms, fused_ms=self.fused_ms)
        for part in [*self.parts, whole] if self.gain else self.parts:
            own, fused = part.own_ms, part.fused_ms
            times = ["", "", ""]
            if own is not None and fused is not None:
                times = [f"{own:.2f}", f"{fused:.2f}", f"{own / fused:.1f}x"]
            done = "" if part is whole else "replaced" if part.replaced else "left alone"
            error = "" if part.difference is None else f"{part.difference:.0e}"
            rows.append([part.name, part.kind, done, *times, error])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(w) if i < 3 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        lines += [f"{p.name} was left alone: {p.reason}" for p in self.parts if p.reason]
        lines += [f"Sample input: {self.sample}."] if self.sample else []
        return "\n".join([*lines, *self.notes])
