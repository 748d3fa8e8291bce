"""Compiles the Triton kernels for a GPU that need not be there; prints one line per kernel."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fxhybrid.codecs.kernels import cuda as triton_kernels

TARGET = GPUTarget("cuda", 80, 32)
POINTERS = {"codes": "*u8", "parameters": "*fp32", "limit": "fp32"}


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, object]) -> str:
    signature = {name: types.get(name, POINTERS.get(name, "i32")) for name in kernel.arg_names}
    signature.update(dict.fromkeys(constants, "constexpr"))
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    built = triton.compile(ASTSource(kernel, signature, places), TARGET, {"enable_fp_fusion": False})
    return f"{kernel.__name__} {types} {constants}: {len(built.asm['cubin'])} bytes"


def main() -> None:
    for bits, sqrt, dtype, even in (
        (8, False, "bf16", True),
        (4, False, "fp32", True),
        (4, True, "fp32", False),
        (2, False, "fp16", True),
    ):
        shape = {"BITS": bits, "SQRT": sqrt, "PARTS": 8 // bits, "EVEN": even, "ROWS": 4, "BLOCK": 256, "n_digits": 1}
        for kernel in (triton_kernels._pack_rows, triton_kernels._unpack_rows):
            print(compiled(kernel, {"x": f"*{dtype}", "widths": "*u8", "starts": "*u8"}, shape))
    shape = {"BITS": 0, "SQRT": False, "PARTS": 4, "EVEN": False, "ROWS": 4, "BLOCK": 256}
    for kernel in (triton_kernels._pack_rows, triton_kernels._unpack_rows):
        print(compiled(kernel, {"x": "*fp32", "widths": "*i32", "starts": "*i64"}, shape))
    ones = {"n_rows": 1, "row": 1, "row_bytes": 1, "n_digits": 1}  # Triton makes a constant of each 1
    for kernel in (triton_kernels._pack_rows, triton_kernels._unpack_rows):
        print(compiled(kernel, {"x": "*fp32", "widths": "*i32", "starts": "*i64"}, {**shape, **ones}))


if __name__ == "__main__":
    main()
