"""The one exception a user should ever see, and the checks that raise it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class TidalError(ValueError):
    """Something asked of TidalDecode cannot be done.

    The message names what was expected, what was found and what to do about it.
    """


class ShortOfMemoryError(TidalError):
    """A device has too little memory for what was asked; the model is usable as before."""


class UncalibratedWarning(UserWarning):
    """Selection layers come from a fallback, because nobody calibrated the model."""


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int | None, ...],
    *,
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    """Raise `TidalError` unless ``tensor`` has this shape (``None``: any size), dtype and device."""
    if not hasattr(tensor, "dtype") or not hasattr(tensor, "dim"):
        raise TidalError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    expected = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
    fits = tensor.dim() == len(shape) and all(
        want is None or want == got for want, got in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        raise TidalError(f"{name}: expected shape {expected}, got {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TidalError(
            f"{name}: expected dtype {names}, got {str(tensor.dtype).removeprefix('torch.')}"
        )
    if tensor.device != device:
        raise TidalError(f"{name}: expected device {device} (that of q), got {tensor.device}")
