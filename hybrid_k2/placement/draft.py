"""Rules × model × machine → the plan."""

from __future__ import annotations

from dataclasses import replace

from hybrid_k2.config import ModelConfig
from hybrid_k2.errors import HardwareError
from hybrid_k2.placement.budget import check_budget, find_budget
from hybrid_k2.placement.claims import Claim, Claims, claim_groups
from hybrid_k2.placement.form import Rules
from hybrid_k2.placement.groups import decoded_parameters, group_bytes, latent_bytes_per_token
from hybrid_k2.placement.host_threads import plan_threads
from hybrid_k2.placement.hot import Usage, hot_counts, hot_notes, hottest, moved_experts
from hybrid_k2.placement.machine import Machine
from hybrid_k2.placement.memories import HOST, TWIN, memory_of
from hybrid_k2.placement.overheads import MATRICES, Overhead, Work, gpu_overheads, image_overheads, staging
from hybrid_k2.placement.plan import KvCachePlan, Plan, PlanRow, bytes_per_token, expert_bytes
from hybrid_k2.placement.yaml_tree import fail

PAGE_TOKENS = 64
AUTO_KV_TOKENS = 65536  # a long chat; 4.3 GiB in bf16 at the size of K2.6
# Tokens of a prompt that go through the model at a time. At the size of K2.6 each of the 384 experts then serves
# about 11 of them, so that reading its weights is paid once for many; activations stay within the reserve.
AUTO_CHUNK_TOKENS = 512
AUTO_STREAM_TOKENS = 2048  # where experts are brought over for it, which costs the same for a chunk of any size
FP8_CAPABILITY = (8, 9)  # the first one with fp8 products: Ada; then Hopper and Blackwell
NO_SELF_CHECK = "self_check: off: whether the accelerator computes what it should is not checked before it serves"
# The groups whose output is added to the residual stream; the router is always computed in FP32.
_STREAM_GROUPS = ("attention", "dense_mlp", "shared_experts")


def make_plan(
    rules: Rules, config: ModelConfig, machine: Machine, *, experts_packed: bool = True, usage: Usage | None = None
) -> Plan:
    """Turn rules into a plan that fits the machine.

    experts_packed: the checkpoint stores its routed experts as INT4, as K2.5 and K2.6 do. usage: how often each expert
    of each MoE layer was chosen, as far as that is known.
    Raises: RulesError: the rules do not suit the model; HardwareError: no such GPU; MemoryBudgetError: too large.
    """
    plan = draft_plan(rules, config, machine, experts_packed=experts_packed, usage=usage)
    for device in plan.devices:
        check_budget(device, find_budget(device, rules, machine), plan.items_on(device), rules)
    return plan


def draft_plan(
    rules: Rules, config: ModelConfig, machine: Machine, *, experts_packed: bool = True, usage: Usage | None = None
) -> Plan:
    """Make a plan without comparing it with the memory of the machine. Raises: RulesError, HardwareError."""
    devices = _resolve_devices(rules, machine)
    claims = claim_groups(rules, config)
    stream = _stream_dtype(claims)
    numerics = rules.numerics if experts_packed else "reference"
    rows = tuple(_row(claim, rules, config, devices, stream, numerics, experts_packed) for claim in claims.all)
    activation_dtype = "fp32" if _stream_on_host(rows) else stream
    accelerator = _accelerator(devices, claims)
    streams = rules.prefill.stream if accelerator is not None else "off"
    if streams != "off":
        _check_streamed(rules, experts_packed)
    chunk_tokens = rules.prefill.chunk_tokens or (AUTO_CHUNK_TOKENS if streams == "off" else AUTO_STREAM_TOKENS)
    graphs = _records(rules, rows, accelerator)
    work = Work(
        config,
        accelerator,
        activation_dtype,
        chunk_tokens,
        hot=bool(claims.hot),
        stream=streams != "off",
        deferred=rules.deferred > 0,
        graphs=graphs,
    )
    kv_cache = _plan_kv_cache(rules, config, machine, devices, rows, work)
    chunk_tokens = min(chunk_tokens, kv_cache.tokens)
    overlap = _overlap(rules, kv_cache.device)
    work = replace(work, chunk_tokens=chunk_tokens, halves=2 if overlap == "ping_pong" else 1)
    overheads = _overheads(work, rows, kv_cache)
    counts, notes = _count_hot(claims, rules, config, machine, rows, kv_cache, overheads, experts_packed, usage or {})
    rows = _place_hot(claims, counts, rules, config, rows, usage or {})
    threads = plan_threads(
        rules,
        machine,
        bytes_per_token=bytes_per_token(config, rows),
        expert_bytes=expert_bytes(rows),
        gpu=any(memory_of(row.device) != HOST for row in rows),
        twin_share=_twin_share(config, rows),
    )
    return Plan(
        config=config,
        rules=rules,
        machine=machine,
        kv_cache=kv_cache,
        numerics=numerics,
        nodes=threads.nodes,
        activation_dtype=activation_dtype,
        chunk_tokens=chunk_tokens,
        rows=rows,
        notes=machine.notes
        + claims.notes
        + notes
        + threads.notes
        + _check_fp8(rows, rules, machine)
        + _numerics_notes(rules.numerics, numerics, activation_dtype)
        + ((deferred_warning(rules.deferred),) if rules.deferred else ())
        + ((NO_SELF_CHECK,) if accelerator is not None and not rules.self_check else ()),
        accelerator=accelerator,
        stream=streams,
        graphs=graphs,
        overheads=overheads,
        overlap=overlap,
        deferred=_check_deferred(rules, config, kv_cache.device),
        twin_threads=threads.twin_threads,
        self_check=accelerator is not None and rules.self_check,
        usage=usage or {},
    )


def _overheads(work: Work, rows: tuple[PlanRow, ...], kv_cache: KvCachePlan | None) -> tuple[Overhead, ...]:
    """List what is taken beside these rows and the cache; the twin's work on text is within the host's reserve."""
    vision = next((row for row in rows if row.what == "vision"), None)
    images = image_overheads(work, vision.device, vision.dtype) if vision is not None else ()
    if work.device in (None, TWIN):
        return (staging(work) if work.stream else ()) + images
    placed = [row for row in rows if row.device == work.device and row.what != "vision"]
    matrices = sum(MATRICES[row.what] * len(row.layers or (0,)) for row in placed)
    nbytes = sum(row.nbytes for row in placed)
    if kv_cache is not None and kv_cache.device == work.device:
        matrices, nbytes = matrices + work.config.num_hidden_layers, nbytes + kv_cache.nbytes
        work = replace(work, context_tokens=kv_cache.tokens)
    return gpu_overheads(work, matrices, nbytes) + images


def _records(rules: Rules, rows: tuple[PlanRow, ...], accelerator: str | None) -> bool:
    """Say whether decode steps are recorded: on a GPU that has all of a step but embedding and experts of the host."""
    placed = {row.device for row in rows if row.what not in ("embedding", "routed_experts", "vision")}
    in_bf16 = rules.kv_cache.dtype == "bf16" and rules.kv_cache.on in (None, "gpu")
    return rules.graphs and accelerator not in (None, TWIN) and placed == {accelerator} and in_bf16


def _count_hot(
    claims: Claims,
    rules: Rules,
    config: ModelConfig,
    machine: Machine,
    rows: tuple[PlanRow, ...],
    kv_cache: KvCachePlan,
    overheads: tuple[Overhead, ...],
    experts_packed: bool,
    usage: Usage,
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Decide how many experts of each layer each claim on hot experts gets, beside all else on the GPU."""
    if not claims.hot:
        return (), ()
    rule = claims.hot[0].rule
    if not experts_packed:
        fail(rules.source, rule.line, f"{rule}: hottest: expected a checkpoint with INT4 experts, got an unpacked one")
    if rules.numerics == "reference":
        fail(rules.source, rule.line, f"{rule}: hottest: expected numerics exact, fast or bf16, got reference")
    device = rules.devices.gpu or ""
    room = 0  # on the twin every rule says how many
    if device != TWIN:
        taken = sum(row.nbytes for row in rows if row.device == device)
        taken += sum(one.nbytes for one in overheads if one.device == device)
        taken += kv_cache.nbytes if kv_cache.device == device else 0
        room = find_budget(device, rules, machine).nbytes - taken
    counts = hot_counts(claims.hot, config, room)
    return counts, tuple(hot_notes(claims.hot, counts, usage))


def _place_hot(
    claims: Claims,
    counts: tuple[int, ...],
    rules: Rules,
    config: ModelConfig,
    rows: tuple[PlanRow, ...],
    usage: Usage,
) -> tuple[PlanRow, ...]:
    """Add the rows of hot experts, and take their experts from the host's."""
    if not claims.hot:
        return rows
    expert = group_bytes(config, "routed_experts", "int4") // config.n_routed_experts
    placed: list[PlanRow] = []
    for row in rows:
        moved = moved_experts(claims.hot, counts, row.layers or ()) if row.what == "routed_experts" else 0
        placed.append(replace(row, nbytes=row.nbytes - moved * expert))
    for claim, count in zip(claims.hot, counts, strict=True):
        if count:
            layers = claim.layers or ()
            experts = tuple(hottest(usage, layer, count) for layer in layers)
            nbytes, rule = len(layers) * count * expert, claim.rule
            device = rules.devices.gpu or ""
            placed.append(
                PlanRow(claim.what, layers, device, "int4", nbytes, rule.line, count, experts, rule.also_on_host)
            )
    return tuple(placed)


def _check_streamed(rules: Rules, experts_packed: bool) -> None:
    """Refuse to stream experts that the kernels of the accelerator do not compute."""
    if experts_packed and rules.numerics != "reference":
        return
    got = "numerics: reference" if experts_packed else "a checkpoint with unpacked experts"
    fail(rules.source, rules.prefill.stream_line, f"prefill: stream: expected INT4 experts, native kernels, got {got}")


def _check_fp8(rows: tuple[PlanRow, ...], rules: Rules, machine: Machine) -> tuple[str, ...]:
    """Refuse fp8 on a card that cannot multiply it; say in a note where that is not known. Raises: HardwareError."""
    first = next((row for row in rows if row.dtype == "fp8"), None)
    gpu = machine.find_gpu(first.device) if first is not None else None
    if first is None or gpu is None:
        return ()
    if gpu.capability is None:
        return (f"{first.device}: fp8 needs a card of compute capability 8.9 or more (Ada, Hopper, Blackwell)",)
    if gpu.capability < FP8_CAPABILITY:
        major, minor = gpu.capability
        raise HardwareError(
            f"{rules.source}:{first.line}: dtype fp8: expected a GPU of compute capability 8.9 or more, "
            f"got {first.device} ({gpu.name}) with {major}.{minor}",
            hint="write int8, which any card computes",
        )
    return ()


def _numerics_notes(asked: str, numerics: str, activation_dtype: str) -> tuple[str, ...]:
    """Say what the numerics of the experts cost."""
    if numerics == "reference" and asked != "reference":
        return ("routed_experts: stored unpacked, so the reference computes them in FP32 (slow)",)
    if numerics == "fast":
        return ("numerics: fast: the experts' inputs are rounded to 8 bits, an error of 1 to 2e-2 (exact: 1e-4)",)
    if numerics == "bf16" and activation_dtype == "fp32":
        return ("numerics: bf16: the experts' inputs are rounded to bf16, an error of 2 to 3e-3 where exact has 1e-4",)
    if numerics == "bf16":
        return ("numerics: bf16: the activations are bf16 already, so every result is that of exact, bit for bit",)
    return ()


def _resolve_devices(rules: Rules, machine: Machine) -> dict[str, str]:
    """Map the names that rules use to devices of the machine, and check that a GPU in use is there."""
    named = rules.devices.gpu
    used = rules.kv_cache.on == "gpu" or any(rule.on == "gpu" for rule in rules.place)
    if named is None or not used:
        return {"host": HOST}
    if named != TWIN and machine.find_gpu(named) is None:
        found = ", ".join(f"{gpu.device} ({gpu.name})" for gpu in machine.gpus)
        note = f" ({machine.gpu_note})" if machine.gpu_note else ""
        raise HardwareError(
            f"{rules.source}:{rules.devices.gpu_line}: devices: gpu: expected {named}, found {found or 'no GPU'}{note}",
            hint=_missing_gpu_hint(found, rules),
        )
    return {"host": HOST, "gpu": named}


def _missing_gpu_hint(found: str, rules: Rules) -> str:
    if found:
        return "name a GPU that is there"
    described = " with devices.gpu_memory" if rules.devices.gpu_memory_bytes is None else ""
    return (
        f"use rules/host.yaml to place everything on the host; --dry-run plans for a card that is not here{described}"
    )


def _accelerator(devices: dict[str, str], claims: Claims) -> str | None:
    """Return the device beside the host if any of the text model is placed on it."""
    on_gpu = any(claim.rule.on == "gpu" for claim in (*claims.all, *claims.hot) if claim.what != "vision")
    return devices.get("gpu") if on_gpu else None


def _overlap(rules: Rules, attention: str) -> str:
    """Choose how accelerator and experts share the time: they take turns only where attention is not the experts'."""
    if rules.overlap == "ping_pong" and attention == HOST:
        fail(
            rules.source,
            rules.overlap_line,
            "overlap: expected off (the threads of the experts compute attention too), got ping_pong",
            "place attention on a gpu, which may be the twin: devices: {gpu: twin}",
        )
    if rules.overlap != "auto":
        return rules.overlap
    return "off" if attention == HOST else "ping_pong"


def _check_deferred(rules: Rules, config: ModelConfig, attention: str) -> int:
    """Return how many experts of a token are deferred. Raises: RulesError for too many, or where nothing is gained."""
    most = config.num_experts_per_tok - 1
    if rules.deferred > most:
        message = f"overlap: deferred: expected at most {most} (one less than a token chooses), got {rules.deferred}"
        fail(rules.source, rules.overlap_line, message)
    if rules.deferred and attention == HOST:
        fail(
            rules.source,
            rules.overlap_line,
            f"overlap: deferred: expected 0 (the threads of the experts compute attention too), got {rules.deferred}",
            "place attention on a gpu, which may be the twin: devices: {gpu: twin}",
        )
    return rules.deferred


def deferred_warning(count: int) -> str:
    """Say what deferral does to the results."""
    which = "the last of each token's experts acts" if count == 1 else f"the last {count} of each token's experts act"
    return (
        f"overlap: deferred: {which} one layer late, which the model was not trained for; "
        "how much worse its text becomes was not measured"
    )


def _twin_share(config: ModelConfig, rows: tuple[PlanRow, ...]) -> float | None:
    """Compare the weights that a token meets on the twin with those of its routed experts; None without a twin."""
    if all(row.device != TWIN for row in rows):
        return None
    weights = {TWIN: 0.0, HOST: 0.0}
    for row in rows:
        if row.device == TWIN or row.what == "routed_experts":
            part = row.hottest / config.n_routed_experts if row.hottest else 1.0  # of the choices, if all are alike
            weight = part * len(row.layers or (0,)) * decoded_parameters(config, row.what)
            weights[row.device] += weight
            weights[HOST] -= weight if row.hottest else 0
    return weights[TWIN] / max(1, sum(weights.values()))


def _stream_dtype(claims: Claims) -> str:
    """Find the widest dtype of the groups that the residual stream passes through."""
    return "fp32" if any(c.what in _STREAM_GROUPS and c.rule.dtype == "fp32" for c in claims.all) else "bf16"


def _stream_on_host(rows: tuple[PlanRow, ...]) -> bool:
    """Say whether the residual stream never meets a GPU; on a CPU, rounding it to bf16 costs time and accuracy."""
    return all(memory_of(row.device) == HOST for row in rows if row.what in _STREAM_GROUPS)


def _row(
    claim: Claim,
    rules: Rules,
    config: ModelConfig,
    devices: dict[str, str],
    stream: str,
    numerics: str,
    experts_packed: bool,
) -> PlanRow:
    device, dtype = devices[claim.rule.on], claim.rule.dtype
    if claim.what == "routed_experts":
        dtype = _expert_dtype(claim, rules, stream, experts_packed)
    elif dtype is None:
        dtype = _router_dtype(device, numerics) if claim.what == "router" else "bf16"
    nbytes = len(claim.layers or (0,)) * group_bytes(config, claim.what, dtype)
    return PlanRow(claim.what, claim.layers, device, dtype, nbytes, claim.rule.line)


def _router_dtype(device: str, numerics: str) -> str:
    """Keep the router as it is stored where the native kernels read it; elsewhere fp32 saves a conversion per token."""
    return "bf16" if memory_of(device) == HOST and numerics != "reference" else "fp32"


def _expert_dtype(claim: Claim, rules: Rules, stream: str, experts_packed: bool) -> str:
    dtype, rule = claim.rule.dtype, claim.rule
    if experts_packed:
        if dtype not in (None, "int4"):
            hint = "leave dtype out: the experts stay in INT4 as stored"
            fail(rules.source, rule.line, f"{rule}: expected dtype int4 (the checkpoint's), got {dtype}", hint)
        return "int4"
    if dtype == "int4":
        hint = "this checkpoint stores its experts unpacked; leave dtype out, or write bf16 or fp32"
        fail(rules.source, rule.line, f"{rule}: expected dtype bf16 or fp32, got int4", hint)
    return dtype or stream


def _plan_kv_cache(
    rules: Rules,
    config: ModelConfig,
    machine: Machine,
    devices: dict[str, str],
    rows: tuple[PlanRow, ...],
    work: Work,
) -> KvCachePlan:
    rule = rules.kv_cache
    attention = {row.device: row.line for row in rows if row.what == "attention"}
    if len(attention) > 1:
        found = " and ".join(f"{device} on line {line}" for device, line in attention.items())
        message = f"attention: expected all layers on one device, with the KV cache, got {found}"
        fail(rules.source, max(attention.values()), message)
    (other, line), *_ = attention.items()
    device = devices[rule.on] if rule.on else other
    if other != device:
        message = f"kv_cache: expected on the device of all attention ({other} on line {line}), got {device}"
        fail(rules.source, rule.line, message, "place kv_cache and all attention layers together")
    page_bytes = PAGE_TOKENS * latent_bytes_per_token(config, rule.dtype)
    limit = config.max_position_embeddings
    if rule.tokens is not None and rule.tokens > limit:
        fail(
            rules.source,
            rule.tokens_line,
            f"kv_cache: tokens: expected at most {limit} (the model's), got {rule.tokens}",
        )
    memory = memory_of(device)
    taken = sum(row.nbytes for row in rows if memory_of(row.device) == memory)
    taken += sum(one.nbytes for one in _overheads(work, rows, None) if memory_of(one.device) == memory)
    free = find_budget(memory, rules, machine).nbytes - taken
    affordable = max(1, free // 4 // page_bytes) * PAGE_TOKENS
    tokens = rule.tokens or min(limit, AUTO_KV_TOKENS, affordable)
    return KvCachePlan(device, rule.dtype, tokens, PAGE_TOKENS, -(-tokens // PAGE_TOKENS) * page_bytes)
