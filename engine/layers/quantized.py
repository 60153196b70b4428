"""Which LinearMethod a model's layers get: the one place that looks at how weights are stored."""

from __future__ import annotations

import torch

from engine.layers.fp8 import Fp8BlockMethod, Fp8Method, OnlineFp8Method
from engine.layers.gguf import GgufMethod
from engine.layers.integer import AwqMethod, GptqMethod, PackedMethod
from engine.layers.linear import DenseMethod, LinearMethod, MethodOf
from engine.models.errors import ModelError
from engine.models.quantization import Awq, Fp8, Gguf, Gptq, Packed, Scheme
from engine.models.spec import ModelSpec


def linear_methods(spec: ModelSpec, quantization: str, device: torch.device) -> MethodOf:
    """What a layer's LinearMethod is, by its name in the checkpoint. Raises ModelError.

    quantization: "stored": as the checkpoint has it, but that GGUF's blocks are unpacked at load on the CPU, where doing so on
    every step would be slow; "dense": GGUF's blocks are unpacked at load; "fp8": plain weights and GGUF's become FP8 at load.
    """
    stored = spec.quantization
    if stored is None or stored.method == "gguf":
        if quantization == "fp8":
            return lambda name: OnlineFp8Method()
        if stored is None or quantization == "dense" or device.type == "cpu":
            return lambda name: DenseMethod()
    elif quantization != "stored" and quantization != stored.method:
        raise ModelError(f"engine.quantization={quantization} needs plain weights, and the model's are {stored.method}: take the "
                         "model before it was quantised, or leave engine.quantization at stored")
    return lambda name: _method(stored.scheme(name))


def _method(scheme: Scheme | None) -> LinearMethod:
    match scheme:
        case None:
            return DenseMethod()
        case Awq():
            return AwqMethod(4, scheme)
        case Gptq():
            return GptqMethod(scheme.bits, scheme)
        case Packed():
            return PackedMethod(scheme.bits, scheme)
        case Fp8(granularity="block"):
            return Fp8BlockMethod(scheme)
        case Fp8():
            return Fp8Method(scheme)
        case Gguf():
            return GgufMethod.of(scheme.kind)
