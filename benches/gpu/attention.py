#!/usr/bin/env python3
"""Compiles a fused attention for the benchmark's engine with Triton; needs Triton, but no GPU.

    python3 attention.py FOLDER    # writes attention.cubin, and attention.txt: what a launch needs

The benchmark takes them from the folder that it is started in. Llama-3-8B's shape: queries
[32 heads][rows][128] over keys and values [token][8 heads][128], all bf16; row r sees the tokens up to
`first` + r. The online softmax is that of FlashAttention (Dao et al., 2022).
"""

import pathlib
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROWS = 128
COLUMNS = 128
WARPS = 8
STAGES = 2


@triton.jit
def step(query, keys, values, at, top, total, sums, rows_at, scale, MASKED: tl.constexpr, COLUMNS: tl.constexpr):
    columns = at + tl.arange(0, COLUMNS)
    dims = tl.arange(0, 128)
    key = tl.load(keys + columns[None, :] * 1024 + dims[:, None])
    scores = tl.dot(query, key) * scale
    if MASKED:
        scores = tl.where(columns[None, :] <= rows_at[:, None], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    value = tl.load(values + columns[:, None] * 1024 + dims[None, :])
    sums = tl.dot(weights.to(tl.bfloat16), value, sums * shrink[:, None])
    return new_top, total * shrink + tl.sum(weights, 1), sums


@triton.jit
def attend(queries, keys, values, out, rows, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    head = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, 128)
    query = tl.load(queries + (head * rows + row)[:, None] * 128 + dims[None, :])
    keys += head // 4 * 128
    values += head // 4 * 128
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, 128], tl.float32)
    # 1 / sqrt(128), for powers of 2 instead of e.
    scale = 0.08838834764 * 1.44269504089
    for at in range(0, first, COLUMNS):
        top, total, sums = step(
            query, keys, values, at, top, total, sums, first + row, scale, False, COLUMNS
        )
    for at in range(first, first + (tl.program_id(0) + 1) * ROWS, COLUMNS):
        top, total, sums = step(
            query, keys, values, at, top, total, sums, first + row, scale, True, COLUMNS
        )
    at_out = (row * 32 + head)[:, None] * 128 + dims[None, :]
    tl.store(out + at_out, (sums / total[:, None]).to(tl.bfloat16))


def main():
    folder = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    names = ["queries", "keys", "values", "out", "rows", "first"]
    signature = dict.fromkeys(names[:4], "*bf16") | dict.fromkeys(names[4:], "i32")
    signature |= {"ROWS": "constexpr", "COLUMNS": "constexpr"}
    source = ASTSource(
        attend,
        signature,
        {(6,): ROWS, (7,): COLUMNS},
        {(i,): [["tt.divisibility", 16]] for i in range(6)},
    )
    options = {"num_warps": WARPS, "num_stages": STAGES}
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    (folder / "attention.cubin").write_bytes(kernel.asm["cubin"])
    shared = kernel.metadata.shared
    (folder / "attention.txt").write_text(f"{kernel.metadata.name} {shared} {WARPS * 32} {ROWS}\n")
    parameters = kernel.asm["ptx"].split(".entry", 1)[1].split(")", 1)[0].count(".param")
    print(f"{kernel.metadata.name}: {shared} B shared, {parameters} parameters")


if __name__ == "__main__":
    main()
