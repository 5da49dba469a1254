"""The certificate of an adapter: what is proven about it, what was measured, and on what.

Three kinds of statements, never mixed (method.md section 4):

- **bound** (exact, float64): per layer ‖ΔW·x‖ ≤ sigma·‖x‖ for every input x, with sigma = σ_max(B·A); per
  attention |Δlogit| ≤ logit_gain·‖x‖·‖y‖ for query input x and key input y of any head, where
  logit_gain = (‖ΔW_q‖‖W_k‖ + ‖W_q‖‖ΔW_k‖ + ‖ΔW_q‖‖ΔW_k‖)/√d. They hold layer by layer, for the *inputs the
  layer gets*; they do not multiply into a useful bound of the whole network, so none is stated.
- **measurement**: drift on the named probe, with its interval over prompts.
- No **estimate** is stated: the calibrated first-order sum over layers is not computed here.

Left out: layers that the adapter does not touch (their update is exactly zero).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any
from weakref import WeakKeyDictionary

from mooring_kernels.certificate import logit_gain, spectral_norm, spectrum

from mooring_server.engine.adapters import (
    ALL_TARGETS,
    Adaptable,
    AdapterWeights,
    adaptable_layers,
    matrix_shape,
)
from mooring_server.engine.base import BaseModel
from mooring_server.errors import MooringError, Reason
from mooring_server.evaluation.probe import DriftFigure, DriftResult

VERSION = 1


@dataclass(frozen=True)
class LayerCertificate:
    """Norms of one layer's update, at the certificate's adapter scale.

    Attributes:
        name: the layer's path, as in the adapter file.
        sigma: ‖ΔW‖₂, exact in float64 (bound).
        frobenius: ‖ΔW‖_F.
        stable_rank: ‖ΔW‖_F²/‖ΔW‖₂², between 1 and the rank; 0 for a zero update.
        base_sigma: ‖W₀‖₂ of the frozen weight.
        relative: sigma / base_sigma; None for a frozen weight of zeros.
    """

    name: str
    sigma: float
    frobenius: float
    stable_rank: float
    base_sigma: float
    relative: float | None


@dataclass(frozen=True)
class AttentionCertificate:
    """Bound on how far an attention's logits can move.

    Attributes:
        name: the attention's path, without the projection.
        head_dim: d, features of one head.
        logit_gain: g in |Δlogit| ≤ g·‖x‖·‖y‖, in units of logits per squared input norm (bound).
    """

    name: str
    head_dim: int
    logit_gain: float


@dataclass(frozen=True)
class Certificate:
    """What an adapter version carries with it, in its file's metadata and in the database.

    Attributes:
        adapter_digest: of the factors and embeddings the figures belong to.
        base_digest: of the base they hold for.
        rank: largest rank among the layers.
        adapter_scale: strength all norms are stated at (they are linear in it).
        layers: per-layer norms, in file order.
        attentions: per-attention logit bounds where both to_q and to_k are known.
        sigma_max: largest `sigma` of all layers, 0 for an adapter without layers.
        relative_max: largest `relative`.
        budget: the drift budget rho that training was given; None when there was none.
        drift: measured drift, its interval and its probe's digest; None when it was not measured.
        version: of this format.
    """

    adapter_digest: str
    base_digest: str
    rank: int
    adapter_scale: float
    layers: tuple[LayerCertificate, ...]
    attentions: tuple[AttentionCertificate, ...]
    sigma_max: float
    relative_max: float
    budget: float | None
    drift: DriftFigure | None
    version: int = VERSION

    def to_json(self) -> dict[str, Any]:
        """The attributes by name, plus `statements`: which figure is a bound and which a measurement."""
        content = asdict(self)
        content["drift"] = None if self.drift is None else self.drift.to_json()
        content["statements"] = {
            "layers.sigma": "bound: |ΔW x| <= sigma |x|, exact in float64",
            "attentions.logit_gain": "bound: |Δlogit| <= logit_gain |x| |y|",
            "drift": "measurement: share of the base's guidance energy on the named probe, 95 % interval",
        }
        return content

    def dumps(self) -> str:
        """Compact JSON, as stored in safetensors metadata."""
        return json.dumps(self.to_json(), separators=(",", ":"))

    @staticmethod
    def from_json(content: Mapping[str, Any] | str) -> Certificate:
        """The inverse of `to_json` and `dumps`.

        Raises:
            MooringError: INVALID_FIELD when the content is not a certificate of this version.
        """
        document = json.loads(content) if isinstance(content, str) else content
        if document.get("version") != VERSION:
            raise MooringError(
                Reason.INVALID_FIELD,
                f"certificate version {document.get('version')!r} is not known here (known: {VERSION}).",
                remedy="Evaluate the adapter again to get a certificate of this version.",
            )
        known = {field.name: document[field.name] for field in fields(Certificate)}
        known["layers"] = tuple(LayerCertificate(**layer) for layer in document["layers"])
        known["attentions"] = tuple(AttentionCertificate(**item) for item in document["attentions"])
        known["drift"] = None if document["drift"] is None else DriftFigure.from_json(document["drift"])
        return Certificate(**known)


def build(
    base: BaseModel,
    weights: AdapterWeights,
    drift: DriftResult | DriftFigure | None = None,
    *,
    budget: float | None = None,
    adapter_scale: float = 1.0,
) -> Certificate:
    """Compute an adapter's certificate. No device work: QR and small SVDs in float64 on the CPU.

    Args:
        base: the base the adapter belongs to.
        weights: the adapter.
        drift: measured on the same base and at the same scale, if it was.
        budget: the drift budget of its training.
        adapter_scale: strength the norms are stated at.

    Raises:
        MooringError: BASE_DIGEST_MISMATCH; ADAPTER_KEYS_UNMATCHED for a layer the base does not have.
    """
    if weights.base_digest != base.digest:
        raise MooringError(
            Reason.BASE_DIGEST_MISMATCH,
            f"the adapter was made for base {weights.base_digest}, this base is {base.digest}.",
            remedy="Certify it on the base it was trained on.",
            metadata={"expected": base.digest, "found": weights.base_digest},
        )
    modules = adaptable_layers(base, ALL_TARGETS)
    unmatched = [name for name in weights.layers if name not in modules]
    if unmatched:
        raise MooringError(
            Reason.ADAPTER_KEYS_UNMATCHED,
            f"the base has no layer {unmatched[0]!r} ({len(unmatched)} unmatched in all).",
            metadata={"keys": ", ".join(unmatched[:5])},
        )
    layers = []
    for name, factors in weights.layers.items():
        found = spectrum(factors.A, factors.B)
        sigma, frobenius = found.sigma_max * abs(adapter_scale), found.frobenius * abs(adapter_scale)
        base_sigma = _base_sigma(base, name)
        relative = sigma / base_sigma if base_sigma > 0 else None
        layers.append(LayerCertificate(name, sigma, frobenius, found.stable_rank, base_sigma, relative))
    return Certificate(
        adapter_digest=weights.digest,
        base_digest=base.digest,
        rank=weights.rank,
        adapter_scale=adapter_scale,
        layers=tuple(layers),
        attentions=tuple(_attentions(base, modules, layers)),
        sigma_max=max((layer.sigma for layer in layers), default=0.0),
        relative_max=max((layer.relative or 0.0 for layer in layers), default=0.0),
        budget=budget,
        drift=drift.figure if isinstance(drift, DriftResult) else drift,
    )


def _attentions(
    base: BaseModel, modules: Mapping[str, Adaptable], layers: list[LayerCertificate]
) -> list[AttentionCertificate]:
    """Logit bounds of the attentions whose queries or keys the adapter changes."""
    sigma = {layer.name: layer.sigma for layer in layers}
    parents = dict.fromkeys(
        name.rpartition(".")[0] for name in sigma if name.rpartition(".")[2] in {"to_q", "to_k"}
    )
    found = []
    for parent in parents:
        query, key = f"{parent}.to_q", f"{parent}.to_k"
        if query not in modules or key not in modules:
            continue
        heads = int(base.unet.get_submodule(parent.removeprefix("unet.")).heads)
        head_dim = matrix_shape(modules[query])[0] // heads
        dq, dk = sigma.get(query, 0.0), sigma.get(key, 0.0)
        gain = logit_gain(dq, _base_sigma(base, query), dk, _base_sigma(base, key), head_dim)
        found.append(AttentionCertificate(parent, head_dim, gain))
    return found


_base_sigmas: WeakKeyDictionary[BaseModel, dict[str, float]] = WeakKeyDictionary()


def _base_sigma(base: BaseModel, layer: str) -> float:
    """‖W₀‖₂, computed once per base and layer: frozen weights never change."""
    known = _base_sigmas.setdefault(base, {})
    if layer not in known:
        known[layer] = spectral_norm(adaptable_layers(base, ALL_TARGETS)[layer].weight.flatten(1))
    return known[layer]
