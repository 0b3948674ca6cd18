"""Features of a stream of images, in batches of one fixed size.

Every batch has the same shape, the last one padded with blank images, because the kernels that a matrix product uses, and
so its last bits, depend on the batch size: an image's features must not depend on how many others came with it. They are
float32 on a GPU too: the router decides near-ties by them. Rejected: torch's `DataLoader`, for pieces that are in memory.

Shape letters: N images, n images of one piece, B batch, S side in pixels, D feature dim.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hardmoe.models.backbones import normalise_images
from hardmoe.training.staging import DeviceBatch

_WORTH_A_PASS = 16
"""Images that take as long, on a CPU, as what a pass costs whatever its batch is."""


def predict_features(
    backbone: nn.Module, images: Iterable[NDArray[np.uint8]], batch_size: int, device: torch.device
) -> Iterator[Tensor]:
    """Features of images in evaluation mode; the backbone's own mode is as before afterwards.

    Args:
        backbone: on `device` already; or the first stages of one, whose maps are then what is given.
        images: pieces uint8 [n, 3, S, S] of any n.
        batch_size: B, images per forward pass.
        device: where the backbone is.

    Yields:
        float32 [B, D] on the device; the last one may have fewer rows. Together one row per image, in order.
    """
    for features_BD in predict_batches(backbone, _on_device(_fixed_batches(images, batch_size), batch_size, device)):
        yield features_BD.float()


def batch_sizes(num_images: int, largest: int) -> list[int]:
    """Powers of two, one after the other, that hold so many images with few blanks among them.

    Few shapes are compiled, and a pass costs as much as some images: blanks are split off where they are more than that.

    Args:
        num_images: N.
        largest: a power of two that no batch exceeds.
    """
    sizes = [largest] * (num_images // largest)
    rest = num_images % largest
    while rest:
        holding = 1 << (rest - 1).bit_length()
        size = holding if holding - rest <= _WORTH_A_PASS else holding // 2
        sizes.append(size)
        rest -= min(size, rest)
    return sizes


def predict_batches(backbone: nn.Module, batches: Iterable[DeviceBatch]) -> Iterator[Tensor]:
    """Features of batches that are on the device already, all of one size.

    Yields:
        float [rows, D] on the device, of each batch's images without its blanks.
    """
    normalise = _Normaliser()
    for batch in batches:
        was_training = backbone.training
        backbone.eval()
        try:
            with torch.inference_mode(), _full_float32():
                features_BD = backbone(normalise(batch.images_B3SS))
        finally:
            backbone.train(was_training)
        yield features_BD[: batch.rows]


class _Normaliser:
    """Normalises batches of one size; on a CPU into memory that is used again, by pieces that its cache holds.

    A fresh 150 MB for every batch of 256 images at 224 pixels costs 85 ms of page faults and passes over memory instead of 14.
    """

    _PIECE = 1 << 18
    """Values; four bytes each."""

    def __init__(self) -> None:
        self._target_B3SS: Tensor | None = None

    def __call__(self, images_B3SS: Tensor) -> Tensor:
        if images_B3SS.device.type != "cpu":
            return normalised(images_B3SS)
        if self._target_B3SS is None:
            self._target_B3SS = torch.empty(images_B3SS.shape, memory_format=torch.channels_last)
        source = images_B3SS.permute(0, 2, 3, 1).reshape(-1)
        target = self._target_B3SS.permute(0, 2, 3, 1).view(-1)
        for start in range(0, len(source), self._PIECE):
            normalise_images(source[start : start + self._PIECE], target[start : start + self._PIECE])
        return self._target_B3SS


def _on_device(batches: Iterable[NDArray[np.uint8]], batch_size: int, device: torch.device) -> Iterator[DeviceBatch]:
    for images_B3SS in batches:
        rows = len(images_B3SS)
        if rows < batch_size:
            images_B3SS = np.concatenate([images_B3SS, np.zeros((batch_size - rows, *images_B3SS.shape[1:]), np.uint8)])
        yield DeviceBatch(move_images(torch.from_numpy(images_B3SS), device), rows)


def predict_from_maps(rest: nn.Module, maps_NCHW: Tensor, batch_size: int) -> Tensor:
    """What the rest of a network in evaluation mode makes of the maps of its first stages, in batches of one size.

    The bits are those of the whole network, whose batches are as large and in the same layout.

    Returns:
        float32 [N, D] on the maps' device.
    """
    found = []
    for start in range(0, len(maps_NCHW), batch_size):
        maps_BCHW = maps_NCHW[start : start + batch_size]
        rows = len(maps_BCHW)
        blank = torch.zeros(batch_size - rows, *maps_BCHW.shape[1:], device=maps_BCHW.device)
        with torch.inference_mode(), _full_float32():
            batch_BCHW = torch.cat([maps_BCHW, blank]).contiguous(memory_format=torch.channels_last)
            found.append(rest(batch_BCHW)[:rows].float())
    return torch.cat(found)


@contextmanager
def _full_float32() -> Iterator[None]:
    """TF32 off in convolutions, where torch has it on: with its ten bits a GPU and a CPU would route images apart."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


def device_images(images_B3SS: Tensor, device: torch.device) -> Tensor:
    """Move uint8 images to the device and normalise them there, in the layout in which convolutions are fastest."""
    return normalised(move_images(images_B3SS, device))


def move_images(images_B3SS: Tensor, device: torch.device) -> Tensor:
    """Move images to the device, without waiting for it."""
    if device.type == "cuda":
        # From pageable memory the copy would wait for the work already queued, and the next batch for the copy.
        images_B3SS = images_B3SS.pin_memory()
    return images_B3SS.to(device, non_blocking=True)


def normalised(images_B3SS: Tensor) -> Tensor:
    """Normalise uint8 images where they are, in the layout in which convolutions are fastest."""
    return normalise_images(images_B3SS.contiguous(memory_format=torch.channels_last))


def _fixed_batches(images: Iterable[NDArray[np.uint8]], batch_size: int) -> Iterator[NDArray[np.uint8]]:
    """Regroup pieces into batches of one size; the last may be smaller."""
    waiting: list[NDArray[np.uint8]] = []
    num_waiting = 0
    for piece in images:
        while len(piece):
            head, piece = piece[: batch_size - num_waiting], piece[batch_size - num_waiting :]
            waiting.append(head)
            num_waiting += len(head)
            if num_waiting == batch_size:
                yield np.concatenate(waiting)
                waiting, num_waiting = [], 0
    if waiting:
        yield np.concatenate(waiting)
