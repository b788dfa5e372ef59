"""From what the user names to a model in memory: everything is checked before anything large is read."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hybrid_k2.checkpoint import (
    Checkpoint,
    check_checkpoint,
    experts_packed,
    planned_packed,
    resolve_checkpoint,
    resolve_configuration,
    vision_tensors,
)
from hybrid_k2.config import GENERATION_NAME, ModelConfig, read_generation_config
from hybrid_k2.engine.guide import GuideVocabulary
from hybrid_k2.engine.params import SamplingParams
from hybrid_k2.errors import CheckpointError, ConfigError
from hybrid_k2.experts.usage import Counts, recall_usage
from hybrid_k2.model.loader import Progress, load_text_model
from hybrid_k2.model.self_check import check_model
from hybrid_k2.model.text import TextModel
from hybrid_k2.model.vision import VisionModel
from hybrid_k2.model.vision_check import check_vision
from hybrid_k2.model.vision_loading import load_vision_model
from hybrid_k2.placement import (
    Machine,
    Plan,
    Rules,
    default_rules,
    deferred_warning,
    described_gpu,
    described_host,
    load_rules,
    make_plan,
)
from hybrid_k2.placement.overheads import IMAGE_PATCHES
from hybrid_k2.protocol import ImageFormat, Tokenizer
from hybrid_k2.protocol.images import PREPROCESSOR_NAME
from hybrid_k2.vision_config import MERGE

log = logging.getLogger("hybrid_k2")

DEMO = "demo"  # names the built-in checkpoint; a folder of that name is "./demo"
# Where attention to a block has bits of its own: smaller blocks make for finer reuse, larger ones for less arithmetic.
# With K2.6's sizes and long contexts, 256 tokens take three quarters of what they take one by one.
BLOCK_TOKENS = 256
OnPlan = Callable[[Plan], None]


@dataclass(frozen=True)
class LoadedModel:
    """Hold a model in memory and what belongs to it."""

    folder: Path
    config: ModelConfig
    plan: Plan
    tokenizer: Tokenizer
    generation_config: dict[str, Any]  # what the checkpoint states about sampling; may be empty
    text: TextModel
    vision: VisionModel | None = None  # None: it reads text only
    images: ImageFormat | None = None  # how `vision` wants its images

    def close(self) -> None:
        """Release the memory and stop the threads of what computes."""
        if self.vision is not None:
            self.vision.close()
        self.text.close()

    @property
    def context_tokens(self) -> int:
        """The longest prompt and reply together."""
        return min(self.config.max_position_embeddings, self.plan.kv_cache.tokens)

    @cached_property
    def block_tokens(self) -> int:
        """Prompts are computed in blocks that begin at multiples of this, so that a text does not depend on chunks.

        1 where a token has the same bits in any chunk. Elsewhere at most half of a step, so that sequences which decode
        have room beside one.
        """
        plan, chunk = self.plan, self.plan.chunk_tokens
        on_host = plan.stream == "off" and not any(row.hottest for row in plan.rows)  # all of the routed experts
        return 1 if on_host and self.text.any_cut else min(BLOCK_TOKENS, chunk // 2 if chunk > 3 else chunk)

    @cached_property
    def guide_vocabulary(self) -> GuideVocabulary:
        """The tokens as grammars need them; takes a second or two when it is first asked for. Raises: RequestError."""
        return GuideVocabulary(self.tokenizer, self.config.eos_token_ids)


def _find_checkpoint(path: str | Path, rules: str | Path | Rules | None) -> Path:
    """Return the folder of a checkpoint: a folder, a repository of the hub, or "demo" for the built-in one.

    A repository is planned before its weights are downloaded.
    Raises: CheckpointError; as `plan_checkpoint`.
    """
    if str(path) == DEMO:
        return _demo()

    def check(folder: Path) -> None:
        config = ModelConfig.load(folder)
        _plan(rules, config, planned_packed(folder, config), _usage(folder, config))

    return resolve_checkpoint(str(path), check)


def _demo() -> Path:
    from hybrid_k2.demo import demo_path

    return demo_path()


def load_model(
    path: str | Path, rules: str | Path | Rules | None, on_plan: OnPlan | None, progress: Progress | None
) -> LoadedModel:
    """Check a checkpoint, plan it for this machine and load it; see `Engine.load`."""
    folder = _find_checkpoint(path, rules)
    config = ModelConfig.load(folder)
    generation_config = _generation_config(folder)
    images = _image_format(folder, config)
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size != config.vocab_size:
        raise CheckpointError(
            f"{folder}: tiktoken.model: expected vocab_size = {config.vocab_size} tokens, got {tokenizer.vocab_size}"
        )
    with ExitStack() as stack:
        checkpoint = stack.enter_context(Checkpoint.open(folder))
        check_checkpoint(checkpoint, config)
        plan = _plan(rules, config, experts_packed(checkpoint, config), _usage(folder, config))
        if on_plan is not None:
            on_plan(plan)
        if plan.deferred:
            log.warning("%s", deferred_warning(plan.deferred))
        of_text, of_images = _divided(
            progress, sum(checkpoint.info(spec.name).nbytes for spec in vision_tensors(config))
        )
        text = load_text_model(checkpoint, config, plan, of_text)
        try:
            vision = load_vision_model(checkpoint, config, plan, of_images)
            check_model(text, checkpoint, config, plan)
            if vision is not None:
                check_vision(vision, checkpoint, plan)
        except BaseException:
            text.close()
            raise
    return LoadedModel(folder, config, plan, tokenizer, generation_config, text, vision, images)


def _divided(progress: Progress | None, vision_bytes: int) -> tuple[Progress, Callable[[int], None]]:
    """Report the text model's bytes and those of the vision tower behind them as one count."""
    report, done, total = progress or (lambda done, total: None), 0, vision_bytes

    def text(text_done: int, text_total: int) -> None:
        nonlocal done, total
        done, total = text_done, text_total + vision_bytes
        report(done, total)

    def vision(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        report(done, total)

    return text, vision


def plan_checkpoint(
    path: str | Path, rules: str | Path | Rules | None = None, *, host_memory_bytes: int | None = None
) -> Plan:
    """Plan a checkpoint without loading it: its configuration is enough, its index is used where there is one.

    A GPU that the rules name and size need not be here (`described_gpu`). host_memory_bytes: plan for a host with so
    much free memory.
    Raises: CheckpointError, ConfigError, UnsupportedModelError, RulesError, HardwareError, MemoryBudgetError.
    """
    folder = find_configuration(path)
    config = ModelConfig.load(folder)
    packed = planned_packed(folder, config)
    machine = described_host(Machine.probe(), host_memory_bytes)
    chosen = _rules(rules, machine, config, packed)
    on = described_gpu(machine, chosen)
    return make_plan(chosen, config, on, experts_packed=packed, usage=_usage(folder, config))


def find_configuration(path: str | Path) -> Path:
    """Return a folder with the configuration of what the user names; no weight is downloaded for it.

    Raises: CheckpointError.
    """
    return _demo() if str(path) == DEMO else resolve_configuration(str(path))


def _rules(rules: str | Path | Rules | None, machine: Machine, config: ModelConfig, packed: bool) -> Rules:
    if rules is None:
        return default_rules(machine, config, experts_packed=packed)
    return rules if isinstance(rules, Rules) else load_rules(rules)


def _usage(folder: Path, config: ModelConfig) -> Counts:
    return recall_usage(folder, config.moe_layers, config.n_routed_experts)


def _plan(rules: str | Path | Rules | None, config: ModelConfig, packed: bool, usage: Counts) -> Plan:
    machine = Machine.probe()
    return make_plan(_rules(rules, machine, config, packed), config, machine, experts_packed=packed, usage=usage)


def _image_format(folder: Path, config: ModelConfig) -> ImageFormat | None:
    """Read how images are prepared, which must be as the vision tower takes them. Raises: ConfigError."""
    if config.vision is None:
        return None
    images, most = ImageFormat.load(folder), IMAGE_PATCHES // MERGE**2
    path = folder / PREPROCESSOR_NAME
    expected = (config.vision.patch_size, MERGE)
    if (images.patch_size, images.merge) != expected:
        raise ConfigError(
            f"{path}: patch_size and merge_kernel_size: expected {expected[0]} and {expected[1]} "
            f"as in config.json, got {images.patch_size} and {images.merge}",
            hint=None if path.exists() else "there is no such file, and K2.6's values stand for it",
        )
    if images.max_tokens > most:
        raise ConfigError(f"{path}: expected limits that give an image at most {most} tokens, got {images.max_tokens}")
    return images


def _generation_config(folder: Path) -> dict[str, Any]:
    stated = read_generation_config(folder)
    # A bad value is an error of the checkpoint, not of the first request.
    SamplingParams.defaults(True, stated, str(folder / GENERATION_NAME))
    return stated
