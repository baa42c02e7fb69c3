"""Weight layouts: convolution weights to the layout the kernels read, and back.

Both layouts are the same for every instruction set and device, so that weights are packed once,
with plain tensor operations, and a packed tensor can be moved or saved like any other.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

#: Output channels in one panel of a packed pointwise weight (one AVX-512 register of floats).
PANEL = 16


def pack_depthwise(weight: Tensor) -> Tensor:
    """Packs a depthwise weight (C, 1, k, k) as (k·k, C): one contiguous row of channels per tap.

    Raises:
        ValueError: ``weight`` is not (C, 1, k, k).
    """
    if weight.dim() != 4 or weight.shape[1] != 1 or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"dw_weight must be (C, 1, k, k), got {tuple(weight.shape)}")
    return weight.flatten(1).t().contiguous()


def unpack_depthwise(packed: Tensor) -> Tensor:
    """Inverse of :func:`pack_depthwise`: (k·k, C) to (C, 1, k, k)."""
    k = round(packed.shape[0] ** 0.5) if packed.dim() == 2 else 0
    if packed.dim() != 2 or k * k != packed.shape[0]:
        raise ValueError(f"packed must be (k·k, C), got {tuple(packed.shape)}")
    channels = packed.shape[1]
    return packed.t().reshape(channels, 1, k, k)


def pack_pointwise(weight: Tensor) -> Tensor:
    """Packs a pointwise weight (C_out, C_in, 1, 1) as (⌈C_out/16⌉, C_in, 16), zero padded.

    Raises:
        ValueError: ``weight`` is not (C_out, C_in, 1, 1).
    """
    if weight.dim() != 4 or weight.shape[2:] != (1, 1):
        raise ValueError(f"pw_weight must be (C_out, C_in, 1, 1), got {tuple(weight.shape)}")
    c_out, c_in = weight.shape[:2]
    padded = F.pad(weight.flatten(1), (0, 0, 0, -c_out % PANEL))
    return padded.view(-1, PANEL, c_in).transpose(1, 2).contiguous()


def unpack_pointwise(packed: Tensor, out_channels: int) -> Tensor:
    """Inverse of :func:`pack_pointwise`: (⌈C_out/16⌉, C_in, 16) to (C_out, C_in, 1, 1)."""
    if packed.dim() != 3 or packed.shape[2] != PANEL:
        raise ValueError(f"packed must be (⌈C_out/16⌉, C_in, 16), got {tuple(packed.shape)}")
    if -(-out_channels // PANEL) != packed.shape[0]:
        most = packed.shape[0] * PANEL
        raise ValueError(
            f"out_channels must be {most - PANEL + 1} to {most} for {packed.shape[0]} panels, "
            f"got {out_channels}"
        )
    c_in = packed.shape[1]
    return packed.transpose(1, 2).reshape(-1, c_in)[:out_channels, :, None, None]


def pack_stem(weight: Tensor) -> Tensor:
    """Packs a stem weight (C_out, 3, 3, 3) as (⌈C_out/16⌉, 27, 16), inputs in the order y, x, c.

    Raises:
        ValueError: ``weight`` is not (C_out, 3, 3, 3).
    """
    if weight.dim() != 4 or weight.shape[1:] != (3, 3, 3):
        raise ValueError(f"weight must be (C_out, 3, 3, 3), got {tuple(weight.shape)}")
    return pack_pointwise(weight.permute(0, 2, 3, 1).reshape(-1, 27, 1, 1))


def unpack_stem(packed: Tensor, out_channels: int) -> Tensor:
    """Inverse of :func:`pack_stem`: (⌈C_out/16⌉, 27, 16) to (C_out, 3, 3, 3)."""
    if packed.dim() != 3 or packed.shape[1] != 27:
        raise ValueError(f"packed must be (⌈C_out/16⌉, 27, 16), got {tuple(packed.shape)}")
    return unpack_pointwise(packed, out_channels).reshape(-1, 3, 3, 3).permute(0, 3, 1, 2)


def as_packed_depthwise(weight: Tensor) -> Tensor:
    """``weight`` as (k·k, C), packing it when it is a convolution weight."""
    return pack_depthwise(weight) if weight.dim() == 4 else weight


def as_packed_pointwise(weight: Tensor) -> Tensor:
    """``weight`` as (⌈C_out/16⌉, C_in, 16), packing it when it is a convolution weight."""
    return pack_pointwise(weight) if weight.dim() == 4 else weight


def pack_pointwise_int8(weight: Tensor) -> Tensor:
    """Packs an int8 pointwise weight (C_out, C_in, 1, 1) as (⌈C_out/16⌉, ⌈C_in/4⌉, 16, 4).

    Four input channels lie side by side, which one instruction multiplies and adds; zero padded.

    Raises:
        ValueError: ``weight`` is not (C_out, C_in, 1, 1).
    """
    if weight.dim() != 4 or weight.shape[2:] != (1, 1):
        raise ValueError(f"pw_weight must be (C_out, C_in, 1, 1), got {tuple(weight.shape)}")
    c_out, c_in = weight.shape[:2]
    padded = F.pad(weight.flatten(1), (0, -c_in % 4, 0, -c_out % PANEL))
    return padded.view(-1, PANEL, padded.shape[1] // 4, 4).transpose(1, 2).contiguous()


def unpack_pointwise_int8(packed: Tensor, out_channels: int, in_channels: int) -> Tensor:
    """Inverse of :func:`pack_pointwise_int8`: back to (C_out, C_in, 1, 1)."""
    rows = packed.transpose(1, 2).reshape(packed.shape[0] * PANEL, -1)
    return rows[:out_channels, :in_channels, None, None]


def pack_depthwise_int8(weight: Tensor) -> Tensor:
    """Packs an int8 depthwise weight (C, 1, k, k) as (k, C, 4) for k = 3, (k, C, 8) for k = 5.

    The rows of a column of taps lie side by side, zero padded: one instruction, or two, multiplies
    and adds them.

    Raises:
        ValueError: ``weight`` is not (C, 1, 3, 3) or (C, 1, 5, 5).
    """
    if weight.dim() != 4 or weight.shape[1:] not in ((1, 3, 3), (1, 5, 5)):
        raise ValueError(f"dw_weight must be (C, 1, 3 or 5, same), got {tuple(weight.shape)}")
    columns = weight[:, 0].permute(2, 0, 1)  # (column, C, row)
    return F.pad(columns, (0, -weight.shape[-1] % 4)).contiguous()


def unpack_depthwise_int8(packed: Tensor) -> Tensor:
    """Inverse of :func:`pack_depthwise_int8`: back to (C, 1, k, k)."""
    k = packed.shape[0]
    return packed[..., :k].permute(1, 2, 0)[:, None].contiguous()


__all__ = [
    "PANEL",
    "as_packed_depthwise",
    "as_packed_pointwise",
    "pack_depthwise",
    "pack_depthwise_int8",
    "pack_pointwise",
    "pack_pointwise_int8",
    "pack_stem",
    "unpack_depthwise",
    "unpack_depthwise_int8",
    "unpack_pointwise",
    "unpack_pointwise_int8",
    "unpack_stem",
]
