"""Take generated Triton kernels out of Inductor's source text, import them, compile them for a target without it."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import uuid
from dataclasses import dataclass
from pathlib import Path


def kernel_sources(code: str) -> dict[str, str]:
    """The generated Triton kernels of a source text by name, in order."""
    return dict(re.findall(r"async_compile\.triton\('(\w+)', '''\n(.*?)''', device_str", code, re.DOTALL))


def definition(source: str) -> str:
    """The @triton.jit function of a kernel's source."""
    return source[source.index("@triton.jit") :]


def constexpr_parameters(source: str) -> list[str]:
    """Block sizes that the launch of a kernel must give."""
    head = re.search(r"def \w+\((.*?)\):\n", definition(source), re.DOTALL).group(1)
    return re.findall(r"(\w+) ?: tl\.constexpr", head)


def fixed_config(source: str) -> dict[str, int]:
    """The config that a kernel's source was generated for, if it serves no other."""
    found = re.search(r"@triton_heuristics\.fixed_config\(\s*config=(\{.*?\})", source)
    return ast.literal_eval(found[1]) if found else {}


def import_kernel(source: str, folder: Path):
    """The @triton.jit function of a kernel's source, from a fresh module."""
    lines = [
        "import triton",
        "import triton.language as tl",
        "from torch._inductor.runtime import triton_helpers",
        "from torch._inductor.runtime.triton_helpers import libdevice, math as tl_math",
        *re.findall(r"^from qs_compiler.*$", source, re.MULTILINE),
        definition(source),
    ]
    path = folder / f"kernel_{uuid.uuid4().hex}.py"
    path.write_text("\n".join(lines))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, re.search(r"def (\w+)\(", definition(source)).group(1))


@dataclass(frozen=True)
class Compiled:
    """What the offline compiler says about a kernel."""

    ttgir: str  # Triton's last form before LLVM's
    ptx: str
    shared_memory: int  # bytes a program
    spilled_bytes: int  # a thread
    registers: int  # a thread


def compile_offline(source: str, folder: Path, capability: tuple[int, int], x_block: int = 1) -> Compiled:
    """Compile a kernel for a compute capability, without a GPU; `x_block` rows of a reduction a program."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = re.search(r"'signature': \{(.*?)\}", source).group(1)
    signature = dict(re.findall(r"'(\w+)': '([^']+)'", types))
    config = fixed_config(source)
    blocks = {name: {"XBLOCK": x_block, **config}.get(name, 128) for name in constexpr_parameters(source)}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    options = {
        name: int(value) for name, value in re.findall(r"^\s*(num_warps|num_stages)=(\d+)", source, re.MULTILINE)
    } | {name: config[name] for name in ("num_warps", "num_stages") if name in config}
    compiled = triton.compile(
        ASTSource(import_kernel(source, folder), signature, blocks, aligned),
        target=GPUTarget("cuda", capability[0] * 10 + capability[1], 32),
        options=options,
    )
    texts = compiled.asm["ttgir"], compiled.asm["ptx"]
    return Compiled(*texts, compiled.metadata.shared, *resources(compiled.asm["cubin"], folder))


def check_specialized_warps(compiled: Compiled, operands: int, stages: int) -> None:
    """What device.py's retire_barriers and own_coordinate say of Triton 3.6 still holds of this kernel.

    operands: bytes of shared memory that its loads fill.
    """
    start, rest = compiled.ptx.split("barrier.sync", 1)  # barriers are made, then the groups of warps part
    assert "mbarrier.init" not in rest
    address, below = {}, set()
    for line in start.splitlines():
        if found := re.search(r"mov\.b32\s+(%r\d+), global_smem;", line):
            address[found[1]] = 0
        elif (found := re.search(r"add\.s32\s+(%r\d+), (%r\d+), (\d+);", line)) and found[2] in address:
            address[found[1]] = address[found[2]] + int(found[3])
        elif found := re.search(r"mbarrier\.init\S* \[(%r\d+)\]", line):
            below.add(address[found[1]])
    assert {place for place in below if place < operands} == {8 * i for i in range(stages)}  # all that are invalidated
    loads = rest.split("cp.async.bulk.tensor", 1)[0]
    assert loads.count("mbarrier.inval") == stages
    # The second group's rows start at 64 by tl.arange; the 64 of its loads are not added once more.
    second = compiled.ttgir[compiled.ttgir.index("partition1(") :]
    assert re.search(r"make_range \{.*end = 128 : i32, start = 64 : i32", second)
    assert re.search(r"arith\.addi %\w+, %c64_i32", second) is None


def resources(cubin: bytes, folder: Path) -> tuple[int, int]:
    """Bytes of local memory and registers of a thread of a cubin's kernel, as Triton's disassembler reports them."""
    import triton

    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    report = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    stack, local, registers = (int(re.search(rf"{key}:(\d+)", report).group(1)) for key in ("STACK", "LOCAL", "REG"))
    return stack + local, registers
