#!/usr/bin/env python3
"""What PyTorch needs for the compute that the benchmark's loads are hidden behind.

Llama-3-8B's shape with random weights: a suffix of 64 or 512 tokens behind a prefix of 32k tokens in
GPU memory. Matrix products by torch, attention by scaled_dot_product_attention, in one CUDA graph, so
that Python's own time does not count. Medians of seven after three for nothing.
"""

import statistics

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, DIM, PREFIX = 32, 4096, 14336, 32, 8, 128, 32 << 10


def weights(generator):
    shapes = [(HEADS + 2 * KV_HEADS) * DIM, HIDDEN, 2 * FFN]
    layer = lambda: [
        torch.randn(out, HIDDEN, device="cuda", dtype=torch.bfloat16, generator=generator) / HIDDEN**0.5
        for out in shapes
    ] + [torch.randn(HIDDEN, FFN, device="cuda", dtype=torch.bfloat16, generator=generator) / FFN**0.5]
    return [layer() for _ in range(LAYERS)]


def attend(query, key, value, rows):
    mask = causal_lower_right(rows, PREFIX + rows)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def repeated(query, key, value, rows):
    key, value = (each.repeat_interleave(HEADS // KV_HEADS, 1) for each in (key, value))
    mask = causal_lower_right(rows, PREFIX + rows)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask)


def suffix(hidden, layers, keys, values, rows, attention):
    for index, (qkv, out, up, down) in enumerate(layers):
        normed = rms_norm(hidden, (HIDDEN,))
        query, key, value = (normed @ qkv.T).split([HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM], 1)
        keys[index][PREFIX : PREFIX + rows] = key.view(rows, KV_HEADS, DIM)
        values[index][PREFIX : PREFIX + rows] = value.view(rows, KV_HEADS, DIM)
        heads = lambda each: each.transpose(0, 1)[None]
        attended = attention(
            heads(query.view(rows, HEADS, DIM)),
            heads(keys[index][: PREFIX + rows]),
            heads(values[index][: PREFIX + rows]),
            rows,
        )
        hidden = hidden + attended[0].transpose(0, 1).reshape(rows, HIDDEN) @ out.T
        gate, wide = (rms_norm(hidden, (HIDDEN,)) @ up.T).split(FFN, 1)
        hidden = hidden + (silu(gate) * wide) @ down.T
    return hidden


def measure(run):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[3:])


@torch.inference_mode()
def main():
    generator = torch.Generator("cuda").manual_seed(1)
    layers = weights(generator)
    kv = lambda: torch.randn(
        LAYERS, PREFIX + 512, KV_HEADS, DIM, device="cuda", dtype=torch.bfloat16, generator=generator
    )
    keys, values = kv(), kv()
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
    for rows in (64, 512):
        hidden = torch.randn(rows, HIDDEN, device="cuda", dtype=torch.bfloat16, generator=generator)
        best = None
        for attention in (attend, repeated):
            try:
                time = measure(lambda: suffix(hidden, layers, keys, values, rows, attention))
            except Exception as error:
                print(f"  {attention.__name__}: {str(error).splitlines()[0]}")
                torch.cuda.synchronize()
                continue
            print(f"  {rows} tokens, {attention.__name__}: {time:.2f} ms")
            best = time if best is None else min(best, time)
        if best is not None:
            print(f"figure gpu.torch_{rows} = {best:.3f} ms")


if __name__ == "__main__":
    main()
