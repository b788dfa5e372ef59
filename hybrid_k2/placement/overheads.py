"""What a plan with a GPU holds beside weights and KV cache: bounds on work memory, from the shapes of what is computed.

workspace   activations of a chunk, work buffers of attention, logits, the partial sums of decode attention, the rows of
            experts that are computed on the GPU
staging     buffers for the experts that a streamed prefill brings over, and for one that becomes a hot one
graphs      a CUDA graph of the decode step for each size of batch, and the work memory that they share
allocator   what torch's allocator rounds up
encoding    wherever the vision tower is: one image on its way through it
features    on the host: rows of encoded images that wait for their prompts
hand-off    on the host: the memory through which experts and GPU pass rows and results, pinned
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from hybrid_k2.config import ModelConfig
from hybrid_k2.placement.groups import expert_parameters, weight_bytes
from hybrid_k2.placement.memories import HOST, TWIN, memory_of
from hybrid_k2.placement.sizes import KIB, MIB
from hybrid_k2.vision_config import MERGE, VisionConfig

SEQUENCES = 8  # that may decode at the same time
WORK_BYTES = 64 * MIB  # a work buffer of attention (model/mla.py)
DECODE_SPLITS = 128  # of a sequence's keys, each with partial sums (accelerator/kernels/mla_decode.py)
EXPERT_TOKENS = 1024  # of a chunk that pass through experts on the GPU at a time
# While some experts are computed, the next ones arrive, of the same layer or of the next: twice four are 190 MB at the
# size of K2.6, 8 ms of PCIe 4 x16.
STAGED_EXPERTS = 8
EXCHANGED_EXPERTS = 1  # what is on its way to become a hot one
GRAPH_ROWS = (1, 2, 4, 8)  # sequences of the decode steps that are recorded
GRAPH_BYTES_PER_LAYER = 256 * KIB  # some 30 launches, by common experience 8 KiB each
ROUNDING_BYTES = MIB  # the allocator gives large tensors whole 2 MiB: half of that is lost with each
MATRICES = {"attention": 5, "router": 1, "dense_mlp": 3, "shared_experts": 3, "embedding": 1, "lm_head": 1}
FP32_BYTES = 4
FEATURE_ROWS = 8192  # of encoded images that wait for their prompts: two of the largest (engine/sight.py)
IMAGE_PATCHES = 17928  # of the largest image: 4482 tokens (protocol/images.py)
IMAGE_PIECE = 2048  # patches that are computed with at a time (model/vision.py)


@dataclass(frozen=True)
class Overhead:
    """Bound what something beside weights and KV cache takes on a device."""

    what: str
    device: str
    nbytes: int


@dataclass(frozen=True)
class Work:
    """Say what is computed beside the host, and where.

    hot, stream: experts are computed there, too. deferred: results of experts wait there for the next layer.
    graphs: decode steps are recorded. halves: of a batch that has attention at a time are so many.
    context_tokens: of the longest sequence.
    """

    config: ModelConfig
    device: str | None
    activation_dtype: str
    chunk_tokens: int
    hot: bool = False
    stream: bool = False
    deferred: bool = False
    graphs: bool = False
    halves: int = 1
    context_tokens: int = 0
    sequences: int = SEQUENCES


def gpu_overheads(work: Work, matrices: int, matrix_bytes: int) -> tuple[Overhead, ...]:
    """List what the work takes beside so many matrices of weights and cache on its GPU."""
    parts = _parts(work, matrices, matrix_bytes)
    (workspace, *rest) = (Overhead(what, work.device or "", nbytes) for what, nbytes in parts if nbytes)
    return (workspace, *staging(work), *rest, Overhead("hand-off", HOST, handoff_bytes(work)))


def image_overheads(work: Work, device: str, dtype: str) -> tuple[Overhead, ...]:
    """Return the room for an image on its way through the vision tower, on its device, and for rows that wait.

    Beside the rows that are kept, a chunk may need its own, and the others of two images that begin or end in it.
    """
    vision = work.config.vision
    if vision is None:
        raise ValueError("images: expected a model with a vision tower")
    on_host = memory_of(device) == HOST
    rounding = 0 if on_host else 4 * vision.num_hidden_layers * ROUNDING_BYTES
    encoding = encoding_bytes(vision, dtype, on_host=on_host) + rounding
    rows = FEATURE_ROWS + work.chunk_tokens + 2 * IMAGE_PATCHES // MERGE**2
    features = rows * work.config.hidden_size * _width(work)
    return Overhead("encoding", device, encoding), Overhead("features", HOST, features)


def encoding_bytes(vision: VisionConfig, dtype: str, *, on_host: bool) -> int:
    """Bound what the largest image takes while it is encoded, and its rows for the language model.

    All the time that is the residual stream, and what a piece of it needs for itself. In blocks queries, keys and
    values in the dtype of products; at the end the rows. On a host the largest weight, too: bf16 is widened there, or
    packed by torch's products, which pack keys and values as well: no more than fp32 takes.
    """
    hidden, merged = vision.hidden_size, vision.merged_size
    stream = IMAGE_PATCHES * (hidden + vision.head_dim) * FP32_BYTES  # with the rotations
    piece = IMAGE_PIECE * max(8 * hidden, 2 * hidden + 2 * vision.intermediate_size) * FP32_BYTES
    heads = IMAGE_PATCHES * 3 * hidden * (2 if dtype == "bf16" and not on_host else FP32_BYTES)
    rows = IMAGE_PATCHES // MERGE**2 * vision.text_hidden_size * FP32_BYTES
    weight = merged * max(merged, vision.text_hidden_size) * FP32_BYTES if on_host else 0
    return stream + piece + max(heads, rows) + weight


def staging(work: Work) -> tuple[Overhead, ...]:
    """Return the room for experts on their way to where they are computed."""
    staged = (STAGED_EXPERTS if work.stream else 0) + (EXCHANGED_EXPERTS if work.hot and work.device != TWIN else 0)
    nbytes = staged * weight_bytes(expert_parameters(work.config), "int4")
    return (Overhead("staging", work.device or "", nbytes),) if nbytes else ()


def _parts(work: Work, matrices: int, matrix_bytes: int) -> Iterator[tuple[str, int]]:
    yield "workspace", workspace_bytes(work)
    yield "graphs", graphs_bytes(work) if work.graphs else 0
    # The weights of a small model share a few blocks.
    yield "allocator", min(matrices * ROUNDING_BYTES, matrix_bytes // 10)


def handoff_bytes(work: Work) -> int:
    """Return the host memory that both sides share: two slots with inputs, experts, weights and results of a batch."""
    config, rows = work.config, max(work.chunk_tokens, work.sequences)
    return 2 * rows * 2 * (config.hidden_size + config.num_experts_per_tok) * FP32_BYTES


def graphs_bytes(work: Work) -> int:
    """Bound the graphs, and the work memory of a decode step: it stays theirs, beside that of what is launched."""
    launches = len(GRAPH_ROWS) * work.config.num_hidden_layers * GRAPH_BYTES_PER_LAYER
    rows, at_once = max(GRAPH_ROWS), max(GRAPH_ROWS) // work.halves
    part = replace(work, chunk_tokens=at_once, sequences=at_once)
    logits = rows * work.config.vocab_size * FP32_BYTES
    attention = at_once * _attention_row(part) + _partial_bytes(part)
    return launches + logits + rows * _stream_row(part) + max(attention, _mlp_bytes(part))


def workspace_bytes(work: Work) -> int:
    """Bound the memory of one forward pass: a chunk of a prompt, or a step of all sequences, whichever is more."""
    config, rows = work.config, max(work.chunk_tokens, work.sequences)
    logits = work.sequences * config.vocab_size * 2 * FP32_BYTES
    attention = rows * _attention_row(work) + _attention_buffers(work)
    return rows * _stream_row(work) + logits + max(attention, _partial_bytes(work), _mlp_bytes(work))


def _partial_bytes(work: Work) -> int:
    """Bytes of the partial sums of decode attention."""
    config = work.config
    return work.sequences * DECODE_SPLITS * config.num_attention_heads * (config.kv_lora_rank + 2) * FP32_BYTES


def _mlp_bytes(work: Work) -> int:
    """Bytes of the MLP's gate, up and their product, and of the rows of experts that are computed on the GPU."""
    config, rows = work.config, max(work.chunk_tokens, work.sequences)
    experts = 0
    if work.hot or work.stream:
        inner = config.hidden_size + 2 * config.moe_intermediate_size
        experts = min(rows, EXPERT_TOKENS) * config.num_experts_per_tok * inner * FP32_BYTES
    return rows * 3 * max(config.intermediate_size, config.moe_intermediate_size) * _width(work) + experts


def _stream_row(work: Work) -> int:
    """Bytes that a row holds from layer to layer: the stream, what is normed, two results, the routed ones in fp32."""
    routed = 2 if work.deferred else 1
    return work.config.hidden_size * (4 * _width(work) + routed * FP32_BYTES)


def _attention_row(work: Work) -> int:
    """Bytes of a row's queries (as projected, and twice in fp32) and values (fp32, and as the output reads them)."""
    config = work.config
    query = config.qk_head_dim * (_width(work) + 2 * FP32_BYTES)
    value = config.v_head_dim * (_width(work) + FP32_BYTES)
    return config.num_attention_heads * (query + value)


def _attention_buffers(work: Work) -> int:
    """Bytes of the longest context's latents and of one head's keys and values, in fp32; and scores, three times."""
    config, tokens = work.config, work.context_tokens
    head = config.qk_head_dim + config.qk_nope_head_dim + config.v_head_dim
    return tokens * config.latent_dim * FP32_BYTES + max(WORK_BYTES, tokens * head * FP32_BYTES) + 3 * WORK_BYTES


def _width(work: Work) -> int:
    return 2 if work.activation_dtype == "bf16" else FP32_BYTES
