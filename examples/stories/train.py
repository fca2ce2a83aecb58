"""Trains the story model from scratch on generated text.

Run from the repository root, for example::

    python -m examples.stories.train --out /tmp/stories --max-seconds 300          # one data-centre GPU
    python -m examples.stories.train --out /tmp/stories --device cpu --full-documents 200 --steps 20

The best checkpoint so far is saved at every evaluation, so an interrupted run is not lost. Needs torch, numpy,
tokenizers and safetensors.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from examples.stories import data
from examples.stories.llama import Llama, LlamaConfig, load_model

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BOS, EOS = "<|bos|>", "<|eos|>"
STAGES = ("recall", "short", "full")
"""The styles of documents in the order of training; see `make_pool`."""
_CHUNK = 500  # documents per work item


def train_tokenizer(vocab_size: int, documents: int = 3000) -> Tokenizer:
    """Trains a byte-level BPE tokenizer on generated documents; `BOS` gets id 0 and `EOS` id 1."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [data.document_text(data.make_story(data.TRAIN_SEED_START + i)) for i in range(documents)]
    texts += [f" {word}" * (documents // 10) for word in data.value_words()]  # so that answers become single tokens
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def settings_for(tokenizer: Tokenizer, max_context: int) -> dict[str, Any]:
    """The contents of config.json that go with a tokenizer."""
    (newline,) = tokenizer.encode("\n").ids
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    return {"bos_id": bos, "eos_id": eos, "stop_ids": [eos, newline], "max_context": max_context}


def _make_rows(job: tuple[str, int, int, int, str]) -> tuple[np.ndarray, np.ndarray]:
    """Tokenises a range of seeds; see `make_pool`."""
    from tokenizers import Tokenizer

    tokenizer_json, first_seed, count, length, style = job
    tokenizer = Tokenizer.from_str(tokenizer_json)
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    cache: dict[str, list[int]] = {}

    def encode(text: str) -> list[int]:
        if text not in cache:
            cache[text] = tokenizer.encode(text).ids
        return cache[text] if len(text) <= 80 else cache.pop(text)

    tokens = np.full((count, length), eos, np.uint16)
    kind = np.zeros((count, length), np.uint8)
    for row in range(count):
        seed = first_seed + row
        if style == "recall":
            document: tuple[list[int], list[int]] | None = data.recall_document(seed, encode, bos, length)
        else:
            story = data.make_story(seed, 15, 80) if style == "short" else data.make_story(seed)
            document = data.training_document(story, encode, bos, eos, length)
        if document is not None:
            ids, is_answer = document
            tokens[row, : len(ids)] = ids
            kind[row, : len(ids)] = np.asarray(is_answer) + 1
    return tokens, kind


def make_pool(
    tokenizer: Tokenizer, first_seed: int, count: int, length: int, workers: int, style: str = "full"
) -> tuple[np.ndarray, np.ndarray]:
    """Generates and tokenises documents in parallel.

    Args:
        tokenizer: The tokenizer.
        first_seed: Seed of the first story; one row per consecutive seed.
        count: Number of rows.
        length: Tokens per row.
        workers: Processes to use.
        style: ``"full"``, ``"short"`` (much shorter stories) or ``"recall"`` (see `data.recall_document`).

    Returns:
        ``(tokens, kind)``, uint16 and uint8, both [count, length]: ids padded with the end-of-text id, and 0 for
        padding, 1 for text, 2 for an answer's tokens.
    """
    text = tokenizer.to_str()
    jobs = [(text, first_seed + i, min(_CHUNK, count - i), length, style) for i in range(0, count, _CHUNK)]
    results: Iterable[tuple[np.ndarray, np.ndarray]]
    if workers <= 1:
        parts = [_make_rows(job) for job in jobs]
    else:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            results = pool.imap(_make_rows, jobs)
            parts = list(results)
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


@torch.no_grad()  # type: ignore[untyped-decorator]
def answer_accuracy(model: Llama, tokens: torch.Tensor, kind: torch.Tensor, batch: int) -> tuple[float, float]:
    """Fraction of answers that greedy decoding gets exactly right, with the earlier right answers in context.

    An answer counts when the most likely token is the right one at each of its tokens (its newline included), which
    is the same as comparing greedy decoding's output.

    Args:
        model: The model; runs in its own dtype.
        tokens: int [rows, length] documents.
        kind: uint8 [rows, length], see `make_pool`.
        batch: Rows per forward pass.

    Returns:
        The accuracy over all answers and over the first question of each document only.
    """
    right = total = first_right = 0
    for i in range(0, len(tokens), batch):
        ids, is_answer = tokens[i : i + batch].long(), kind[i : i + batch, 1:] == 2
        wrong = (model(ids[:, :-1]).argmax(-1) != ids[:, 1:]) & is_answer
        starts = is_answer & ~F.pad(is_answer[:, :-1], (1, 0))
        number = (starts.cumsum(1) * is_answer).cpu()  # 1, 2, ... within the answers of a row
        bad = torch.zeros(len(ids), int(number.max()) + 1, dtype=torch.int64)
        bad.scatter_add_(1, number, wrong.cpu().long())
        counts = number.amax(1)
        valid = torch.arange(1, bad.shape[1]) <= counts[:, None]
        right += int(((bad[:, 1:] == 0) & valid).sum())
        total += int(counts.sum())
        first_right += int((bad[:, 1] == 0).sum())
    return right / total, first_right / len(tokens)


def save_checkpoint(directory: Path, model: Llama, tokenizer: Tokenizer, max_context: int) -> None:
    """Writes model.safetensors (float16), params.json, config.json and tokenizer.json."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().to("cpu", torch.float16).contiguous() for name, value in model.state_dict().items()}
    save_file(weights, directory / "model.safetensors")
    model.config.save(directory / "params.json")
    (directory / "config.json").write_text(json.dumps(settings_for(tokenizer, max_context), indent=2) + "\n")
    tokenizer.save(str(directory / "tokenizer.json"))


def half_precision_copy(model: Llama, max_context: int) -> Llama:
    """A float32 copy of the model whose weights have been rounded to float16, as they are stored."""
    copy = Llama(model.config, max_context)
    copy.load_state_dict({name: value.half().float() for name, value in model.state_dict().items()})
    copy.to(model.cos.device).eval()
    return copy


class Muon(torch.optim.Optimizer):  # type: ignore[misc]
    """Momentum with orthogonalised updates (Muon) for weight matrices; matrices of one shape are stacked.

    Args:
        params: Two-dimensional parameters.
        lr: Learning rate, on the scale of AdamW's.
        momentum: Decay of the running mean of gradients.
        weight_decay: Decoupled weight decay.
    """

    def __init__(
        self, params: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, closure: None = None) -> None:
        """Updates all parameters."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.Tensor]] = {}
            for parameter in group["params"]:
                shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in shapes.items():
                grads = torch.stack([p.grad for p in parameters])
                mean = self.state[parameters[0]].setdefault("mean", torch.zeros_like(grads))
                mean.lerp_(grads, 1 - group["momentum"])
                update = orthogonalise(grads.lerp(mean, group["momentum"])) * (0.2 * max(shape) ** 0.5 * group["lr"])
                decay = 1 - group["lr"] * group["weight_decay"]
                for parameter, change in zip(parameters, update, strict=True):
                    parameter.mul_(decay).sub_(change)


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Moves the singular values of matrices [n, rows, columns] close to 1 by a Newton-Schulz iteration."""
    x = matrices.to(torch.bfloat16) if matrices.is_cuda else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x if wide else x.mT).to(matrices.dtype)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--tokenizer", type=Path, help="existing tokenizer.json; trained afresh if not given")
    parser.add_argument("--init", type=Path, help="folder of a checkpoint to start from instead of random weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for style, documents, context, batch, share in (
        ("recall", 150_000, 96, 512, 0.4), ("short", 150_000, 256, 192, 0.6), ("full", 250_000, 640, 128, 1.0)
    ):  # fmt: skip
        parser.add_argument(f"--{style}-documents", type=int, default=documents, help="training documents")
        parser.add_argument(f"--{style}-context", type=int, default=context, help="tokens per document at most")
        parser.add_argument(f"--{style}-batch", type=int, default=batch, help="documents per step")
        parser.add_argument(f"--{style}-until", type=float, default=share, help="share of the run when it ends at last")
    parser.add_argument("--stage-loss", type=float, default=0.02, help="answer loss that ends the first two stages")
    parser.add_argument("--cache", type=Path, help="file that keeps the tokenised documents for another run")
    parser.add_argument("--eval-documents", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="data processes")
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--max-seconds", type=float, default=1e9, help="wall-clock limit for the training loop")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--answer-weight", type=float, default=5.0, help="loss weight of answer tokens")
    parser.add_argument("--text-weight", type=float, default=1.0, help="loss weight of all other tokens")
    parser.add_argument("--muon", action="store_true", help="use Muon instead of AdamW for the layers' matrices")
    parser.add_argument("--eval-every", type=int, default=250)
    parser.add_argument("--target-accuracy", type=float, default=0.998, help="start cooling down once reached")
    parser.add_argument("--cooldown", type=int, default=500, help="steps of linear decay after the target is reached")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rope-theta", type=float, default=LlamaConfig.rope_theta)
    defaults = LlamaConfig()
    for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name))
    return parser.parse_args(argv)


def load_documents(args: argparse.Namespace, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """Makes the training documents of all stages: ids and kinds by name, e.g. ``short_tokens``, ``short_kind``."""
    if sum(getattr(args, f"{style}_documents") for style in STAGES) > data.EVAL_SEED_START:
        raise SystemExit("the training seeds would run into the evaluation seeds")
    if args.cache and args.cache.exists():
        with np.load(args.cache) as file:
            return dict(file)
    first, result = data.TRAIN_SEED_START, {}
    for style in STAGES:
        count, length = getattr(args, f"{style}_documents"), getattr(args, f"{style}_context")
        result[f"{style}_tokens"], result[f"{style}_kind"] = make_pool(
            tokenizer, first, count, length, args.workers, style
        )
        first += count
    if args.cache:
        np.savez(args.cache, allow_pickle=False, **result)
    return result


def train(args: argparse.Namespace, tokenizer: Tokenizer, documents: dict[str, np.ndarray]) -> float:
    """Trains a model and saves its best checkpoint.

    Args:
        args: The command line.
        tokenizer: The tokenizer.
        documents: As of `load_documents`.

    Returns:
        Accuracy of the saved checkpoint on the first question of each held-out document.
    """
    torch.manual_seed(args.seed)
    device = torch.device(args.device)

    def on_device(tokens: np.ndarray, kind: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(tokens.astype(np.int16)).to(device), torch.from_numpy(kind).to(device)

    pools = {style: on_device(documents[f"{style}_tokens"], documents[f"{style}_kind"]) for style in STAGES}
    rows = make_pool(tokenizer, data.EVAL_SEED_START, args.eval_documents, args.full_context, 1)
    eval_tokens, eval_kind = on_device(*rows)
    config = LlamaConfig(
        dim=args.dim, n_layers=args.n_layers, n_heads=args.n_heads, n_kv_heads=args.n_kv_heads,
        head_dim=args.head_dim, hidden_dim=args.hidden_dim, vocab_size=args.vocab_size, rope_theta=args.rope_theta,
    )  # fmt: skip
    model = (load_model(args.init) if args.init else Llama(config, args.full_context)).to(device).train()
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("layers.")]
    tables = [p for name, p in model.named_parameters() if p.ndim == 2 and not name.startswith("layers.")]
    gains = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": tables, "weight_decay": args.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = []
    if args.muon:
        optimizers.append(Muon(matrices, lr=args.lr, weight_decay=args.weight_decay))
    else:
        groups.append({"params": matrices, "weight_decay": args.weight_decay})
    optimizers.append(torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=device.type == "cuda"))

    def loss_of(ids: torch.Tensor, kinds: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = model(ids[:, :-1])
        losses = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        target = kinds[:, 1:].flatten()
        weight = text * (target == 1).float() + args.answer_weight * (target == 2).float()
        answers = (target == 2).float()
        return (losses * weight).sum() / weight.sum(), (losses * answers).sum() / answers.sum()

    step_loss = torch.compile(loss_of, dynamic=False) if args.compile else loss_of
    autocast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()

    best, cooling_from, cooling_lr, lr = -1.0, -1, 0.0, 0.0
    start = time.time()
    stage, recent = 0, 1.0
    text_weights = [torch.tensor(w, device=device) for w in (0.0, 0.1 * args.text_weight, args.text_weight)]
    for step in range(1, args.steps + 1):
        elapsed = time.time() - start
        progress = min(1.0, max(step / args.steps, elapsed / args.max_seconds))
        style = STAGES[stage]
        if stage < 2 and (recent < args.stage_loss or progress > getattr(args, f"{style}_until")):
            stage, recent = stage + 1, 1.0
            print(f"step {step} {elapsed:.0f} s: stage {STAGES[stage]}", flush=True)
            style = STAGES[stage]
        tokens, kind = pools[style]
        index = torch.randint(len(tokens), (getattr(args, f"{style}_batch"),), device=device)

        if cooling_from >= 0:
            lr = cooling_lr * max(0.0, 1 - (step - cooling_from) / args.cooldown)
        else:
            lr = args.lr * min(1.0, step / args.warmup, 0.01 + (1 - progress) / 0.35)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr

        with autocast:
            loss, answer_loss = step_loss(tokens[index].long(), kind[index], text_weights[stage])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        if step % 20 == 0:
            recent += 0.2 * (answer_loss.item() - recent)
        last = step == args.steps or progress >= 1.0 or (cooling_from >= 0 and step >= cooling_from + args.cooldown)
        if step % args.eval_every == 0 and not last and stage == 0:
            print(f"step {step} {elapsed:.0f} s answer loss {answer_loss.item():.4f}", flush=True)
        elif last or step % args.eval_every == 0:
            rounded = half_precision_copy(model, args.full_context)
            accuracy, first_accuracy = answer_accuracy(rounded, eval_tokens, eval_kind, 64)
            print(
                f"step {step} {time.time() - start:.0f} s lr {lr:.2e} loss {loss.item():.3f} "
                f"answer loss {answer_loss.item():.4f} accuracy {accuracy:.4f} first {first_accuracy:.4f}",
                flush=True,
            )
            if first_accuracy >= best:
                best = first_accuracy
                save_checkpoint(args.out, model, tokenizer, args.full_context)
            if cooling_from < 0 and first_accuracy >= args.target_accuracy:
                cooling_from, cooling_lr = step, lr
        if last:
            break
    return best


def main(argv: list[str] | None = None) -> None:
    """Command-line entry point."""
    from tokenizers import Tokenizer

    args = parse_args(argv)
    began = time.time()
    tokenizer = Tokenizer.from_file(str(args.tokenizer)) if args.tokenizer else train_tokenizer(args.vocab_size)
    documents = load_documents(args, tokenizer)
    for style in STAGES:
        kind = documents[f"{style}_kind"]
        print(f"{style}: {len(kind)} documents, {(kind > 0).mean():.1%} used, {(kind == 2).mean():.1%} answers")
    print(f"{time.time() - began:.0f} s", flush=True)
    best = train(args, tokenizer, documents)
    print(f"best accuracy {best:.4f}, {time.time() - began:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()
