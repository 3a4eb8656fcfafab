"""Compile every Triton kernel for sm_80 or sm_90 without a GPU: registers, stack, shared memory, loops.

    python tests/compile_kernels.py [80|90]   # a table; exit code 1 if one fails, spills or does not fit

The launchers of msa_kernel.py run as they are, forward and backward, on small CPU tensors of the real head
sizes; `compile_kernel` stands in for the GPU. A process of its own: Triton's interpreter and its compiler do
not go together.
"""
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import msa_kernel as K  # noqa: E402
import routing as R  # noqa: E402

SHARED = {80: 166912, 90: 232448}  # bytes of shared memory that one block may have: A100, H100
# H, G, D and the type of everything
SHAPES = {"Qwen3-4B": (32, 8, 128, torch.bfloat16), "demo": (4, 2, 32, torch.float32)}
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "i8",
         torch.int32: "i32", torch.int64: "i64", torch.bool: "i1"}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
ARCH = int(sys.argv[1]) if len(sys.argv) > 1 else 90


def cuobjdump(option, file):
    return subprocess.run([CUOBJDUMP, option, file], capture_output=True, text=True, check=True).stdout


def loop_instructions(sass):
    """Of the shortest loop that multiplies matrices; 0 where there is none."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*(\w{4,})\*/\s+(.*?);", sass)]
    jumps = [(int(to[1], 16), at) for at, text in code if (to := re.search(r"BRA.* 0x(\w+)", text))]
    loops = [[text for at, text in code if begins <= at <= ends] for begins, ends in jumps if begins < ends]
    products = lambda loop: any(re.search(r"\b[HI]G?MMA", text) for text in loop)
    return min(map(len, filter(products, loops)), default=0)


class Compiler:
    """Takes a kernel's place: `kernel[grid](*args)` compiles it for the card and notes what came out."""

    def __init__(self, kernel, rows):
        self.kernel, self.rows, self.label = kernel, rows, ""

    def __getitem__(self, grid):
        return self.compile_kernel

    def compile_kernel(self, *args, num_warps=4, num_stages=3, **constexprs):
        params = self.kernel.params
        values = dict(zip((p.name for p in params), args)) | constexprs
        constants = {(p.num,): values[p.name] for p in params if p.is_constexpr}
        signature, aligned = {}, {}
        for p in params:
            value = values[p.name]
            if p.is_constexpr:
                signature[p.name] = "constexpr"
            elif isinstance(value, torch.Tensor):
                signature[p.name], aligned[(p.num,)] = "*" + TYPES[value.dtype], [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[p.name] = "fp32"
            elif value == 1 and not p.do_not_specialize:  # as Triton specialises
                signature[p.name], constants[(p.num,)] = "constexpr", 1
            else:
                signature[p.name] = "i32"
                if value % 16 == 0 and not p.do_not_specialize:
                    aligned[(p.num,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature=signature, constexprs=constants, attrs=aligned)
        options = dict(num_warps=num_warps, num_stages=num_stages)
        built = triton.compile(source, target=GPUTarget("cuda", ARCH, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(built.asm["cubin"])
            file.flush()
            usage, sass = cuobjdump("-res-usage", file.name), ""
            tested = self.kernel.__name__ == "route_chunks" and signature["keys_ptr"] in ("*bf16", "*i8")
            if tested or "--json" not in sys.argv:  # it takes half a second
                sass = cuobjdump("-sass", file.name)
        number = lambda word: int(re.search(rf"{word}:(\d+)", usage)[1])
        tile = "x".join(str(value) for name, value in constexprs.items() if name.startswith("BLOCK"))
        row = dict(kernel=self.kernel.__name__, shape=self.label, arch=ARCH, registers=number("REG"),
                   stack=number("STACK"), local=number("LOCAL"), shared=built.metadata.shared,
                   shared_limit=SHARED[ARCH], loop=loop_instructions(sass), tile=tile,
                   keys=signature.get("keys_ptr", "*")[1:])
        if row not in self.rows:
            self.rows.append(row)


def launch_all(H, G, D, dtype):
    """Every launch that a training step and a question make, on tensors that nothing is computed from."""
    M, L, B, T, past, C = 4, 128, 2, 64, 32, 8
    new = lambda *shape: torch.randn(*shape, dtype=dtype, requires_grad=True)
    lengths, offsets = torch.full((M,), L), torch.arange(M + 1) * 2
    pooled = K.pool_chunks(new(M, L, G, D), new(M, L, G, D), new(M, L, G, D), lengths, 64)
    sum(x.sum() for x in pooled).backward()
    query, mask = torch.randn(B, T, G * D, requires_grad=True), torch.ones(B, T, dtype=torch.bool)
    R.route(query, mask, new(C, G, D), offsets).sum().backward()
    with torch.no_grad():
        for b, t in ((1, 1), (64, 1), (1, 32), (B, T), (1, 512)):
            asked = torch.randn(b, t, G * D), torch.ones(b, t, dtype=torch.bool)
            R.route(*asked, new(C, G, D), offsets)
            R.route(*asked, torch.ones(C, G, D, dtype=torch.int8), offsets, torch.ones(C))
    index, slots = torch.arange(C).expand(B, -1), torch.full((B,), C)
    local, memory = (new(B, T, G, D), new(B, T, G, D)), (new(C, G, D), new(C, G, D))
    for bias in (None, torch.zeros(B, C)):
        K.sparse_attention(new(B, T, H, D), *local, *memory, index, slots, 0, bias).sum().backward()
    with torch.no_grad():  # decoding: one token; and an appended text without a memory
        K.sparse_attention(new(B, 1, H, D), *local, *memory, index, slots)
        K.sparse_attention(new(B, past, H, D), *local)
        starts, rows = torch.full((B,), past), torch.arange(B)
        for t in (1, past):  # rows of many questions: a token each, and candidates that are named
            K.attend_split(new(B, t, H, D), *local, rows, starts, T, t, *memory, index, slots, 0, None, 4)


def script():
    K.KERNEL, rows = "triton", []
    launched = []
    for module in (K, R):
        for name, kernel in list(vars(module).items()):
            if isinstance(kernel, triton.JITFunction) and kernel.__doc__.startswith("Program"):
                launched.append(Compiler(kernel, rows))
                setattr(module, name, launched[-1])
    for label, shape in SHAPES.items():
        for compiler in launched:
            compiler.label = label
        launch_all(*shape)
    wrong = [row for row in rows if row["stack"] or row["local"] or row["shared"] > row["shared_limit"]]
    line = lambda r: (f"{r['kernel']:22} {r['shape']:9} sm_{r['arch']}  {r['keys']:4} {r['tile']:13} "
                      f"{r['registers']:3} registers, stack {r['stack']}, "
                      f"shared {r['shared']:6} of {r['shared_limit']}, loop {r['loop']:3} instructions"
                      f"{' <- too large' if r in wrong else ''}")
    print(json.dumps(rows) if "--json" in sys.argv else "\n".join(map(line, rows)))
    missing = {c.kernel.__name__ for c in launched} - {r["kernel"] for r in rows}
    if missing or wrong:
        failed = [(r["kernel"], r["shape"], r["arch"]) for r in wrong]
        sys.exit(f"never launched: {sorted(missing)}; spilled or too large: {failed}")


if __name__ == "__main__":
    script()
