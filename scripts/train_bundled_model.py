"""Train the small language model that ships in `saelens_cosine/bundled/model`.

A Llama-style (pre-RMSNorm, rotary, SwiGLU, grouped-query) model on the source of CPython's standard library:

    python scripts/train_bundled_model.py --output saelens_cosine/bundled/model

Every training window is laid out as SAELens' activation store lays out a context: one beginning-of-sequence token, then
documents joined by that same token. Matrices are trained by Muon, everything else by AdamW, in bfloat16 autocast.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from saelens_cosine.bundled.corpus import stdlib_corpus

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: list[str], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=context,
    )


def pack(texts: list[str], tokenizer: PreTrainedTokenizerFast, seed: int | None) -> torch.Tensor:
    """All documents joined by the end-of-text token, as one `[tokens]` tensor; shuffled by file when a seed is given."""
    order = list(range(len(texts)))
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(texts), generator=generator).tolist()
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    stream: list[int] = []
    for i in order:
        stream.extend(ids[i])
        stream.append(tokenizer.eos_token_id)
    return torch.tensor(stream)


def windows(stream: torch.Tensor, context: int, bos: int, offset: int = 0) -> torch.Tensor:
    """`[n, context]` windows, each one beginning-of-sequence token and `context - 1` tokens of the stream."""
    body = context - 1
    n = (len(stream) - offset) // body
    rows = stream[offset : offset + n * body].view(n, body)
    return torch.cat([torch.full((n, 1), bos), rows], dim=1)


@torch.no_grad()
def heldout_loss(model: LlamaForCausalLM, batches: torch.Tensor) -> float:
    """Mean nats per predicted token, in float32."""
    model.eval()
    total = sum(model(input_ids=chunk, labels=chunk).loss.item() * len(chunk) for chunk in batches.split(16))
    model.train()
    return total / len(batches)


def learning_rate_factor(progress: float, warmup: float = 0.02, cooldown: float = 0.6) -> float:
    """Linear warm-up, plateau, linear decay to zero over the last `cooldown` of the run."""
    if progress < warmup:
        return progress / warmup
    return min(1.0, max(0.0, 1.0 - progress) / cooldown)


def say_it_for_transformers_4(folder: Path) -> None:
    """transformers 5 writes two names that version 4 does not know; both read these."""
    for name, key, value in (
        ("tokenizer_config.json", "tokenizer_class", "PreTrainedTokenizerFast"),
        ("config.json", "rope_theta", 10000.0),
    ):
        content = json.loads((folder / name).read_text())
        content[key] = value
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16, help="windows per step")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--d-model", type=int, default=192)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--d-mlp", type=int, default=400)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    train_texts = stdlib_corpus("train", include_tests=True)["text"][:]
    heldout_texts = stdlib_corpus("heldout")["text"][:]
    tokenizer = train_tokenizer(train_texts, args.vocab_size, args.context)
    stream = pack(train_texts, tokenizer, args.seed)
    heldout = windows(pack(heldout_texts, tokenizer, None), args.context, tokenizer.bos_token_id)
    heldout_bytes = sum(len(text.encode()) for text in heldout_texts)
    heldout_tokens = sum(len(ids) for ids in tokenizer(heldout_texts, add_special_tokens=False)["input_ids"])
    print(f"train {len(stream):,} tokens, held out {heldout_tokens:,} tokens, {heldout_bytes:,} bytes", flush=True)

    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.d_model,
        intermediate_size=args.d_mlp,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=args.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.02,
        use_cache=False,
        attn_implementation="eager",  # faster than the fused kernel at this head size on a CPU
    )
    model = LlamaForCausalLM(config)
    compiled = torch.compile(model)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)

    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.muon_lr, weight_decay=0.0, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    base_lr = [group["lr"] for opt in optimizers for group in opt.param_groups]

    generator = torch.Generator().manual_seed(args.seed)
    start, step, tokens, epoch_rows = time.monotonic(), 0, 0, torch.empty(0)
    position, log = 0, []
    while step < args.steps:
        if position + args.batch > len(epoch_rows):
            offset = int(torch.randint(args.context - 1, (1,), generator=generator))
            rows = windows(stream, args.context, tokenizer.bos_token_id, offset)
            epoch_rows, position = rows[torch.randperm(len(rows), generator=generator)], 0
        batch = epoch_rows[position : position + args.batch]
        position += args.batch
        factor = learning_rate_factor(step / args.steps)
        for lr, group in zip(base_lr, (g for opt in optimizers for g in opt.param_groups), strict=True):
            group["lr"] = lr * factor
        with torch.autocast("cpu", torch.bfloat16):
            loss = compiled(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in optimizers:
            opt.step()
            opt.zero_grad(set_to_none=True)
        step += 1
        tokens += batch.numel()
        log.append(loss.item())
        if step % 200 == 0:
            recent = sum(log[-200:]) / 200
            print(
                f"step {step} tokens {tokens:,} loss {recent:.4f} {tokens / (time.monotonic() - start):,.0f} tok/s",
                flush=True,
            )
        if step % 2000 == 0:
            print(f"step {step} held-out {heldout_loss(model, heldout[::8]):.4f}", flush=True)

    model.to(torch.bfloat16).float()  # the held-out loss below is that of the saved, rounded weights
    nats = heldout_loss(model, heldout)
    provenance = {
        "seed": args.seed,
        "steps": step,
        "training_tokens": tokens,
        "corpus_tokens": len(stream),
        "minutes": round((time.monotonic() - start) / 60, 1),
        "heldout_nats_per_token": round(nats, 4),
        "heldout_bits_per_byte": round(nats / math.log(2) * heldout_tokens / heldout_bytes, 4),
        "heldout_tokens": heldout_tokens,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    print(json.dumps(provenance, indent=2), flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    say_it_for_transformers_4(args.output)
    (args.output / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")


if __name__ == "__main__":
    main()
