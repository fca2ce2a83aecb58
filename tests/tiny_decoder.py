"""Tiny decoders with ExecuTorch's cache and attention operators, lowered to `.pte` once per process.

Where ExecuTorch cannot be installed, TINY_DECODERS names a folder of programs that were made elsewhere by
`python -m tests.tiny_decoder FOLDER`.

`build("llama")` has Llama's calling convention of ExecuTorch (tokens, position of the first), `build("static")` the
same for one token a call, `build("hugging_face")` that of Hugging Face exports (tokens, position of each), and
`build("ragged")` that of batches whose rows have lengths of their own (tokens, past, q_len; logits of each row's last
token), `build("ragged_all")` the same with the logits of every token, `build("ragged_one")` with one row,
and `build("ragged_int8")` and `build("ragged_int4")` with packed caches (`build("ragged_int8_long")`: of LONG rows).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from tests.models.reference import PreciseOps

VOCAB, DIM, HEADS, KV_HEADS, HEAD = 260, 32, 2, 1, 16
CAPACITY, LONGEST = 24, 8
STOP = 257
"""Rows of the caches; most tokens a call; the token that the programs name as their end."""
BATCH = 4
"""Rows of the ragged programs."""
LONG = 64
"""Rows of the long ragged program's caches."""


class Decoder(torch.nn.Module):
    """One attention layer with position embeddings; weights are random and the same for every convention."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)

        def weight(*shape: int, scale: float = 1.0) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(*shape, generator=generator) * scale)

        self.embedding = weight(VOCAB, DIM)
        self.positions = weight(CAPACITY, DIM)
        self.q = weight(HEADS * HEAD, DIM, scale=DIM**-0.5)
        self.k = weight(KV_HEADS * HEAD, DIM, scale=DIM**-0.5)
        self.v = weight(KV_HEADS * HEAD, DIM, scale=DIM**-0.5)
        self.out = weight(VOCAB, HEADS * HEAD, scale=2 * DIM**-0.5)
        self.register_buffer("k_cache", torch.zeros(1, CAPACITY, KV_HEADS, HEAD))
        self.register_buffer("v_cache", torch.zeros(1, CAPACITY, KV_HEADS, HEAD))

    def step(self, tokens: torch.Tensor, positions: torch.Tensor, start: int) -> torch.Tensor:
        """tokens i64[1, S], their position embeddings f32[S, DIM] -> logits f32[1, S, VOCAB]."""
        length = tokens.shape[1]
        x = torch.nn.functional.embedding(tokens, self.embedding) + positions
        q = torch.nn.functional.linear(x, self.q).view(1, length, HEADS, HEAD)
        k = torch.nn.functional.linear(x, self.k).view(1, length, KV_HEADS, HEAD)
        v = torch.nn.functional.linear(x, self.v).view(1, length, KV_HEADS, HEAD)
        torch.ops.llama.update_cache(k, self.k_cache, start)
        torch.ops.llama.update_cache(v, self.v_cache, start)
        y = torch.ops.llama.custom_sdpa(q, self.k_cache, self.v_cache, start, None, 0.0, True)
        return torch.nn.functional.linear(x + y.reshape(1, length, HEADS * HEAD), self.out)


def _start(position: torch.Tensor, length: int) -> int:
    start = position[0].item()
    torch._check(start >= 0)
    torch._check(start < CAPACITY)
    torch._check(start + length <= CAPACITY)
    return start


class Llama(Decoder):
    """Returns the last token's logits f32[1, VOCAB]."""

    def forward(self, tokens: torch.Tensor, input_pos: torch.Tensor) -> torch.Tensor:
        start = _start(input_pos, tokens.shape[1])
        return self.step(tokens, self.positions.narrow(0, start, tokens.shape[1]), start)[:, -1]


class Static(Decoder):
    def forward(self, tokens: torch.Tensor, input_pos: torch.Tensor) -> torch.Tensor:
        return self.step(tokens, self.positions[input_pos], _start(input_pos, 1))


class HuggingFace(Decoder):
    """Returns every token's logits f32[1, S, VOCAB]."""

    def forward(self, input_ids: torch.Tensor, cache_position: torch.Tensor) -> torch.Tensor:
        positions = torch.nn.functional.embedding(cache_position, self.positions)
        return self.step(input_ids, positions, _start(cache_position, input_ids.shape[1]))


class Ragged(Decoder):
    """tokens i64[BATCH, S], past i32[BATCH], q_len i32[BATCH] -> logits f32[BATCH, VOCAB] of each row's last token."""

    def __init__(self, every: bool = False, batch: int = BATCH) -> None:
        """`every`: give the logits of every token instead, f32[BATCH, S, VOCAB]; `batch`: another number of rows."""
        super().__init__()
        self.every = every
        for name in ("k_cache", "v_cache"):
            self.register_buffer(name, torch.zeros(batch, CAPACITY, KV_HEADS, HEAD))

    def forward(self, tokens: torch.Tensor, past: torch.Tensor, q_len: torch.Tensor) -> torch.Tensor:
        positions = (past[:, None] + torch.arange(tokens.shape[1])).clamp(max=self.positions.shape[0] - 1)
        x = torch.nn.functional.embedding(tokens, self.embedding)
        x = x + torch.nn.functional.embedding(positions, self.positions)
        q, k, v = (torch.nn.functional.linear(x, weight) for weight in (self.q, self.k, self.v))
        x = x + self.attend(q, k, v, self.k_cache, self.v_cache, past, q_len)
        if not self.every:
            x = torch.ops.executorch_webgpu.last_rows(x, q_len)
        return torch.nn.functional.linear(x, self.out)

    def attend(self, *given: torch.Tensor) -> torch.Tensor:
        """`given`: query, key, value, caches and lengths."""
        found: torch.Tensor = torch.ops.executorch_webgpu.group_query_attention(*given, HEADS, KV_HEADS)
        return found


class RaggedAll(Ragged):
    def __init__(self) -> None:
        super().__init__(every=True)


class RaggedOne(Ragged):
    def __init__(self) -> None:
        super().__init__(batch=1)


class RaggedInt8(Ragged):
    """Its caches are int8 with a scale for each token and head."""

    DTYPE, BYTES, ROWS = torch.int8, HEAD, CAPACITY

    def __init__(self) -> None:
        super().__init__()
        for name in ("k", "v"):
            shape = (BATCH, self.ROWS, KV_HEADS)
            self.register_buffer(f"{name}_cache", torch.zeros(*shape, self.BYTES, dtype=self.DTYPE))
            self.register_buffer(f"{name}_scales", torch.zeros(*shape, 1))

    def attend(self, *given: torch.Tensor) -> torch.Tensor:
        scales = {"key_scales": self.k_scales, "value_scales": self.v_scales}
        found: torch.Tensor = torch.ops.executorch_webgpu.group_query_attention(*given, HEADS, KV_HEADS, **scales)
        return found


class RaggedInt4(RaggedInt8):
    """Its caches are int4, two codes a byte."""

    DTYPE, BYTES = torch.uint8, HEAD // 2


class RaggedInt8Long(RaggedInt8):
    ROWS = LONG

    def __init__(self) -> None:
        super().__init__()
        self.positions = torch.nn.Parameter(torch.randn(LONG, DIM, generator=torch.Generator().manual_seed(9)))


_CLASSES: dict[str, type[Decoder]] = {
    "llama": Llama, "static": Static, "hugging_face": HuggingFace, "ragged": Ragged, "ragged_all": RaggedAll,
    "ragged_one": RaggedOne, "ragged_int8": RaggedInt8, "ragged_int4": RaggedInt4,
    "ragged_int8_long": RaggedInt8Long,
}  # fmt: skip
_RAGGED = {
    "get_max_context_len": CAPACITY, "get_max_seq_len": LONGEST, "get_max_batch_size": BATCH, "get_vocab_size": VOCAB,
    "get_eos_ids": [STOP],
}  # fmt: skip
CONSTANTS = {
    "llama": {"get_max_context_len": CAPACITY, "get_max_seq_len": CAPACITY, "get_eos_ids": [STOP, STOP + 1]},
    "static": {},
    "hugging_face": {"get_max_seq_len": CAPACITY, "get_eos_id": STOP},
    "ragged": _RAGGED,
    "ragged_all": _RAGGED,
    "ragged_one": {**_RAGGED, "get_max_batch_size": 1},
    "ragged_int8": _RAGGED,
    "ragged_int4": _RAGGED,
    "ragged_int8_long": {**_RAGGED, "get_max_context_len": LONG},
}
"""Constant methods by convention; the static program has none, so that its capacity must be found otherwise."""


@dataclass(frozen=True)
class Tiny:
    """A lowered program and its weights in PyTorch."""

    pte: bytes
    data: bytes
    """The `.ptd` with the weights; empty if they are in the `.pte`."""


@cache
def build(convention: str, external: bool = False) -> Tiny:
    """Export and lower; the whole method becomes one delegate."""
    folder = os.environ.get("TINY_DECODERS")
    if folder and not external:
        return Tiny(Path(folder, f"{convention}.pte").read_bytes(), b"")
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401

    from executorch_webgpu.llm import group_query_attention  # noqa: F401
    from executorch_webgpu.partitioner import WebGPUPartitioner

    module = _CLASSES[convention]().eval()
    seq = torch.export.Dim("seq", min=1, max=LONGEST)
    length = 1 if convention == "static" else 3
    tokens = torch.arange(length)[None]
    shapes: tuple[object, ...] | None = ({1: seq}, None)
    example: tuple[torch.Tensor, ...] = (tokens, torch.tensor([2]))
    if convention == "static":
        shapes = None
    elif convention == "hugging_face":
        shapes = ({1: seq}, {0: seq})
        example = (tokens, torch.arange(length))
    elif convention.startswith("ragged"):
        shapes = ({1: seq}, None, None)
        lengths = torch.ones(module.k_cache.shape[0], dtype=torch.int32)
        example = (tokens.repeat(len(lengths), 1), lengths, lengths.clone())
    with torch.no_grad():
        exported = torch.export.export(module, example, dynamic_shapes=shapes, strict=True)
    edge = to_edge_transform_and_lower(
        exported,
        partitioner=[WebGPUPartitioner(external_weights="weights" if external else None)],
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        constant_methods=CONSTANTS[convention],
    )
    program = edge.to_executorch()
    data = b""
    if external:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            program.write_tensor_data_to_file(folder)
            data = Path(folder, "weights.ptd").read_bytes()
    return Tiny(bytes(program.buffer), data)


def greedy(prompt: Sequence[int], count: int) -> list[int]:
    """The `count` most likely next tokens, one by one, computed by PyTorch on the whole sequence each time."""
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401

    module, tokens = Llama().eval(), list(prompt)
    with torch.no_grad(), PreciseOps():
        for _ in range(count):
            x = torch.tensor([tokens])
            tokens.append(int(module.step(x, module.positions[: len(tokens)], 0)[0, -1].argmax()))
    return tokens[len(prompt) :]


def last_logits(tokens: Sequence[int]) -> torch.Tensor:
    """PyTorch's logits f32[VOCAB] after `tokens`."""
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401

    module = Llama().eval()
    with torch.no_grad(), PreciseOps():
        return module.step(torch.tensor([list(tokens)]), module.positions[: len(tokens)], 0)[0, -1]


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer.json in which each byte is a token (ids 0 to 255 in byte order) and STOP is a special one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    # Printable bytes stand for themselves, the others for characters from 256 on, as in GPT-2's vocabulary.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    letters = {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(rest)}
    tokenizer = Tokenizer(models.BPE({letters[byte]: byte for byte in range(256)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<begin>", special=True), AddedToken("<end>", special=True)])
    assert tokenizer.token_to_id("<end>") == STOP
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    for name in _CLASSES:
        Path(sys.argv[1], f"{name}.pte").write_bytes(build(name).pte)
