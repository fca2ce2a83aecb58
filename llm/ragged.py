"""Decoders for batches whose rows have lengths of their own: Hugging Face models rewritten, and their export.

`make_ragged(model, batch, capacity)` gives a module with KV caches of its own whose forward is

    (tokens int64 [B, S], past int32 [B], q_len int32 [B]) -> logits

Row b has `past[b]` tokens in its caches and gets `q_len[b]` new ones, the first of its S; what stands behind them is
padding: any ids of the vocabulary. Its logits are those of its last new token, [B, V] (`logits="last"`; for q_len 0 of
any finite value), or of every token, [B, S, V] (`logits="all"`; those of padding mean nothing). `export_ragged` lowers
it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .hugging_face import Rewritten, rewrite, with_eager_attention


class RaggedDecoder(nn.Module):
    """What `make_ragged` returns.

    Attributes:
        batch, capacity: rows of a call, and of each cache.
        vocabulary: number of logits.
        eos_ids: tokens that end a text, as far as the model's configuration names them.
    """

    def __init__(self, rewritten: Rewritten, batch: int, capacity: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = rewritten.model
        self.batch, self.capacity = batch, capacity
        self.vocabulary, self.eos_ids = rewritten.vocabulary, rewritten.eos_ids
        self._step = rewritten.step
        self._step.owner = self.get_buffer
        for layer in rewritten.layers:
            for name, size in ((layer.key_cache, layer.d), (layer.value_cache, layer.dv)):
                bytes_or_elements = size // 2 if dtype == torch.uint8 else size
                cache = torch.zeros(batch, capacity, layer.kv_heads, bytes_or_elements, dtype=dtype)
                self.register_buffer(name, cache, persistent=False)
                if not dtype.is_floating_point:
                    scales = torch.zeros(batch, capacity, layer.kv_heads, 1)
                    self.register_buffer(name.replace("_cache_", "_scales_"), scales, persistent=False)

    def forward(self, tokens: Tensor, past: Tensor, q_len: Tensor) -> Tensor:
        """See the module's docstring. Raises ValueError for lengths that do not fit (eager only)."""
        # read by models that look positions up; clamped, as padding may lie behind the last one
        positions = (past.reshape(-1, 1) + torch.arange(tokens.shape[1])).clamp(max=self.capacity - 1)
        with self._step.running(past, q_len):
            output = self.model(input_ids=tokens, position_ids=positions, use_cache=False)
        logits: Tensor = output.logits
        return logits[:, 0] if self._step.last_only else logits

    def reset(self) -> None:
        """Fill the caches with zeros."""
        for name, cache in self.named_buffers():
            if name.startswith(("key_cache_", "value_cache_", "key_scales_", "value_scales_")):
                cache.zero_()


def make_ragged(
    model: Any,
    batch: int,
    capacity: int,
    logits: str = "last",
    cache_dtype: torch.dtype | None = None,
    check: bool = True,
) -> RaggedDecoder:
    """Rewrite a causal language model of transformers; the model itself stays as it is, parameters are shared.

    Attention goes through `executorch_webgpu::group_query_attention`, with the rotary embedding inside it. Nothing is
    known of any family: attention layers, the kind of rotary embedding, sliding windows, softcaps and sinks are found
    by running the model once. Needed are transformers' attention interface and a rotary embedding from a table, or
    positions that are embedded.

    Args:
        model: a `transformers` model with a language modelling head, in eval mode.
        batch: rows of every call.
        capacity: rows of the caches: the most tokens a batch row can hold.
        logits: "last" or "all"; see the module's docstring.
        cache_dtype: float32, float16 or bfloat16; the model's dtype if None. Or int8, or uint8 (4 bits a number, head
            sizes that are powers of two), with a scale for each token and head.
        check: compare with the model on a few tokens.
    Raises:
        ValueError: bad arguments.
        NotImplementedError: the model cannot be rewritten, or `check` found a difference; says why.
    """
    if logits not in ("last", "all"):
        raise ValueError(f"logits is {logits!r}; it must be 'last' or 'all'")
    batch, capacity = _count("batch", batch), _count("capacity", capacity)
    if cache_dtype is not None and cache_dtype not in _TOLERANCE:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _TOLERANCE)
        raise ValueError(f"cache_dtype is {cache_dtype!r}; it must be one of torch's {known}, or None")
    if not hasattr(model, "get_output_embeddings") or not hasattr(model, "config"):
        raise ValueError(f"expected a causal language model of transformers, got {type(model).__name__}")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and capacity > longest:
        raise ValueError(f"capacity {capacity} is above the model's {longest} positions")
    rewritten = rewrite(model, capacity, logits == "last")
    decoder = RaggedDecoder(rewritten, batch, capacity, cache_dtype or _dtype(model))
    decoder.eval()
    if check:
        compare(model, decoder)
        decoder.reset()
    return decoder


def _count(name: str, value: Any) -> int:
    """A positive integer of Python or numpy. Raises ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be a positive integer")
    return int(value)


def _longest(max_tokens: Any, capacity: int) -> int:
    """Most tokens of a row in one call; None stands for the capacity. Raises ValueError."""
    if max_tokens is None:
        return capacity
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int | np.integer):
        raise ValueError(f"max_tokens is {max_tokens!r}; it must be an integer in [1, {capacity}], or None")
    if not 1 <= max_tokens <= capacity:
        raise ValueError(f"max_tokens is {max_tokens}, outside [1, {capacity}]")
    return int(max_tokens)


def _methods(given: Any) -> dict[str, Any]:
    """Constant methods by name. Raises ValueError for anything else."""
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise ValueError(f"constant_methods is {given!r}; it must be a dict of values by name, or None")
    return dict(given)


def _partitioner(given: Any) -> Any:
    """The partitioner to use. Raises ValueError for anything but a `WebGPUPartitioner`, or None."""
    from ..partitioner import WebGPUPartitioner

    if given is not None and not isinstance(given, WebGPUPartitioner):
        raise ValueError(f"partitioner is {given!r}; it must be a WebGPUPartitioner, or None")
    return WebGPUPartitioner() if given is None else given


def _dtype(model: Any) -> torch.dtype:
    """What a model computes in."""
    found: torch.dtype = model.get_input_embeddings().weight.dtype
    return found


_TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1, torch.int8: 1e-1, torch.uint8: 0.5}
"""Largest root mean square error of logits, relative to their own, by the coarsest of the dtypes involved."""


def compare(model: Any, decoder: RaggedDecoder) -> None:
    """Run five tokens through a model at once, and in two calls, with padding, through what was made of it.

    Raises:
        NotImplementedError: the logits of the last one differ by more than rounding explains.
    """
    if decoder.capacity < 5:
        return
    ids = torch.randint(0, decoder.vocabulary, (1, 5), generator=torch.Generator().manual_seed(0))
    lengths = [torch.zeros(decoder.batch, dtype=torch.int32) for _ in range(4)]
    past, q_len, later, rest = lengths
    q_len[-1], later[-1], rest[-1] = 3, 3, 2
    tokens = torch.zeros(decoder.batch, 4, dtype=torch.int64)
    with torch.no_grad():
        expected = with_eager_attention(model)(input_ids=ids, use_cache=False).logits[0, -1].float()
        tokens[-1, :3] = ids[0, :3]
        decoder(tokens, past, q_len)
        tokens[-1, :2] = ids[0, 3:]
        found = decoder(tokens, later, rest)[-1]
        found = (found if found.dim() == 1 else found[1]).float()
    dtypes = {_dtype(model), decoder.get_buffer("key_cache_0").dtype}
    limit = max(_TOLERANCE[dtype] for dtype in dtypes)
    error = float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt().clamp(min=1e-12))
    if not error <= limit:
        raise NotImplementedError(
            f"{type(model).__name__} cannot be rewritten for ragged batches: after five tokens its logits are off by "
            f"{error:.1%}. It keeps state that is no KV cache, or its attention does more than the operator can"
        )


def export_ragged(
    model: Any,
    batch: int,
    capacity: int,
    *,
    max_tokens: int | None = None,
    logits: str = "last",
    cache_dtype: torch.dtype | None = None,
    check: bool = True,
    constant_methods: Mapping[str, Any] | None = None,
    partitioner: Any = None,
) -> Any:
    """A Hugging Face model as a lowered program for ragged batches.

    Args:
        model, batch, capacity, logits, cache_dtype, check: as of `make_ragged`.
        max_tokens, constant_methods, partitioner: as of `lower_ragged`.
    Returns:
        The `ExecutorchProgramManager`; `.buffer` is the `.pte`.
    Raises:
        ValueError, NotImplementedError: as of `make_ragged`.
    """
    _longest(max_tokens, _count("capacity", capacity))  # before the model is rewritten
    further = _methods(constant_methods)
    _partitioner(partitioner)
    decoder = make_ragged(model, batch, capacity, logits, cache_dtype, check)
    constants: dict[str, Any] = {"get_eos_ids": list(decoder.eos_ids)} if decoder.eos_ids else {}
    constants |= further
    return lower_ragged(
        decoder,
        batch,
        capacity,
        decoder.vocabulary,
        max_tokens=max_tokens,
        constant_methods=constants,
        partitioner=partitioner,
    )


def lower_ragged(
    module: nn.Module,
    batch: int,
    capacity: int,
    vocabulary: int,
    *,
    max_tokens: int | None = None,
    constant_methods: Mapping[str, Any] | None = None,
    partitioner: Any = None,
) -> Any:
    """Any module with the forward of this module's docstring as a lowered program.

    Args:
        batch: rows of a call, static.
        capacity: rows of its caches.
        vocabulary: number of logits.
        max_tokens: most tokens of a row in one call: S is 1 to max_tokens. None: the capacity.
        constant_methods: further constant methods, besides get_max_context_len (capacity), get_max_seq_len
            (max_tokens), get_max_batch_size and get_vocab_size; for example get_bos_id and get_eos_ids.
        partitioner: a `WebGPUPartitioner`; a new one with default options if None.
    Returns:
        The `ExecutorchProgramManager`; `.buffer` is the `.pte`.
    Raises:
        ValueError: batch, capacity, vocabulary or max_tokens is no positive integer; max_tokens is above the capacity;
            another argument is of a wrong type.
        NotImplementedError: torch.export does not take the module, or operators of it cannot be delegated; says which.
    """
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    batch, capacity, vocabulary = _count("batch", batch), _count("capacity", capacity), _count("vocabulary", vocabulary)
    longest, further = _longest(max_tokens, capacity), _methods(constant_methods)
    used = _partitioner(partitioner)
    try:
        exported = export_program(module, batch, longest)
    except Exception as error:  # of many types, all about the module; the first line says what
        first = next(iter(str(error).strip().splitlines()), "")
        raise NotImplementedError(
            f"torch.export does not take this module ({type(error).__name__}: {first}). A mixture of experts that "
            "looks at which experts were chosen is such a module"
        ) from error
    edge = to_edge_transform_and_lower(
        exported,
        partitioner=[used],
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        constant_methods={
            "get_max_context_len": capacity,
            "get_max_seq_len": longest,
            "get_max_batch_size": batch,
            "get_vocab_size": vocabulary,
            **further,
        },
    )
    if used.refused:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in used.refused.items())
        raise NotImplementedError(f"a batch needs its whole decoder in one delegate, but these stay outside: {reasons}")
    return edge.to_executorch()


def export_program(module: nn.Module, batch: int, max_tokens: int) -> torch.export.ExportedProgram:
    """The exported program of such a module, with S of 1 to max_tokens (static where that is 1)."""
    length = min(max_tokens, 3)
    lengths = torch.ones(batch, dtype=torch.int32)
    example = (torch.zeros(batch, length, dtype=torch.int64), torch.zeros_like(lengths), lengths)
    shapes: Sequence[Any] | None = None
    if max_tokens > 1:
        shapes = ({1: torch.export.Dim("tokens", min=1, max=max_tokens)}, None, None)
    with torch.no_grad():
        return torch.export.export(module, example, dynamic_shapes=shapes, strict=False)
