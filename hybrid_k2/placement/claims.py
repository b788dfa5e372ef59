"""Rules × model: which rule claims which layers of which tensor group.

Each (group, layer) of the model must be claimed exactly once. Two exceptions: an unnamed router follows the attention
of its layer, and an unnamed vision tower goes to the host.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hybrid_k2.config import ModelConfig
from hybrid_k2.placement.form import PlaceRule, Rules, format_layers
from hybrid_k2.placement.groups import GROUPS, group_layers
from hybrid_k2.placement.yaml_tree import fail

_Slot = int | None  # a layer, or None for a group outside the layers


@dataclass(frozen=True)
class Claim:
    """One rule's hold on a group: the layers it really gets (None: the group stands outside them)."""

    what: str
    layers: tuple[int, ...] | None
    rule: PlaceRule


@dataclass(frozen=True)
class Claims:
    """Hold all claims, complete and free of overlap, and what the user should know about them.

    hot: claims on the most used routed experts of layers that `all` places, too.
    """

    all: tuple[Claim, ...]
    hot: tuple[Claim, ...]
    notes: tuple[str, ...]


def claim_groups(rules: Rules, config: ModelConfig) -> Claims:
    """Give every tensor group of the model to one rule.

    Raises: RulesError: a layer outside the model, a rule that matches nothing, two rules for one group, a group
    without a rule.
    """
    owners: dict[tuple[str, _Slot], PlaceRule] = {}
    hot_owners: dict[tuple[str, _Slot], PlaceRule] = {}
    claims: list[Claim] = []
    hot: list[Claim] = []
    notes: list[str] = []
    for rule in rules.place:
        if _is_absent(rule, config):
            notes.append(f"{rule}: the model has no {rule.what}, the rule is idle")
        elif rule.hottest is not None:
            hot.append(_claim_hot(rule, config, rules.source))
            _take(hot_owners, hot[-1], rules.source)
        else:
            claims.append(_claim(rule, config, rules.source))
            _take(owners, claims[-1], rules.source)
    router_layers = {layer for what, layer in owners if what == "router"}
    claims += _router_claims(rules, config, owners, set(config.moe_layers) - router_layers)
    if config.vision is not None and ("vision", None) not in owners:
        claims.append(Claim("vision", None, PlaceRule("vision", None, "host", None, line=0, number=0)))
    _check_complete(rules, config, owners)
    return Claims(tuple(sorted(claims, key=_model_order)), tuple(sorted(hot, key=_model_order)), tuple(notes))


def _is_absent(rule: PlaceRule, config: ModelConfig) -> bool:
    """Say whether the model has nothing of this kind at all, so that shipped rules serve every K2 checkpoint."""
    if rule.what == "vision":
        return config.vision is None
    return rule.layers is None and group_layers(config, rule.what) == range(0)


def _claim(rule: PlaceRule, config: ModelConfig, source: str) -> Claim:
    present = group_layers(config, rule.what)
    if present is None:
        return Claim(rule.what, None, rule)
    if rule.layers is None:
        return Claim(rule.what, tuple(present), rule)
    last = config.num_hidden_layers - 1
    if rule.layers[-1][-1] > last:
        fail(source, rule.line, f"{rule}: expected layers 0..{last} of this model, got {rule.layers[-1][-1]}")
    layers = tuple(layer for part in rule.layers for layer in part if layer in present)
    if not layers:
        has = f"it is in {_name_layers((present,))}" if present else "the model has none"
        fail(source, rule.line, f"{rule}: matches nothing: no such layer has {rule.what} ({has})")
    return Claim(rule.what, layers, rule)


def _claim_hot(rule: PlaceRule, config: ModelConfig, source: str) -> Claim:
    if rule.hottest is not None and rule.hottest > config.n_routed_experts:
        expected = f"at most {config.n_routed_experts} (the model's experts)"
        fail(source, rule.line, f"{rule}: hottest: expected {expected}, got {rule.hottest}")
    return _claim(rule, config, source)


def _take(owners: dict[tuple[str, _Slot], PlaceRule], claim: Claim, source: str) -> None:
    for layer in _slots(claim.layers):
        other = owners.setdefault((claim.what, layer), claim.rule)
        if other is not claim.rule:
            where = claim.what if layer is None else f"{claim.what} of layer {layer}"
            fail(
                source,
                claim.rule.line,
                f"{claim.rule}: {where} is already placed by rule {other.number} on line {other.line}",
                "give the two rules different layers, or remove one",
            )


def _router_claims(
    rules: Rules, config: ModelConfig, owners: dict[tuple[str, _Slot], PlaceRule], layers: set[int]
) -> list[Claim]:
    """Let the routers of these layers follow their attention; their dtype stays the router's own default."""
    followed: dict[PlaceRule, list[int]] = {}
    for layer in sorted(layers):
        if attention := owners.get(("attention", layer)):
            followed.setdefault(attention, []).append(layer)
            owners["router", layer] = attention
    return [
        Claim("router", tuple(found), PlaceRule("router", None, rule.on, None, rule.line, rule.number))
        for rule, found in followed.items()
    ]


def _check_complete(rules: Rules, config: ModelConfig, owners: dict[tuple[str, _Slot], PlaceRule]) -> None:
    for what in GROUPS:
        if what == "vision":
            continue
        free = [layer for layer in _slots(group_layers(config, what)) if (what, layer) not in owners]
        if free:
            layers = "" if free[0] is None else f" of {_name_layers(ranges_of(free))}"
            hint = f"add a rule, as: - {{what: {what}, on: host}}"
            fail(rules.source, None, f"place: expected a rule for every group, got none for {what}{layers}", hint)


def _name_layers(layers: tuple[range, ...]) -> str:
    text = format_layers(layers)
    return f"layer {text}" if text.isdecimal() else f"layers {text}"


def _slots(layers: Iterable[int] | None) -> tuple[_Slot, ...]:
    return (None,) if layers is None else tuple(layers)


def _model_order(claim: Claim) -> tuple[int, int]:
    return GROUPS.index(claim.what), claim.layers[0] if claim.layers else 0


def ranges_of(layers: Iterable[int | None]) -> tuple[range, ...]:
    """Join ascending layers into ranges."""
    parts: list[range] = []
    for layer in layers:
        if layer is None:
            continue
        if parts and parts[-1].stop == layer:
            parts[-1] = range(parts[-1].start, layer + 1)
        else:
            parts.append(range(layer, layer + 1))
    return tuple(parts)
