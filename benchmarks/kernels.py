"""What do the kernels save? `python -m benchmarks.kernels [--device cuda]`.

1. The spectral penalty of a whole network, value and gradient: ours against other ways in PyTorch; on CUDA
   also the bandwidth of its two streaming kernels and its share of an SDXL training step.
2. The mixed-adapter linear: eight adapters in one batch against one adapter for all eight rows, and PEFT.

A gate compares ours with the float64 references first; no speed is printed when it fails. Finished rows also
go to stderr as JSON lines, so that a run cut short leaves what it had.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from typing import Any

import torch
import torch.nn.functional as F
from mooring_kernels.arena import ArenaLayout, LayerShape
from mooring_kernels.multi_lora import multi_lora_
from mooring_kernels.multi_lora.reference import reference as lora_reference
from mooring_kernels.spectral import add_gradient_
from mooring_kernels.spectral.reference import reference as penalty_reference
from torch import Tensor, nn

from benchmarks import kernel_peers as peers
from benchmarks.common import Row, parser, show
from benchmarks.kernel_peers import FLUX, SD15, SDXL, Network

ADAPTERS = 8
STACK = 4
"""Layers of one shape that are timed together, so that a call's own cost is shared as in a network."""
RANKS = (4, 16, 64, 128)
COMMAND = "python -m benchmarks.kernels --device cuda --save"
SLOW = 0.3
"""Seconds of one call from which on it is not repeated."""


class GateError(Exception):
    """Ours does not agree with the float64 reference."""


def main() -> None:
    """Run the benchmark."""
    options = _options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.device == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("--device cuda: PyTorch finds no CUDA device here")
        _precompile(options.ranks, options.networks)
    try:
        worst = gate(options.device, options.ranks)
    except GateError as error:
        raise SystemExit(f"correctness gate: {error}; no speed is printed") from error
    rows = []
    parts = {"spectral": spectral_rows, "mixed": mixed_rows, "step": step_rows}
    for name, part in parts.items():
        if name in options.parts:
            for row in part(options):
                sys.stderr.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
                sys.stderr.flush()
                rows.append(row)
    show(
        "kernels" if options.device == "cpu" else "kernels-cuda",
        f"Kernels on {options.device}",
        rows,
        notes=NOTES,
        summary={"worst error in the gate, as a share of its tolerance": worst},
        options=options,
    )


NOTES = (
    "ratio: ours / peer, smaller is better (bandwidth: larger).",
    "penalty: value and gradient for every layer, added to a flat gradient buffer, float32. matrix_norm",
    "loop: one layer of each shape at r16, multiplied by the count. Power iteration: one warm-started step",
    "per call, which does not reach σ at once; the others are exact.",
    "mixed: all adapted layers of one forward pass, 8 rows at the network's own size (on the CPU: a quarter",
    f"of its image tokens), base layers included; each shape is timed as {STACK} layers, times its",
    "count. One adapter: the faster of a plain LoRA (`slots` an int) and the same op with equal slots.",
    "Beyond the base: minus the base layers' time; free adapter: the ratio if ours took no time beyond them.",
    "graph: device time in a CUDA graph; eager: wall time of Python calls, one wait at the end.",
)


def _options() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options.add_argument("--threads", type=int, default=1, help="torch threads")
    options.add_argument("--ranks", type=int, nargs="+")
    options.add_argument("--networks", nargs="+", choices=["SD1.5", "SDXL", "FLUX"])
    options.add_argument("--parts", nargs="+", default=["spectral", "mixed", "step"])
    chosen = options.parse_args()
    if chosen.ranks is None:
        chosen.ranks = [4, 16] if chosen.quick else list(RANKS)
    if chosen.networks is None:
        chosen.networks = ["SD1.5"] if chosen.quick else ["SD1.5", "SDXL", "FLUX"]
    chosen.networks = [network for network in (SD15, SDXL, FLUX) if network.name in chosen.networks]
    return chosen


def _in_reach(network: Network, rank: int, device: str) -> bool:
    """Whether a CPU gets through a forward pass of 8 rows in seconds."""
    return device == "cuda" or network is SD15 or (network is SDXL and rank == 16)


# ---------------------------------------------------------------------- clocks


def timed(run: Callable[[], object], device: str, *, seconds: float = 0.25, slow: float = SLOW) -> float:
    """As `raced`, for one alone."""
    return raced({"": run}, device, seconds=seconds, slow=slow)[""]


def raced(
    runs: Mapping[str, Callable[[], object]], device: str, *, seconds: float = 0.25, slow: float = SLOW
) -> dict[str, float]:
    """Median seconds of one call of each, taken in turns so that a busy machine is unfair to none.

    Wall time; on CUDA with one wait for a batch of calls. Calls that take longer than `slow` are not repeated
    after their first, or second if the first may have been a warm-up.
    """
    calls: dict[str, int] = {}
    found: dict[str, list[float]] = {}
    for name, run in runs.items():
        once = _once(run, device)
        if once < 10 * slow:
            once = _once(run, device)
        found[name] = [once]
        calls[name] = 0 if once > slow else max(1, min(20, int(seconds / 5 / max(once, 1e-6))))
    for turn in range(5):
        for name, run in runs.items():
            if calls[name]:
                took = _once(run, device, calls[name])
                found[name] = [took] if turn == 0 else [*found[name], took]
    return {name: statistics.median(times) for name, times in found.items()}


def _once(run: Callable[[], object], device: str, calls: int = 1) -> float:
    _wait(device)
    started = time.perf_counter()
    for _ in range(calls):
        run()
    _wait(device)
    return (time.perf_counter() - started) / calls


def graphed(run: Callable[[], object], *, repeat: int = 5) -> float:
    """Median seconds of one call inside a CUDA graph of `repeat` calls, by CUDA events."""
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeat):
            run()
    graph.replay()
    found: list[float] = []
    for _ in range(9):
        begin: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1e3 / repeat)
    return statistics.median(found)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# ---------------------------------------------------------------------- gate


def gate(device: str, ranks: Sequence[int]) -> float:
    """Compare values and gradients with the float64 references on small layers.

    Returns:
        The worst error as a share of its tolerance.

    Raises:
        GateError: when one exceeds its tolerance.
    """
    worst = 0.0
    for rank in ranks:
        layout = ArenaLayout(
            [LayerShape(f"l{i}", o, n) for i, (o, n) in enumerate(((160, 96), (63, 136), (160, 96)))], rank
        )
        flat = peers.random_factors(layout, device)[0]
        grad = torch.zeros_like(flat)
        for _ in range(25 if device == "cuda" else 1):  # a warm-started solve needs some calls
            grad.zero_()
            state = add_gradient_(layout, flat, grad, 0.5)
        value, exact = penalty_reference(layout, flat.cpu(), "spectral")
        errors = {
            f"σ² at rank {rank}": abs(float(state.sigma2.sum()) - value) / value / 1e-3,
            f"its gradient at rank {rank}": _error(grad, 0.5 * exact, 5e-3),
            **_lora_errors(device, rank),
        }
        for name, error in errors.items():
            if not error <= 1.0:
                raise GateError(f"{name} is off by {error:.3g} of its tolerance")
            worst = max(worst, error)
    return worst


def _lora_errors(device: str, rank: int) -> dict[str, float]:
    layout = ArenaLayout([LayerShape("l", 96, 160)], rank)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    flat = peers.random_factors(layout, device, slots=4, dtype=dtype)
    A, B = layout.views(flat)["l"]
    x = torch.randn(4, 50, 160, device=device, dtype=dtype)
    plain = torch.randn(4, 50, 96, device=device, dtype=dtype)
    slots, scales = [3, 0, 1, 3], [1.0, 1.0, 0.5, 2.0]
    exact = lora_reference(plain.cpu(), x.cpu(), A.cpu(), B.cpu(), slots, scales)
    where, factor = torch.tensor(slots, device=device), torch.tensor(scales, device=device)
    tolerance = 2e-2 if device == "cuda" else 1e-5
    found = multi_lora_(plain.clone(), x, A, B, where, factor)
    errors = {f"multi_lora at rank {rank}": _error(found, exact, tolerance)}
    if not torch.equal(found[1], plain[1]):
        errors[f"the zero slot at rank {rank}"] = float("inf")
    return errors


def _error(found: Tensor, exact: Tensor, tolerance: float) -> float:
    difference = (found.detach().double().cpu() - exact).norm()
    return float(difference / exact.norm()) / tolerance


def _precompile(ranks: Sequence[int], networks: Sequence[Network]) -> None:
    """Let a process for each rank compile the Triton kernels into the cache on disk, side by side."""
    names = [network.name for network in networks]
    with ProcessPoolExecutor(len(ranks), mp_context=get_context("spawn")) as pool:
        list(pool.map(_compile_rank, ranks, [names] * len(ranks)))


def _compile_rank(rank: int, names: Sequence[str]) -> None:
    for network in (SD15, SDXL, FLUX):
        if network.name in names:
            layout = network.layout(rank)
            flat = torch.zeros(layout.size, device="cuda")
            add_gradient_(layout, flat, torch.zeros_like(flat), torch.ones((), device="cuda"))


# ---------------------------------------------------------------------- the penalty


def spectral_rows(options: argparse.Namespace) -> Iterator[Row]:
    """Value and gradient for whole networks."""
    device = options.device
    for network in options.networks:
        divide = 8 if options.quick and device == "cpu" else 1
        loop = _matrix_norm_seconds(network, network.layout(16, divide), device)
        for rank in options.ranks:
            layout = network.layout(rank, divide)
            flat = peers.random_factors(layout, device)[0]
            grad = torch.zeros_like(flat)
            lam = torch.full((), 1e-3, device=device)
            name = f"penalty {network.name} r{rank} ({len(layout.layers)} layers)"
            ours = functools.partial(add_gradient_, layout, flat, grad, lam)
            runs: dict[str, Callable[[], object]] = {
                "ours": ours,
                "Gram + eigvalsh": peers.gram_eigvalsh(layout, flat),
                "power iteration, loop": peers.power_iteration(layout, flat, batched=False),
                "power iteration, batched": peers.power_iteration(layout, flat, batched=True),
            }
            if device == "cuda":
                runs["our PyTorch path"] = functools.partial(ours, backend="torch")
            found = raced(runs, device)
            mine = found.pop("ours")
            yield _row(f"{name}: matrix_norm loop", mine, loop, None, "eager")
            goal = 0.1 if device == "cuda" else 1 / 1.3
            exact = {peer: seconds for peer, seconds in found.items() if not peer.startswith("power")}
            for peer, seconds in found.items():
                if peer in exact:
                    yield _row(f"{name}: {peer}", mine, seconds, goal, "eager")
                else:
                    yield _row(f"{name}: {peer}", mine, seconds, None, "eager, not exact")
            if device == "cuda":
                graph = graphed(ours)
                best = min(exact, key=exact.__getitem__)
                yield _row(f"{name}: best exact, {best}", graph, exact[best], 0.1, "graph / eager")
                power = graphed(runs["power iteration, batched"])
                yield _row(f"{name}: power iteration", graph, power, None, "graph, not exact")
                yield from _bandwidth_rows(name, layout, flat, grad)
    if device == "cpu":
        yield _unmeasured("penalty on a GPU: ratios, bandwidth of gram and grad")


def _matrix_norm_seconds(network: Network, layout: ArenaLayout, device: str) -> float:
    """One layer of each shape, times the shape's count."""
    counts = {(group.out, group.in_): len(group.indices) for group in layout.groups}
    total = 0.0
    for out, in_, _, _ in network.layers:
        one = ArenaLayout([LayerShape("l", out, in_)], layout.rank)
        run = peers.matrix_norm_loop(one, peers.random_factors(one, device)[0])
        total += counts[out, in_] * timed(run, device)
    return total


def _bandwidth_rows(name: str, layout: ArenaLayout, flat: Tensor, grad: Tensor) -> Iterator[Row]:
    """Bytes a second of the streaming kernels against a copy of the same buffer in the same run."""
    from mooring_kernels.spectral import launch
    from mooring_kernels.spectral.plan import Plan

    plan = Plan(layout, flat.device, 1)
    bank, target, rows = flat[None], grad[None], plan.sequence
    norms = torch.empty(2, 1, len(layout.layers), device=flat.device)
    copy = torch.empty_like(flat)
    bytes_ = flat.numel() * flat.element_size()
    runs: dict[str, tuple[Callable[[], object], int]] = {
        "copy": (lambda: copy.copy_(flat), 2),
        "gram": (lambda: launch.gram(plan, bank, rows), 1),
        "solve": (lambda: launch.solve(plan, norms[0], norms[1]), 0),
        "grad": (
            lambda: launch.grad(
                plan,
                bank,
                target,
                rows,
                rows,
                kind="spectral",
                strength=plan.ones,
                weights=plan.ones,
                rate=plan.ones,
                scale=1e-9,
            ),
            3,
        ),
    }
    seconds = {what: graphed(run) for what, (run, _) in runs.items()}
    speed = {what: passes * bytes_ / seconds[what] / 1e9 for what, (_, passes) in runs.items()}
    for what in ("gram", "grad"):
        share = speed[what] / speed["copy"]
        extra: dict[str, float | str | None] = {"how": "graph, GB/s", "µs": seconds[what] * 1e6}
        yield Row(
            f"{name}: bandwidth of {what} / copy",
            speed[what],
            speed["copy"],
            share,
            "≥ 0.6",
            share >= 0.6,
            extra=extra,
        )
    yield Row(f"{name}: solve", seconds["solve"] * 1e3, None, None, extra={"how": "graph"}, unit="ms")


# ---------------------------------------------------------------------- mixed adapters


class _MixedLayers:
    """`count` layers of one shape with an arena of 8 adapters, and an input of 8 rows."""

    def __init__(self, out: int, in_: int, tokens: int, rank: int, device: str) -> None:
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.layers = peers.linears(out, in_, STACK, device, self.dtype)
        layout = ArenaLayout([LayerShape(f"l{i}", out, in_) for i in range(STACK)], rank)
        self.flat = peers.random_factors(layout, device, slots=ADAPTERS + 1, dtype=self.dtype)
        self.factors = list(layout.views(self.flat).values())
        self.x = torch.randn(ADAPTERS, tokens, in_, device=device, dtype=self.dtype)
        self.slots = torch.arange(1, ADAPTERS + 1, device=device)
        self.same = torch.ones_like(self.slots)
        self.scales = torch.full((ADAPTERS,), 0.8, device=device, dtype=self.dtype)
        self.base_rows = None if device == "cuda" else torch.empty(0, dtype=torch.int64)

    @torch.no_grad()
    def mixed(self, slots: Tensor | None = None) -> None:
        """Every row its own adapter."""
        where = self.slots if slots is None else slots
        for layer, (A, B) in zip(self.layers, self.factors, strict=True):
            out = F.linear(self.x, layer.weight, layer.bias)
            multi_lora_(out, self.x, A, B, where, self.scales, base_rows=self.base_rows)

    def equal(self) -> None:
        """The same op, all rows with one adapter."""
        self.mixed(self.same)

    @torch.no_grad()
    def plain(self) -> None:
        """One adapter as a plain LoRA."""
        for layer, (A, B) in zip(self.layers, self.factors, strict=True):
            multi_lora_(F.linear(self.x, layer.weight, layer.bias), self.x, A, B, 1, 0.8)

    @torch.no_grad()
    def base(self) -> None:
        """No adapter."""
        for layer in self.layers:
            F.linear(self.x, layer.weight, layer.bias)


def mixed_rows(options: argparse.Namespace) -> Iterator[Row]:
    """Eight adapters in one batch."""
    device = options.device
    for network in options.networks:
        for rank in options.ranks:
            if not _in_reach(network, rank, device):
                continue
            name = f"mixed {network.name} r{rank}"
            eager: dict[str, float] = {}
            graph: dict[str, float] = {}
            for out, in_, count, tokens in network.layers:
                size = tokens if device == "cuda" or tokens < 256 else tokens // (64 if options.quick else 4)
                for sums, found in zip(
                    (eager, graph), _mixed_seconds(out, in_, size, rank, device), strict=True
                ):
                    for what, seconds in found.items():
                        sums[what] = sums.get(what, 0.0) + seconds * count / STACK
            if "PEFT mixed" in eager:
                yield from _against(f"{name}: PEFT adapter_names", "PEFT mixed", eager, 0.5, "eager")
                yield from _against(f"{name}: PEFT one adapter", "PEFT one", eager, None, "eager")
            for how, sums in (("eager", eager), ("graph", graph)):
                if sums:
                    sums["one"] = min(sums["equal"], sums["plain"])
                    yield from _against(f"{name}: one adapter ×8", "one", sums, 1.15, how)
                    yield _row(f"{name}: base layers alone", sums["mixed"], sums["base"], None, how)
    if device == "cpu":
        yield _unmeasured("mixed batch on a GPU, FLUX and SDXL at other ranks")


def _against(
    name: str, peer: str, found: Mapping[str, float], at_most: float | None, how: str
) -> Iterator[Row]:
    """The whole layers, with the ratio that a free adapter would have; and the adapters alone."""
    row = _row(name, found["mixed"], found[peer], at_most, how)
    row.extra["free adapter"] = found["base"] / found[peer]
    yield row
    mine, theirs = (found[what] - found["base"] for what in ("mixed", peer))
    if min(mine, theirs) > 0.0:  # else the machine was too busy to tell
        yield _row(f"{name}, beyond the base", mine, theirs, at_most if peer == "PEFT mixed" else None, how)


def _mixed_seconds(
    out: int, in_: int, tokens: int, rank: int, device: str
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds for `STACK` layers of one shape: eager, and in a CUDA graph (on CUDA)."""
    layers = _MixedLayers(out, in_, tokens, rank, device)
    runs: dict[str, Callable[[], object]] = {
        "base": layers.base,
        "mixed": layers.mixed,
        "equal": layers.equal,
        "plain": layers.plain,
    }
    captured = {what: graphed(run) for what, run in runs.items()} if device == "cuda" else {}
    try:
        model = peers.peft_stack(layers.layers, rank, ADAPTERS)
    except ImportError as error:
        sys.stderr.write(f"no PEFT: {error}\n")
        return raced(runs, device, seconds=0.1, slow=2.0), captured
    names = [f"a{index}" for index in range(ADAPTERS)]

    @torch.no_grad()
    def peft_mixed() -> None:
        model(layers.x, adapter_names=names)

    @torch.no_grad()
    def peft_one() -> None:
        model(layers.x)

    runs |= {"PEFT mixed": peft_mixed, "PEFT one": peft_one}
    return raced(runs, device, seconds=0.1, slow=2.0), captured


# ---------------------------------------------------------------------- share of a training step


def step_rows(options: argparse.Namespace) -> Iterator[Row]:
    """The penalty's share of an SDXL training step with LoRA r16: forward, backward, Adam."""
    name = "penalty's share of an SDXL training step, r16"
    if options.device == "cpu":
        yield _unmeasured(name)
        return
    layout = SDXL.layout(16)
    flat = peers.random_factors(layout, "cuda")[0]
    grad, lam = torch.zeros_like(flat), torch.full((), 1e-3, device="cuda")
    ours = functools.partial(add_gradient_, layout, flat, grad, lam)
    penalty = timed(ours, "cuda"), graphed(ours)
    for what, step in _training_steps():
        seconds = timed(step, "cuda", seconds=3.0, slow=2.0)
        for how, mine in zip(("eager", "graph"), penalty, strict=True):
            share = mine / seconds
            yield Row(
                f"{name}: {what}",
                mine * 1e3,
                seconds * 1e3,
                share,
                "≤ 0.01",
                share <= 0.01,
                unit="ms",
                extra={"how": f"penalty {how}, step eager"},
            )


def _training_steps() -> Iterator[tuple[str, Callable[[], None]]]:
    try:
        from diffusers import UNet2DConditionModel
    except ImportError as error:
        sys.stderr.write(f"no diffusers ({error}): the step is a stack of SDXL-shaped layers only\n")
    else:
        yield "random SDXL UNet, bf16, 1024 px, batch 1, no checkpointing", _unet_step(UNet2DConditionModel)
    yield "the 560 adapted layers alone, bf16, 1024 px, batch 1", _stack_step()


SDXL_UNET = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def _unet_step(model: type) -> Callable[[], None]:
    """One step of a randomly initialised SDXL UNet whose attention layers carry our LoRA."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            unet = model(**SDXL_UNET)
    finally:
        torch.set_default_dtype(before)
    unet.requires_grad_(False)
    endings = ("to_q", "to_k", "to_v", "to_out.0")
    modules = [m for n, m in unet.named_modules() if isinstance(m, nn.Linear) and n.endswith(endings)]
    update = _adapt(modules)
    latents = torch.randn(1, 4, 128, 128, device="cuda", dtype=torch.bfloat16)
    context = torch.randn(1, 77, 2048, device="cuda", dtype=torch.bfloat16)
    added = {
        "text_embeds": torch.randn(1, 1280, device="cuda", dtype=torch.bfloat16),
        "time_ids": torch.tensor([[1024, 1024, 0, 0, 1024, 1024]], device="cuda", dtype=torch.bfloat16),
    }
    when = torch.tensor([500], device="cuda")

    def step() -> None:
        found = unet(latents, when, encoder_hidden_states=context, added_cond_kwargs=added).sample
        found.float().square().mean().backward()
        update()

    return step


def _stack_step() -> Callable[[], None]:
    """Forward and backward of the adapted layers, each on its own tokens; weights shared by equal shapes."""
    layers, inputs = [], []
    for out, in_, count, tokens in SDXL.layers:
        weight = peers.linears(out, in_, 1, "cuda", torch.bfloat16)[0].weight
        x = torch.randn(1, tokens, in_, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(count):
            layer = nn.Linear(in_, out, bias=False, device="meta")
            layer.weight = weight
            layers.append(layer)
            inputs.append(x)
    update = _adapt(layers)

    def step() -> None:
        total = torch.stack([layer(x).sum() for layer, x in zip(layers, inputs, strict=True)]).sum()
        total.backward()  # type: ignore[no-untyped-call]
        update()

    return step


def _adapt(modules: Sequence[nn.Linear]) -> Callable[[], None]:
    """Hooks with our LoRA r16 on the layers; gives the optimiser's step on the flat buffer."""
    layout = ArenaLayout(
        [LayerShape(str(i), m.out_features, m.in_features) for i, m in enumerate(modules)], 16
    )
    flat = nn.Parameter(peers.random_factors(layout, "cuda"))
    flat.grad = torch.zeros_like(flat)
    optimiser = torch.optim.AdamW([flat], lr=1e-5, fused=True)
    gradients = layout.views(flat.grad).values()
    for module, (A, B), (grad_A, grad_B) in zip(
        modules, layout.views(flat.detach()).values(), gradients, strict=True
    ):
        A.requires_grad_().grad = grad_A
        B.requires_grad_().grad = grad_B

        def hook(
            _module: nn.Module, args: tuple[Tensor, ...], output: Tensor, A: Tensor = A, B: Tensor = B
        ) -> Tensor:
            return multi_lora_(output, args[0], A, B, 0)

        module.register_forward_hook(hook)

    def update() -> None:
        optimiser.step()
        assert flat.grad is not None
        flat.grad.zero_()

    return update


# ---------------------------------------------------------------------- rows


def _row(name: str, ours: float, peer: float, at_most: float | None, how: str) -> Row:
    """A row in milliseconds with the goal ours / peer ≤ `at_most`."""
    ratio = ours / peer
    goal = "" if at_most is None else f"≤ {at_most:.2f}"
    met = None if at_most is None else ratio <= at_most
    return Row(name, ours * 1e3, peer * 1e3, ratio, goal, met, "ms", {"how": how})


def _unmeasured(name: str) -> Row:
    return Row(name, None, None, None, extra={"how": f"not measured: {COMMAND}"})


if __name__ == "__main__":
    main()
