#!/usr/bin/env python3
"""Writes the KV that a model computes of the traces' conversations, for the codec's benchmarks.

    pip install -r tools/kv/requirements.txt
    tools/kv/dump.py MODEL OUT [--traces FOLDER] [--conversations N] [--tokens N] [--block N]

MODEL is a folder that transformers loads, or a GGUF file of an architecture that it reads. OUT becomes bf16
values as [layer][key, value][token][head][value]: keys as attention takes them, after RoPE, which is what
engines keep; of every conversation its whole blocks. The options that the benchmarks want for the file are
printed, and so is the perplexity of each conversation: where it is not what one expects of such a model, its KV is
not real either.

Models whose layers differ in shape, or that keep latents in place of keys and values, are refused.
"""

import argparse
import gzip
import itertools
import json
import math
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

TRACES = ["agent-text-miniswe", "agent-text-magagent", "tau-airline-gpt4o"]
# Tokens of one forward pass: the logits of more would not fit beside a large vocabulary.
CHUNK = 512


def texts_of(trace):
    """The text of each session: its messages, or the longest of its requests with the answer."""
    sessions = {}
    with gzip.open(trace, "rt", encoding="utf-8") as lines:
        for line in map(json.loads, lines):
            if "messages" in line:
                messages = line["messages"]
                text = "".join(f"{m.get('role') or ''}: {m.get('content') or ''}\n" for m in messages)
            else:
                text = (line.get("input") or "") + (line.get("output") or "")
            session = json.dumps(line.get("session_id"))
            if len(text) > len(sessions.get(session, "")):
                sessions[session] = text
    return sessions.values()


def conversations(folder):
    """All of them, one of each trace in turn, with their names."""
    traces = []
    for name in TRACES:
        if (path := folder / f"{name}.jsonl.gz").is_file():
            traces.append([(f"{name} {i}", text) for i, text in enumerate(texts_of(path), 1)])
    if not traces:
        sys.exit(f"there are no traces in {folder}")
    rounds = itertools.zip_longest(*traces)
    return [one for each in rounds for one in each if one is not None]


def load(path):
    if path.is_dir():
        folder, where, dtype = path, {}, "auto"
    else:
        # Its weights stay packed, and are computed with in f32.
        folder, where, dtype = path.parent, {"gguf_file": path.name}, torch.float32
    tokenizer = AutoTokenizer.from_pretrained(folder, **where)
    return tokenizer, AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **where).eval()


class Recorder(DynamicCache):
    """Keeps all that was ever given to it, also of layers that only look at a window."""

    def __init__(self, config):
        super().__init__(config=config)
        self.given = {}

    def update(self, keys, values, layer, *more, **named):
        self.given.setdefault(layer, []).append((keys, values))
        return super().update(keys, values, layer, *more, **named)

    def plane(self, layer, which):
        """[token][head][value], in bf16."""
        parts = [part[which] for part in self.given[layer]]
        return torch.cat(parts, dim=2)[0].transpose(0, 1).to(torch.bfloat16).contiguous()


@torch.inference_mode()
def forward(model, ids):
    """The KV of one sequence, and its perplexity."""
    cache = Recorder(model.config)
    loss, last = 0.0, None
    for chunk in torch.tensor([ids]).split(CHUNK, dim=1):
        logits = model(chunk, cache=cache, use_cache=True).logits[0].float()
        # The logits of a token are judged by the token behind it.
        before = logits[:-1] if last is None else torch.cat([last, logits[:-1]])
        after = chunk[0, 1:] if last is None else chunk[0]
        loss += torch.nn.functional.cross_entropy(before, after, reduction="sum").item()
        last = logits[-1:]
    return cache, math.exp(loss / (len(ids) - 1))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    beside = Path(__file__).resolve().parents[2].parent / "shared/traces"
    parser.add_argument("--traces", type=Path, default=beside)
    parser.add_argument("--conversations", type=int, default=3, help="so many of them")
    parser.add_argument("--tokens", type=int, default=4096, help="of a conversation, at most")
    parser.add_argument("--block", type=int, default=128, help="tokens of a block")
    args = parser.parse_args()

    tokenizer, model = load(args.model)
    planes, total = {}, 0
    for name, text in conversations(args.traces):
        if args.conversations == 0:
            break
        ids = tokenizer(text)["input_ids"][: args.tokens]
        tokens = len(ids) // args.block * args.block
        if tokens == 0:
            continue
        args.conversations -= 1
        cache, perplexity = forward(model, ids)
        for layer in cache.given:
            for which in (0, 1):
                plane = cache.plane(layer, which)[:tokens]
                planes.setdefault((layer, which), []).append(plane)
        total += tokens
        print(f"{name}: {tokens} of {len(ids)} tokens, perplexity {perplexity:.2f}", flush=True)

    shapes = {plane.shape[1:] for parts in planes.values() for plane in parts}
    if len(shapes) != 1:
        sys.exit(f"keys and values are not all of one shape: {sorted(shapes)}")
    [(heads, head_dim)] = shapes
    layers = len(planes) // 2
    with args.out.open("wb") as out:
        for layer in range(layers):
            for which in (0, 1):
                for plane in planes[layer, which]:
                    out.write(plane.view(torch.int16).numpy().tobytes())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters / 1e6:.0f} million parameters, {total} tokens")
    print(f"codec: --kv {args.out} --layers {layers} --heads {heads} --head-dim {head_dim} --block-tokens {args.block}")
    print(f"gpu link: --kv {args.out} --layers {layers} --planes 2 --token-bytes {2 * heads * head_dim}")


if __name__ == "__main__":
    main()
