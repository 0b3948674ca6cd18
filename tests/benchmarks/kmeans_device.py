"""How fast a pass of k-means is on a GPU, beside how fast its memory can be copied.

    python tests/benchmarks/kmeans_device.py [--device cuda] [--rows 100000000] [--dim 128] [--clusters 32]
    python tests/benchmarks/kmeans_device.py --rows 50000000 --dim 256 --streamed

A pass assigns every row exactly, measures its distance, and leaves the exact sums on the host, with the farthest points. Features
are blobs of length 1, in float16 unless `--float32`. Printed are seconds per pass, the bytes of the features over them, and the
ratio of that to the device's own copies (bytes read and written) or, streamed, to copies from pinned memory, both measured in
the same run; then where a pass's time goes, and whether some of the rows come out as on the CPU, bit for bit. `--plain` does
without the Triton kernel, `--tune` times it in several shapes. Without a GPU it runs on the CPU, on few rows, to show that it
runs.
"""

import argparse
import datetime
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from hardmoe.neighbours.assignment import assign
from hardmoe.neighbours.torch_engine import TorchEngine, full_float32
from hardmoe.partitioning import device_kernel
from hardmoe.partitioning.device_features import Piece, Placed, Streamed, place, scan_pieces
from hardmoe.partitioning.device_pass import DevicePass, scan_on
from hardmoe.partitioning.device_tiles import DeviceCentroids
from hardmoe.partitioning.exact_sums import ClusterSums
from hardmoe.partitioning.kmeans import PassSums, update

_CHUNK = 2**20
_COPIED = {"cuda": 2**32, "cpu": 2**26}
_CHECKED = 100_000


def main() -> None:
    """Print one block of lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--clusters", type=int, default=32)
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--streamed", action="store_true")
    parser.add_argument("--float32", action="store_true")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--tune", action="store_true")
    options = parser.parse_args()
    device = torch.device(options.device)
    rows = options.rows or (100_000_000 if device.type == "cuda" else 50_000)
    if options.plain:
        device_kernel.suits = lambda centroids: False
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {name}, torch {torch.__version__}", flush=True)
    features_ND = blobs(rows, options, device)
    ids_N16 = np.zeros((rows, 16), np.uint8)
    ids_N16.view(np.int64)[:, 0] = np.arange(rows)
    placed: Placed = (Streamed if options.streamed else place)(features_ND, ids_N16, device)
    centroids_KD = features_ND[: options.clusters].float().cpu().numpy()
    centroids_KD = measure(placed, centroids_KD, features_ND.nbytes, options, device)
    parts(next(iter(placed.pieces())), centroids_KD, device)
    if options.tune:
        tune(features_ND, centroids_KD, device)
    check(features_ND[:_CHECKED], centroids_KD, device)


def blobs(rows: int, options: argparse.Namespace, device: torch.device) -> torch.Tensor:
    """Unit features around half as many centres again as clusters, made on the device; in pinned memory where streamed."""
    generator = torch.Generator(device).manual_seed(0)
    dtype, streamed = torch.float32 if options.float32 else torch.float16, options.streamed
    centres = torch.randn((options.clusters * 3 // 2, options.dim), generator=generator, device=device)
    where = {"pin_memory": device.type == "cuda"} if streamed else {"device": device}
    features_ND = torch.empty((rows, options.dim), dtype=dtype, **where)
    for start in range(0, rows, _CHUNK):
        count = min(_CHUNK, rows - start)
        chosen = torch.randint(0, len(centres), (count,), generator=generator, device=device)
        chunk = centres[chosen] + 0.9 * torch.randn((count, options.dim), generator=generator, device=device)
        features_ND[start : start + count].copy_(torch.nn.functional.normalize(chunk))
    return features_ND


def measure(
    placed: Placed, centroids_KD: NDArray[np.float32], size: int, options: argparse.Namespace, device: torch.device
) -> NDArray[np.float32]:
    """Time passes, each against the means of the one before; the first compiles and does not count."""
    seconds, capacity = [], min(options.clusters, 64)
    for _ in range(options.passes + 1):
        began = time.perf_counter()
        found = PassSums(*scan_pieces(placed.pieces(), centroids_KD, device, capacity))
        seconds.append(time.perf_counter() - began)
        centroids_KD = update(found, centroids_KD).centroids_KD
    one = statistics.median(seconds[1:])
    copy = copy_bandwidth(device, pinned=options.streamed)
    kind = "pinned-to-device copy" if options.streamed else "device copy"
    print(
        f"{found.sums.num_rows:,} x {options.dim} {'float32' if options.float32 else 'float16'}, K = {options.clusters}, "
        f"{'streamed' if options.streamed else 'resident'}: {one:.4f} s a pass ({min(seconds[1:]):.4f} to "
        f"{max(seconds[1:]):.4f}; the first {seconds[0]:.2f}), {size / one / 1e9:.1f} GB/s of features; "
        f"{kind} {copy / 1e9:.1f} GB/s, ratio {size / one / copy:.3f}; objective {found.sums.objective:.6g}",
        flush=True,
    )
    return centroids_KD


def copy_bandwidth(device: torch.device, pinned: bool) -> float:
    """Bytes a second that a copy moves: within the device both those read and those written, from pinned memory those read."""
    size = _COPIED.get(device.type, _COPIED["cpu"])
    target = torch.empty(size, dtype=torch.uint8, device=device)
    source = torch.ones(size, dtype=torch.uint8, pin_memory=device.type == "cuda") if pinned else torch.ones_like(target)
    return (1 if pinned else 2) * size / timed(lambda: target.copy_(source, non_blocking=True), device)


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds, the median of five after one that does not count."""
    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def parts(piece: Piece, centroids_KD: NDArray[np.float32], device: torch.device) -> None:
    """Where the time of a pass over one piece goes (all rows, where they are resident)."""
    features_CD, _ = piece
    centroids, this_pass = DeviceCentroids.of(centroids_KD, device), DevicePass(centroids_KD, device)
    taken = timed(lambda: this_pass.take(features_CD), device)
    whole = timed(lambda: scan_pieces([piece], centroids_KD, device, min(len(centroids_KD), 64)), device)
    told = f"of {len(features_CD):,} rows in {whole:.4f} s: assigned and summed {taken:.4f} s"
    if device_kernel.suits(centroids) and device_kernel.works(device, *centroids_KD.shape, features_CD.dtype):
        kernel = device_kernel.Kernel(centroids)
        alone = timed(lambda: kernel.run(features_CD), device)
        again = int((kernel.run(features_CD).primary_N < 0).sum())
        told += f", of which the kernel {alone:.4f} s ({again:,} rows, {again / len(features_CD):.2%}, searched again in float64)"
    with full_float32(device.type):
        wide_CD = features_CD[:_CHUNK].float()
        product = timed(lambda: wide_CD @ centroids.by_precision[torch.float32][0].T, device) * len(features_CD) / len(wide_CD)
    print(f"{told}; a float32 product of as many rows alone {product:.4f} s", flush=True)


def tune(features_ND: torch.Tensor, centroids_KD: NDArray[np.float32], device: torch.device) -> None:
    """Time the kernel with other blocks and warps, on as many rows as one piece has."""
    from triton.runtime.errors import OutOfResources

    kernel, rows_CD = device_kernel.Kernel(DeviceCentroids.of(centroids_KD, device)), features_ND[: 2**24].to(device)
    for shape in ([16, 4], [32, 4], [32, 8], [64, 4], [64, 8], [128, 4], [128, 8], [128, 16]):
        device_kernel._SHAPE[:] = shape
        try:
            seconds = timed(lambda: kernel.run(rows_CD), device)
        except OutOfResources as error:
            print(f"  blocks of {shape[0]}, {shape[1]} warps: {error}", flush=True)
            continue
        print(f"  blocks of {shape[0]}, {shape[1]} warps: {seconds:.4f} s, {rows_CD.nbytes / seconds / 1e9:.0f} GB/s", flush=True)
    device_kernel._SHAPE[:] = [64, 8]


def check(features_CD: torch.Tensor, centroids_KD: NDArray[np.float32], device: torch.device) -> None:
    """Hold some rows against the CPU path."""
    given_CD = features_CD.cpu().numpy()
    found, sums = scan_on(device, given_CD, centroids_KD)
    expected = assign(given_CD.astype(np.float32), centroids_KD, TorchEngine("cpu"))
    expected_sums = ClusterSums.from_batch(given_CD.astype(np.float32), expected, len(centroids_KD))
    same = (
        np.array_equal(found.primary_N, expected.primary_N)
        and found.squared_distance_N.tobytes() == expected.squared_distance_N.tobytes()
        and all(array.tobytes() == expected_sums.to_arrays()[name].tobytes() for name, array in sums.to_arrays().items())
    )
    print(f"{len(given_CD):,} rows come out as on the CPU, to the bit: {'yes' if same else 'NO'}")
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
