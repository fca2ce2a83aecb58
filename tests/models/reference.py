"""Stateful eager references, and exact versions of ExecuTorch's llama ops to compute them with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    start_pos: int,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """llama::custom_sdpa in fp64: query [B, S, Hq, D], key and value [B, C, Hkv, D], mask [S, C] -> [B, S, Hq, D]."""
    length, heads, size = query.shape[1:]
    group = heads // key.shape[2]
    used = key.shape[1] if mask is not None else start_pos + length
    q = query.double().transpose(1, 2)
    k = key[:, :used].double().repeat_interleave(group, 2).transpose(1, 2)
    v = value[:, :used].double().repeat_interleave(group, 2).transpose(1, 2)
    scores = q @ k.transpose(-1, -2) * (size**-0.5 if scale is None else scale)
    if mask is not None:
        scores = scores + mask.double()
    elif is_causal:
        seen = torch.arange(used)[None, :] <= start_pos + torch.arange(length)[:, None]
        scores = scores.masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).contiguous().to(query.dtype)


def _update_cache(value: torch.Tensor, cache: torch.Tensor, start_pos: int) -> torch.Tensor:
    """value [B, S, H, D] into cache [B, C, H, D] at row start_pos; the result is as meaningless as the op's."""
    if start_pos < 0 or start_pos + value.shape[1] > cache.shape[1]:
        raise ValueError(f"rows {start_pos}..{start_pos + value.shape[1]} do not fit a cache of {cache.shape[1]}")
    cache[:, start_pos : start_pos + value.shape[1]] = value
    return torch.zeros(1)


def _update_cache_with_indices(
    value: torch.Tensor, cache: torch.Tensor, start_pos: int, indices: torch.Tensor
) -> torch.Tensor:
    """value [B, S, H, D] into cache [B, C, H, D] at rows indices [B, S]; the last write wins."""
    for row in range(value.shape[1]):
        for batch in range(value.shape[0]):
            cache[batch, int(indices[batch, row])] = value[batch, row]
    return torch.zeros(1)


def _custom_sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    start_pos: int,
    attn_mask: torch.Tensor | None = None,
    drpout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    return attend(query, key, value, start_pos, attn_mask, is_causal, scale)


def _sdpa_with_kv_cache(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    start_pos: int,
    seq_len: int,
    attn_mask: torch.Tensor | None = None,
    drpout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    _update_cache(key, key_cache, start_pos)
    _update_cache(value, value_cache, start_pos)
    return attend(query, key_cache, value_cache, start_pos, attn_mask, is_causal, scale)


class PreciseOps(TorchDispatchMode):
    """Runs the llama ops in plain torch with fp64 attention.

    ExecuTorch's own eager kernels print an error and return uninitialised memory where an argument is invalid; these
    raise instead.
    """

    OPS: ClassVar[dict[str, Callable[..., torch.Tensor]]] = {
        "llama::update_cache": _update_cache,
        "llama::update_cache_with_indices": _update_cache_with_indices,
        "llama::custom_sdpa": _custom_sdpa,
        "llama::sdpa_with_kv_cache": _sdpa_with_kv_cache,
    }

    WRITES: ClassVar[dict[str, int]] = {
        "llama::update_cache": 0,
        "llama::update_cache_with_indices": 0,
        "aten::index_put_": 2,
        "aten::index_put": 2,
        "aten::index_copy_": 3,
    }
    """Operators that write caches, and which argument holds the new rows."""

    def __init__(self, cache_dtype: torch.dtype | None = None) -> None:
        """`cache_dtype`: round what is written to caches to this type, as a cache of that type does."""
        super().__init__()
        self.cache_dtype = cache_dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = func._schema.name
        if self.cache_dtype is not None and name in self.WRITES and args[self.WRITES[name]].is_floating_point():
            rows = self.WRITES[name]
            args = (*args[:rows], args[rows].to(self.cache_dtype).to(args[rows].dtype), *args[rows + 1 :])
        return self.OPS.get(name, func)(*args, **(kwargs or {}))


class Reference:
    """An eager module with caches. `ref(tokens, position)` runs one step, `ref.reset()` empties the caches.

    call: (tokens int64 [S], position) -> tensor or tuple of tensors, on `module`.
    precise: run the llama ops with fp64 attention instead of ExecuTorch's eager kernels.
    cache_dtype: (attribute) round rows written to caches to this type; only with `precise`.
    buffers: the state, where it is more than the module's buffers. restart: resets state that is not in tensors.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        call: Callable[[np.ndarray, int], torch.Tensor | tuple[torch.Tensor, ...]],
        precise: bool = False,
        buffers: Callable[[], list[torch.Tensor]] | None = None,
        restart: Callable[[], None] | None = None,
    ) -> None:
        self.module = module
        self._call = call
        self._precise = precise
        self.cache_dtype: torch.dtype | None = None
        self._restart = restart
        self._state = buffers() if buffers is not None else list(module.buffers())
        self._initial = [buffer.detach().clone() for buffer in self._state]

    def reset(self) -> None:
        """Sets every buffer to the value that it had when this object was made."""
        with torch.no_grad():
            for buffer, initial in zip(self._state, self._initial, strict=True):
                buffer.copy_(initial)
        if self._restart is not None:
            self._restart()

    def state(self) -> list[torch.Tensor]:
        """Copies of all buffers, for `restore`. AssertionError where there is state that is not in tensors."""
        assert self._restart is None
        return [buffer.detach().clone() for buffer in self._state]

    @torch.no_grad()
    def restore(self, state: list[torch.Tensor]) -> None:
        """Go back to what `state` gave."""
        for buffer, kept in zip(self._state, state, strict=True):
            buffer.copy_(kept)

    @torch.no_grad()
    def __call__(self, tokens: np.ndarray, position: int) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """tokens int64 [S] at positions position..position+S -> what the program returns for them."""
        if not self._precise:
            return self._call(tokens, position)
        with PreciseOps(self.cache_dtype):
            return self._call(tokens, position)
