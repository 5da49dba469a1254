"""Times of the spectral penalty's kernels on a CUDA device, by tile configuration.

    PYTHONPATH=kernels python -m benchmarks.spectral_tiles [--sweep] [--out FILE]

Prints, for each network and rank, the time of gram, solve and grad, the share of copy bandwidth that gram and
grad reach, and the whole step with and without a CUDA graph. With --sweep it tries other tiles for gram and
grad; the winners belong into `mooring_kernels.spectral.plan.TILES`. Bandwidth is what a device-to-device copy
of 1 GiB moves in the same run. A configuration whose norms differ from the float64 path is not timed.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from mooring_kernels.arena import ArenaLayout, LayerShape
from mooring_kernels.spectral import add_gradient_, launch, penalty, plan
from torch import Tensor

NETWORKS: dict[str, list[tuple[int, int, int]]] = {
    "SD1.5": [
        (320, 320, 30),
        (320, 768, 10),
        (640, 640, 30),
        (640, 768, 10),
        (1280, 1280, 36),
        (1280, 768, 12),
    ],
    "SDXL": [(640, 640, 60), (640, 2048, 20), (1280, 1280, 360), (1280, 2048, 120)],
    "FLUX": [(3072, 3072, 266)],
}
"""(out, in, number of layers) of the attention projections."""
CASES = [("SD1.5", 16), ("SDXL", 4), ("SDXL", 16), ("SDXL", 64), ("SDXL", 128), ("FLUX", 16), ("FLUX", 64)]
TOLERANCE = 1e-4
"""Relative, of σ². A warm-started solve (rank 128) is not held to it at its first call."""
SWEEP_WARPS = (2, 4, 8)
SWEEP_BLOCKS = (32, 64, 128, 256)


def network(name: str, rank: int, dtype: torch.dtype) -> tuple[ArenaLayout, Tensor]:
    """A network's arena with a plausible spread of singular values, `[1, size]` on the device."""
    shapes = [(o, i) for o, i, n in NETWORKS[name] for _ in range(n)]
    layout = ArenaLayout([LayerShape(f"l{k}", o, i) for k, (o, i) in enumerate(shapes)], rank)
    flat = torch.randn(1, layout.size, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    decay = 0.9 ** torch.arange(rank, device="cuda")
    for _, b in layout.views(flat).values():
        b.mul_(decay)
    return layout, flat.to(dtype)


def milliseconds(run: Callable[[], object], repeats: int = 20) -> float:
    """Median time of a call, after warming up, by CUDA events."""
    for _ in range(3):
        run()
    times: list[float] = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[repeats // 2]


def graphed(run: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph: device time without the host's."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * (1 << 30) / milliseconds(lambda: target.copy_(source)) * 1e3


class Bench:
    """One network at one rank and storage."""

    def __init__(self, name: str, rank: int, dtype: torch.dtype, bandwidth: float) -> None:
        self.layout, self.flat = network(name, rank, dtype)
        self.grad = torch.zeros_like(self.flat)
        self.slots = torch.zeros(1, dtype=torch.int32, device="cuda")
        self.strength = torch.ones(1, device="cuda")
        self.bandwidth = bandwidth
        self.bytes = self.flat.numel() * self.flat.element_size()
        self.exact = penalty(self.layout, self.flat[0].double(), backend="torch")
        self.rank = rank

    def measure(self, part: str) -> dict[str, float]:
        """Time of one kernel (or `step`) in µs with the tiles now in force."""
        made = plan.Plan(self.layout, self.flat.device, 1)
        norms = torch.empty(2, 1, len(self.layout.layers), device="cuda")

        def gram() -> None:
            launch.gram(made, self.flat, self.slots)

        def solve() -> None:
            launch.solve(made, norms[0], norms[1])

        def grad() -> None:
            launch.grad(
                made,
                self.flat,
                self.grad,
                self.slots,
                self.slots,
                kind="spectral",
                strength=self.strength,
                weights=made.ones,
                rate=made.ones,
                scale=1e-6,
            )

        gram()
        for _ in range(20 if self.rank > 64 else 1):
            solve()
        error = float((norms[0, 0].double() / self.exact.sigma2 - 1.0).abs().max())
        if error > TOLERANCE:
            return {"error": error}
        found = {"error": error}
        for name, run, passes in (("gram", gram, 1), ("solve", solve, 0), ("grad", grad, 3)):
            if part in {name, "step"}:
                time = milliseconds(graphed(run)) * 1e3
                found[name] = time
                if passes:
                    found[f"{name}_share"] = passes * self.bytes / (time * 1e-6) / self.bandwidth
        if part == "step":

            def step() -> None:
                add_gradient_(self.layout, self.flat, self.grad, self.strength, slots=self.slots)

            found["eager"] = milliseconds(step) * 1e3
            found["graph"] = milliseconds(graphed(step)) * 1e3
        return found


def variants(part: str, tiles: plan.Tiles) -> Iterator[plan.Tiles]:
    """Other tiles for one kernel."""
    chunks = sorted({tiles.chunk, tiles.chunk // 2, tiles.chunk * 2})
    for warps, block, chunk in itertools.product(SWEEP_WARPS, SWEEP_BLOCKS, chunks):
        if part == "grad":
            yield replace(tiles, grad_warps=warps, grad_block=block, chunk=chunk)
        else:
            for precision in ("ieee", "tf32x3"):
                yield replace(
                    tiles, gram_warps=warps, gram_block=block, chunk=chunk, gram_precision=precision
                )


def sweep(bench: Bench, part: str) -> list[dict[str, Any]]:
    """All variants of one kernel, the fastest first."""
    padded = plan.padded_rank(bench.rank)
    shipped = plan.TILES[padded]
    rows: list[dict[str, Any]] = []
    for tiles in variants(part, shipped):
        plan.TILES[padded] = tiles
        try:
            found = bench.measure(part)
        except (triton.runtime.errors.OutOfResources, RuntimeError) as error:
            found = {"error": float("nan")}
            print(f"  {tiles}: {type(error).__name__}")
        if part in found:
            rows.append({"tiles": repr(tiles), **found})
    plan.TILES[padded] = shipped
    rows.sort(key=lambda row: row[part])
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--cases", default="", help="such as SDXL:16,SDXL:64; all when absent")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s (read and write)")
    report: list[dict[str, Any]] = []
    wanted = options.cases.split(",") if options.cases else []
    for name, rank in CASES:
        if wanted and f"{name}:{rank}" not in wanted:
            continue
        for dtype in (torch.float32, torch.bfloat16) if options.bf16 else (torch.float32,):
            bench = Bench(name, rank, dtype, bandwidth)
            found = bench.measure("step")
            row = {"network": name, "rank": rank, "dtype": str(dtype), "MB": bench.bytes / 1e6, **found}
            report.append(row)
            print({k: round(v, 3) if isinstance(v, float) and k != "error" else v for k, v in row.items()})
            for part in ("gram", "grad") if options.sweep else ():
                best = sweep(bench, part)
                report.append(
                    {"network": name, "rank": rank, "dtype": str(dtype), "sweep": part, "rows": best}
                )
                for line in best[:6]:
                    print(f"  {part} {line[part]:8.1f} µs {line['tiles']}")
    if options.out:
        options.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
