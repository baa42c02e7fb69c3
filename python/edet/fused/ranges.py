"""What a calibration finds: the range of each map, by histograms of the maps themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

#: How a range is taken from a histogram.
METHODS = ("mse", "percentile", "minmax")

_BINS = 256
_COUNTED = 1 << 14  # values of a row of one batch that go into a histogram, at most
_SHRINKS = 24  # of either end of a range, tried by ``mse``


@dataclass
class Int8:
    """How a part of a network is computed on bytes.

    Attributes:
        ranges: name of a map to (2, channels or 1) float32: its lowest and highest values.
        means: name of a map to (channels,) float32: each channel's mean.
        keep: names in the part that stay in float.
    """

    ranges: dict[str, Tensor]
    means: dict[str, Tensor]
    keep: tuple[str, ...] = ()


@dataclass
class Observer:
    """Histograms of maps, each channel's own or one for the map.

    Maps are seen twice: first for the ends of the histograms, then to be counted.

    Attributes:
        ends: (2, channels): the lowest and highest values seen.
        counts: (channels, bins).
        sums, seen: (channels,) the sum of the means of the maps seen, and the number of maps.
    """

    ends: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)
    counting: bool = False

    def see(self, name: str, x: Tensor, per_channel: bool) -> None:
        """Takes note of the map (N, C, H, W), finite."""
        rows = x.detach().float().transpose(0, 1).reshape(x.shape[1] if per_channel else 1, -1)
        if not self.counting:
            self.sums[name] = self.sums.get(name, 0) + x.detach().double().mean((0, 2, 3))
            self.seen[name] = self.seen.get(name, 0) + 1
            ends = torch.stack([rows.amin(1), rows.amax(1)])
            known = self.ends.get(name, ends)
            ends[0].clamp_(max=0.0), ends[1].clamp_(min=0.0)  # 0 is always in the range
            self.ends[name] = torch.stack(
                [torch.minimum(known[0], ends[0]), torch.maximum(known[1], ends[1])]
            )
            return
        rows = rows[:, :: -(-rows.shape[1] // _COUNTED)]
        low, high = self.ends[name]
        width = (high - low).clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        index = ((rows - low[:, None]) / width * _BINS).long().clamp_(0, _BINS - 1)
        index += torch.arange(len(rows), device=x.device)[:, None] * _BINS
        counts = torch.bincount(index.flatten(), minlength=len(rows) * _BINS).view(len(rows), _BINS)
        self.counts[name] = self.counts.get(name, 0) + counts

    def means(self) -> dict[str, Tensor]:
        """The mean of each channel of each map."""
        return {name: (total / self.seen[name]).float() for name, total in self.sums.items()}

    def ranges(self, method: str, percentile: float) -> dict[str, Tensor]:
        """The range of each map by ``method``."""
        return {
            name: found_range(ends, self.counts[name].double(), method, percentile)
            for name, ends in self.ends.items()
        }


def found_range(ends: Tensor, counts: Tensor, method: str, percentile: float) -> Tensor:
    """(2, channels) of histograms (channels, bins) between ``ends`` (2, channels).

    ``percentile`` cuts off what is beyond it at either end, of the values that are not 0; ``mse``
    makes the mean squared error of the rounded values least, over shrunken upper and then lower
    ends.
    """
    if method == "minmax":
        return ends
    low, high = ends.double()
    places = (torch.arange(_BINS, dtype=torch.float64) + 0.5) / _BINS
    values = low[:, None] + (high - low)[:, None] * places
    if method == "percentile":
        # what an activation makes 0 does not count: a channel that is seldom not 0 keeps its range
        width = (high - low).clamp(min=torch.finfo(torch.float64).tiny)
        at = (-low / width * _BINS).long().clamp(0, _BINS - 1)
        others = counts.scatter(1, at[:, None], 0)
        counts = torch.where(others.sum(1, keepdim=True) > 0, others, counts)
        share = counts.cumsum(1) / counts.sum(1, keepdim=True).clamp(min=1)
        width = (high - low) / _BINS
        top = (share >= percentile / 100).double().argmax(1)
        bottom = (share > 1 - percentile / 100).double().argmax(1)
        cut = torch.stack([low + bottom * width, low + (top + 1) * width])
        cut = torch.stack([cut[0].clamp(max=0.0), cut[1].clamp(min=0.0)])
        return cut.float()
    shrinks = torch.linspace(1.0, 0.15, _SHRINKS, dtype=torch.float64)
    high = _least_error(values, counts, low, high, shrinks, upper=True)
    low = _least_error(values, counts, low, high, shrinks, upper=False)
    return torch.stack([low, high]).float()


def _least_error(
    values: Tensor, counts: Tensor, low: Tensor, high: Tensor, shrinks: Tensor, *, upper: bool
) -> Tensor:
    """One end of the ranges, times that one of ``shrinks`` that makes the error least."""
    best, error = (high if upper else low).clone(), torch.full_like(low, float("inf"))
    for shrink in shrinks:
        bottom, top = (low, high * shrink) if upper else (low * shrink, high)
        step = (top - bottom) / 255
        beyond = (values - torch.minimum(torch.maximum(values, bottom[:, None]), top[:, None])) ** 2
        inside = (beyond == 0).double() * step[:, None] ** 2 / 12
        total = ((beyond + inside) * counts).sum(1)
        better = total < error
        error = torch.where(better, total, error)
        best = torch.where(better, top if upper else bottom, best)
    return best


@dataclass(frozen=True)
class Steps:
    """A range as bytes: ``scale`` of a byte and the byte ``zero`` of 0, (channels,) float64.

    ``one`` is both as numbers, of the first channel: of a map with one range.
    """

    scale: Tensor
    zero: Tensor
    one: tuple[float, int]

    @staticmethod
    def of(ends: Tensor) -> Steps:
        """The steps of a range (2, channels)."""
        low, high = ends.double()
        scale = (high - low) / 255
        # a channel that was always 0 must not take the range of the weights that read it
        used = scale[scale > 0]
        scale = torch.where(scale > 0, scale, used.min() if len(used) else 1.0)
        zero = (-low / scale).round().clamp(0, 255)
        return Steps(scale, zero, (float(scale[0]), int(zero[0])))

    def wide(self, channels: int) -> Steps:
        """The same for each of the channels."""
        return Steps(self.scale.expand(channels), self.zero.expand(channels), self.one)


def rounded_weight(weight: Tensor, most: int = 127) -> tuple[Tensor, Tensor]:
    """A weight (outputs, …) as whole numbers of −most … most, and each output's scale, float64."""
    flat = weight.double().flatten(1)
    scale = flat.abs().amax(1) / most
    scale = torch.where(scale > 0, scale, 1.0)
    shape = (-1, *[1] * (weight.dim() - 1))
    return (weight.double() / scale.view(shape)).round().clamp(-most, most), scale


def signal_to_noise(exact: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """10·log₁₀ of the mean square of ``exact`` over that of the difference, in decibels."""
    signal = sum(x.double().square().sum().item() for x in exact)
    noise = sum((x - y).double().square().sum().item() for x, y in zip(exact, found, strict=True))
    if noise == 0 or signal == 0:
        return math.inf if noise == 0 else -math.inf
    return 10 * math.log10(signal / noise)
