"""Causal language models of transformers with `executorch_webgpu::group_query_attention` in place of their attention.

How a model is taken apart, without knowing its family: a copy that shares the parameters is run once on a few tokens.
Its attention implementation is then a function of this module, which sees each layer's heads and head sizes; its rotary
embeddings are wrapped, and `apply_rotary_pos_emb` is replaced in the layers that call it by one that leaves query and
key as they are, after finding out by example which rotary embedding the original is. From then on the function calls
the operator with the tables and the caches.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .group_query_attention import group_query_attention, last_rows, rotate

IMPLEMENTATION = "executorch_webgpu_ragged"
"""Name of the attention implementation in transformers' registry."""
_APPLY = "apply_rotary_pos_emb"
_PROBE = 5
"""Tokens of the run that finds out what the model does."""


@dataclass
class Layer:
    """An attention layer: sizes, names of its caches, and the tables by which its query and key are to turn."""

    number: int
    heads: int
    kv_heads: int
    d: int
    dv: int
    key_cache: str
    value_cache: str


@dataclass(frozen=True)
class Form:
    """Which rotary embedding a model's function is: the columns of its tables in use, and the order of pairs."""

    columns: tuple[int, int, int]
    interleaved: bool

    def table(self, wide: Tensor) -> Tensor:
        """Of a model's table [..., W] the columns that differ."""
        start, stop, step = self.columns
        return wide[..., start:stop:step]


@dataclass
class Step:
    """What the layers of one model share during a call.

    Attributes:
        owner: gives a cache by its name.
        tables: cosines and sines that `apply_rotary_pos_emb` was called with since the last attention, if any.
    """

    last_only: bool
    owner: Callable[[str], Tensor] | None = None
    past: Tensor | None = None
    q_len: Tensor | None = None
    tables: tuple[Tensor, Tensor] | None = None
    probing: bool = True
    layers: dict[nn.Module, Layer] = field(default_factory=dict)
    forms: set[Form] = field(default_factory=set)

    def scales(self, layer: Layer) -> dict[str, Tensor]:
        """Arguments of the operator that only packed caches need."""
        assert self.owner is not None
        if self.owner(layer.key_cache).dtype.is_floating_point:
            return {}
        return {name: self.owner(f"{name}_{layer.number}") for name in ("key_scales", "value_scales")}

    @contextmanager
    def running(self, past: Tensor, q_len: Tensor) -> Iterator[None]:
        """Lengths of a call. Nothing of it is left behind afterwards."""
        self.past, self.q_len = past, q_len
        try:
            yield
        finally:
            self.past = self.q_len = self.tables = None


@dataclass(frozen=True)
class Rewritten:
    """A rewritten copy of a model. `vocabulary`: number of its logits."""

    model: Any
    step: Step
    layers: tuple[Layer, ...]
    vocabulary: int
    eos_ids: tuple[int, ...]


def rewrite(model: Any, capacity: int, last_only: bool) -> Rewritten:
    """A copy of a model that attends through the operator; `RaggedDecoder` gives it caches.

    Args:
        capacity: positions of the rotary tables.
        last_only: compute the logits of each row's last new token only, [B, 1, V].
    Raises:
        NotImplementedError: the model cannot be rewritten; says why.
    """
    _register()
    copied = _copied(model, IMPLEMENTATION)
    step = Step(last_only)
    head = copied.get_output_embeddings()
    if head is None:
        raise _cannot(model, "it has no language modelling head (get_output_embeddings)")
    for module in copied.modules():
        _replace_rotation(module, step)
    rotary = [(parent, name) for parent in copied.modules() for name, child in parent.named_children() if _turns(child)]
    for parent, name in rotary:
        setattr(parent, name, Tables(getattr(parent, name), step))
    for module in copied.modules():
        module.ragged_step = step  # where the attention function finds it
    copied.set_output_embeddings(LastRow(head, step))
    _probe(model, copied, step, head)
    form = next(iter(step.forms), None)
    for parent, name in rotary:
        getattr(parent, name).fill(capacity, form)
    text = model.config.get_text_config()
    ids = getattr(model.generation_config, "eos_token_id", None) if model.can_generate() else None
    ids = text.eos_token_id if ids is None else ids
    eos_ids = tuple(ids) if isinstance(ids, list | tuple) else () if ids is None else (ids,)
    step.probing = False
    return Rewritten(copied, step, tuple(step.layers.values()), int(head.weight.shape[0]), eos_ids)


def _copied(model: Any, attention: str) -> Any:
    """A copy that shares the parameters, in eval mode, with another attention implementation."""
    copied = copy.deepcopy(model, {id(p): p for p in model.parameters()}).eval()
    for module in copied.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = attention
    return copied


def with_eager_attention(model: Any) -> Any:
    """The model with transformers' "eager" attention, which does all that the model's configuration asks for; "sdpa",
    the default, leaves out softcaps."""
    used = getattr(model.config.get_text_config(), "_attn_implementation", None)
    return model if used == "eager" else _copied(model, "eager")


def _cannot(model: Any, why: str) -> NotImplementedError:
    return NotImplementedError(f"{type(model).__name__} cannot be rewritten for ragged batches: {why}")


def _probe(model: Any, copied: Any, step: Step, head: nn.Module) -> None:
    """Run the copy, so that `step` learns its layers."""
    tokens = torch.arange(_PROBE)[None] % head.weight.shape[0]
    with torch.no_grad(), step.running(torch.zeros(1, dtype=torch.int32), torch.tensor([_PROBE], dtype=torch.int32)):
        try:
            copied(input_ids=tokens, position_ids=torch.arange(_PROBE)[None], use_cache=False)
        except (TypeError, AttributeError) as error:  # its parts call each other in a way that this module cannot know
            raise _cannot(model, f"with other attention it does not run ({type(error).__name__}: {error})") from error
    if not step.layers:
        raise _cannot(model, "it does not call transformers' attention interface")
    wanted = model.config.get_text_config().num_hidden_layers
    if len(step.layers) != wanted:
        raise _cannot(model, f"{len(step.layers)} of its {wanted} layers have attention of a known kind")
    if len(step.forms) > 1:
        raise _cannot(model, f"its layers have rotary embeddings of {len(step.forms)} kinds")


# -- attention


def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, attend)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention implementation: query [B, Hq, S, D], key and value [B, Hkv, S, D] -> ([B, S, Hq, Dv], None)."""
    step: Step = module.ragged_step
    if attention_mask is not None:
        raise NotImplementedError("attention with a mask besides the causal one")
    if step.probing:
        if module in step.layers:
            raise NotImplementedError(f"{type(module).__name__} attends more than once in a call")
        number, heads, kv_heads = len(step.layers), query.shape[1], key.shape[1]
        names = f"key_cache_{number}", f"value_cache_{number}"
        step.layers[module] = Layer(number, heads, kv_heads, key.shape[3], value.shape[3], *names)
        return value.repeat_interleave(heads // kv_heads, 1).transpose(1, 2), None
    layer = step.layers[module]
    assert step.owner is not None
    cos, sin = step.tables or (None, None)
    step.tables = None
    mixed = group_query_attention(
        *(x.transpose(1, 2) for x in (query, key, value)),
        step.owner(layer.key_cache),
        step.owner(layer.value_cache),
        step.past,
        step.q_len,
        layer.heads,
        layer.kv_heads,
        cos=cos,
        sin=sin,
        interleaved=any(form.interleaved for form in step.forms),
        window=sliding_window or 0,
        softcap=softcap or 0.0,
        sink=s_aux,
        scale=scaling,
        is_causal=getattr(module, "is_causal", True),
        **step.scales(layer),
    )
    return mixed, None


# -- rotary embedding


def _replace_rotation(module: nn.Module, step: Step) -> None:
    """Give a module whose forward calls `apply_rotary_pos_emb` a forward that calls ours; its class stays as it is."""
    forward = inspect.unwrap(type(module).forward)
    if _APPLY not in getattr(getattr(forward, "__code__", None), "co_names", ()):
        return
    original = forward.__globals__[_APPLY]

    def collect(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if step.probing:
            step.forms.add(_form(original, query, key, cos, sin, args, kwargs))
        else:
            step.tables = cos, sin
        return query, key

    names = {**forward.__globals__, _APPLY: collect}
    inner = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    inner.__kwdefaults__ = forward.__kwdefaults__
    module.forward = MethodType(inner, module)


def _form(original: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, args: Any, kwargs: Any) -> Form:
    """Which rotary embedding a function is, found by trying all that the operator has on random numbers."""
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(x.shape, generator=generator) for x in (query, key))
    cos, sin = cos.float(), sin.float()
    expected = original(q, k, cos, sin, *args, **kwargs)
    width = cos.shape[-1]
    for columns in ((0, width // 2, 1), (0, width, 2), (0, width, 1)):
        for interleaved in (False, True):
            form = Form(columns, interleaved)
            tables = [form.table(table) for table in (cos, sin)]
            for axis in (1, 2):
                if q.shape[3 - axis] != cos.shape[-2] or 2 * tables[0].shape[-1] > q.shape[-1]:
                    continue
                c, s = (table.reshape(-1, *table.shape[-2:]).unsqueeze(axis) for table in tables)
                if all(
                    torch.allclose(rotate(x, c, s, interleaved), e, atol=1e-5)
                    for x, e in zip((q, k), expected, strict=True)
                ):
                    return form
    raise NotImplementedError(f"{original.__module__}.{_APPLY} is no rotary embedding that the operator has")


def _turns(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RotaryEmbedding")


class Tables(nn.Module):
    """In place of a rotary embedding: gives whole tables [capacity, rot / 2] instead of the rows of some positions.

    A model may ask for several (for example for layers of two kinds); each way in which it does has a table.
    """

    def __init__(self, original: nn.Module, step: Step) -> None:
        super().__init__()
        self.original: nn.Module | None = original
        self.step = step
        self.asked: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """While probing, what the original gives for positions [1, S]; then the tables."""
        request = args, kwargs
        if not self.step.probing:
            number = self.asked.index(request)
            return self.get_buffer(f"cos_{number}"), self.get_buffer(f"sin_{number}")
        if request not in self.asked:
            self.asked.append(request)
        assert self.original is not None
        found: tuple[Tensor, Tensor] = self.original(x, position_ids, *args, **kwargs)
        return found

    def fill(self, capacity: int, form: Form | None) -> None:
        """Compute the tables. Raises NotImplementedError where they depend on how many positions are asked for."""
        original, x = self.original, torch.zeros(1)
        assert original is not None
        self.original = None
        if form is None:
            if self.asked:
                raise NotImplementedError(
                    f"{type(original).__name__} makes tables, but no layer hands them to a function {_APPLY}"
                )
            return
        for number, (args, kwargs) in enumerate(self.asked):
            few, *_ = original(x, torch.arange(min(4, capacity))[None], *args, **kwargs)
            cos, sin = original(x, torch.arange(capacity)[None], *args, **kwargs)
            if not torch.equal(cos[:, : few.shape[1]], few):
                raise NotImplementedError(
                    f"{type(original).__name__} turns by other angles for {capacity} positions than for few; a row's "
                    "length would change what its earlier keys hold. Choose a smaller capacity"
                )
            for name, table in (("cos", cos), ("sin", sin)):
                rows = form.table(table.float()).reshape(capacity, -1).contiguous()
                self.register_buffer(f"{name}_{number}", rows, persistent=False)


# -- logits


class LastRow(nn.Module):
    """The language modelling head on each batch row's last new token only, if so wanted: [B, S, K] -> [B, 1, V]."""

    def __init__(self, head: nn.Module, step: Step) -> None:
        super().__init__()
        self.head = head
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        q_len = self.step.q_len
        if not self.step.last_only or q_len is None:
            return self.head(x)
        return self.head(last_rows(x, q_len)[:, None])
