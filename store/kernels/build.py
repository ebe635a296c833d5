#!/usr/bin/env python3
"""Compiles the kernels to PTX with NVRTC. Needs no GPU and no CUDA toolkit:

    python3 -m venv env && env/bin/pip install nvidia-cuda-nvrtc-cu12==12.4.127
    env/bin/python store/kernels/build.py

NVRTC 12.4 on purpose: drivers from CUDA 12.4 on accept its PTX, and compute_80 covers every GPU from
the A100 on. Each .ptx names the FNV-1a hash of what it was made from: its source and the headers (.cuh)
of its folder behind it, in the order of their names. A test of the crate compares the two.
"""

import ctypes
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
FOLDERS = [HERE, HERE.parent.parent / "benches" / "gpu"]
OPTIONS = [b"--gpu-architecture=compute_80", b"--std=c++17"]


def load_nvrtc():
    for folder in map(pathlib.Path, sys.path):
        for library in folder.glob("nvidia/cuda_nvrtc/lib/libnvrtc.so.12"):
            return ctypes.CDLL(str(library))
    sys.exit("no NVRTC: pip install nvidia-cuda-nvrtc-cu12==12.4.127")


def check(nvrtc, code):
    if code != 0:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        sys.exit(nvrtc.nvrtcGetErrorString(code).decode())


def compile_ptx(nvrtc, name, source, headers):
    program = ctypes.c_void_p()
    texts = (ctypes.c_char_p * len(headers))(*headers.values())
    names = (ctypes.c_char_p * len(headers))(*headers)
    created = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), source, name.encode(), len(headers), texts, names
    )
    check(nvrtc, created)
    options = (ctypes.c_char_p * len(OPTIONS))(*OPTIONS)
    failed = nvrtc.nvrtcCompileProgram(program, len(OPTIONS), options)
    size = ctypes.c_size_t()
    if failed:
        check(nvrtc, nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
        log = ctypes.create_string_buffer(size.value)
        check(nvrtc, nvrtc.nvrtcGetProgramLog(program, log))
        sys.exit(log.value.decode())
    check(nvrtc, nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size)))
    ptx = ctypes.create_string_buffer(size.value)
    check(nvrtc, nvrtc.nvrtcGetPTX(program, ptx))
    return ptx.value.decode()


def fnv1a(data):
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 % (1 << 64)
    return value


def main():
    nvrtc = load_nvrtc()
    for path in sorted(path for folder in FOLDERS for path in folder.glob("*.cu")):
        source = path.read_bytes()
        headers = {header.name.encode(): header.read_bytes() for header in sorted(path.parent.glob("*.cuh"))}
        ptx = compile_ptx(nvrtc, path.name, source, headers)
        target = path.with_suffix(".ptx")
        sources = source + b"".join(headers.values())
        target.write_text(f"// source fnv1a {fnv1a(sources):016x}\n{ptx.strip()}\n")
        print(target.name, len(ptx), "bytes")


if __name__ == "__main__":
    main()
