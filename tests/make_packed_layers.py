"""Write tests/packed_layers.safetensors: linear layers as autoawq, AutoGPTQ and gptqmodel pack them, with what they stand for.

    python tests/make_packed_layers.py FOLDER     # of the unpacked releases autoawq-0.2.9, auto_gptq-0.7.1 and gptqmodel-7.7.0

These packages do not install beside today's transformers, so their packing functions are taken out of their source files. In
the file `CASE.weight` is the library's own dequantisation, float16 [N, K], where it has one that runs on the CPU, else
(code - zero) * scale; the metadata holds the quantization_config of each case.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

INPUTS, OUTPUTS = 128, 32


def load_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def definition(path: Path, name: str, names: dict[str, Any]) -> Any:
    """The function or class `name` of a source file, alone, with these global names."""
    node = next(node for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name)
    if isinstance(node, ast.FunctionDef):
        node.decorator_list = []
    future = ast.parse("from __future__ import annotations").body
    exec(compile(ast.Module([*future, node], []), str(path), "exec"), names)
    return names[name]


def layer(bits: int, group: int, g_idx: Tensor, lowest_zero: int, bias: bool,
          seed: int) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    """A layer whose weights lie on the grid, and scales and zeros [N, G]."""
    gen = torch.Generator().manual_seed(seed)
    groups = INPUTS // group
    codes = torch.randint(0, 1 << bits, (OUTPUTS, INPUTS), generator=gen)
    zeros = torch.randint(lowest_zero, 1 << bits, (OUTPUTS, groups), generator=gen).float()
    scales = (torch.rand(OUTPUTS, groups, generator=gen) * 0.01 + 0.005).half()
    linear = nn.Linear(INPUTS, OUTPUTS, bias=bias)
    with torch.no_grad():
        linear.weight.copy_((codes - zeros[:, g_idx]) * scales.float()[:, g_idx])
        if bias:
            linear.bias.copy_(torch.randn(OUTPUTS, generator=gen).half())
    return linear, scales, zeros, linear.weight.detach().clone()


def main(folder: Path) -> None:
    tensors: dict[str, Tensor] = {}
    configs: dict[str, dict[str, Any]] = {}

    def add(case: str, config: dict[str, Any], packed: Any, weight: Tensor) -> None:
        names = [name for name in ("qweight", "qzeros", "scales", "g_idx", "bias") if getattr(packed, name, None) is not None]
        tensors.update({f"{case}.{name}": getattr(packed, name).detach().clone().contiguous() for name in names})
        tensors[f"{case}.scales"] = tensors[f"{case}.scales"].half()
        tensors[f"{case}.weight"] = weight.detach().half().contiguous()
        configs[case] = config

    awq = folder / "autoawq-0.2.9/awq"
    gemm = definition(awq / "modules/linear/gemm.py", "WQLinear_GEMM",
                      {"torch": torch, "nn": nn, "get_best_device": lambda: "cpu"})
    unpack = load_file(awq / "utils/packing_utils.py").dequantize_gemm
    for group, bias in ((32, False), (64, True), (128, False)):
        linear, scales, zeros, _ = layer(4, group, torch.arange(INPUTS) // group, 0, bias, group)
        packed = gemm.from_linear(linear.half(), 4, group, scales=scales.t().contiguous(), zeros=zeros.t().contiguous())
        config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
        add(f"awq-{group}", config, packed, unpack(packed.qweight, packed.qzeros, packed.scales, 4, group).t())

    auto = load_file(folder / "auto_gptq-0.7.1/auto_gptq/nn_modules/qlinear/qlinear_cuda.py").QuantLinear
    shuffled = torch.randperm(INPUTS, generator=torch.Generator().manual_seed(9)) // 32
    for bits, group, sym, ordered in ((4, 32, True, False), (4, 32, False, True), (4, 128, False, False), (8, 32, False, False),
                                      (8, -1, True, False), (4, -1, False, False)):
        size = INPUTS if group == -1 else group
        g_idx = (shuffled if ordered else torch.arange(INPUTS) // size).int()
        linear, scales, zeros, weight = layer(bits, size, g_idx.long(), 1, ordered, bits + group)
        if sym:
            zeros = torch.full_like(zeros, 1 << (bits - 1))
            linear.weight.data = weight.clamp(-7 * 0.005, 7 * 0.005)        # inside every group's range
        packed = auto(bits, size, INPUTS, OUTPUTS, bias=ordered, weight_dtype=torch.float32)
        packed.pack(linear, scales.float(), zeros.clone(), g_idx)
        identity = packed(torch.eye(INPUTS)) - (packed.bias if ordered else 0)
        add(f"gptq-{bits}-{group}{'-sym' if sym else ''}{'-ordered' if ordered else ''}",
            {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": sym, "desc_act": ordered}, packed, identity.t())

    source = folder / "gptqmodel-7.7.0/gptqmodel"
    names = {"t": torch, "np": np, "nn": nn, "math": __import__("math"), "transformers": __import__("transformers"),
             "_ConvNd": nn.modules.conv._ConvNd, "THREADPOOLCTL": SimpleNamespace(threadpool_limits=lambda n: torch.no_grad())}
    pack = definition(source / "nn_modules/qlinear/__init__.py", "pack_original", names)
    to_v1 = definition(source / "utils/model.py", "convert_gptq_v2_to_v1_format_module",
                       {"torch": torch, "log": SimpleNamespace(info=SimpleNamespace(once=print)), "BaseQuantLinear": object})
    for bits in (4, 8):
        g_idx = torch.arange(INPUTS) // 32
        linear, scales, zeros, weight = layer(bits, 32, g_idx, 0, False, 40 + bits)
        zeros[:, 0] = 0                                     # what v1 stores as a borrow
        weight = torch.round(weight / scales.float()[:, g_idx] + zeros[:, g_idx]).clamp(0, (1 << bits) - 1)
        weight = (weight - zeros[:, g_idx]) * scales.float()[:, g_idx]
        for version in ("gptq_v2", "gptq"):
            packed = nn.Module()
            packed.bits, packed.maxq, packed.planar, packed.g_idx = bits, (1 << bits) - 1, False, None
            packed.pack_dtype, packed.pack_dtype_bits, packed.pack_factor = torch.int32, 32, 32 // bits
            packed.pack_np_dtype, packed.pack_np_math_dtype = np.int32, np.uint32
            packed.qzero_format = lambda format: None
            del packed.g_idx
            pack(packed, linear, scales.float(), zeros, g_idx.int())
            if version == "gptq":
                to_v1(packed, packed)
            add(f"gptqmodel-{bits}-{version}", {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": False,
                                                "checkpoint_format": version}, packed, weight)

    save_file(tensors, Path(__file__).with_name("packed_layers.safetensors"), {"configs": json.dumps(configs)})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
