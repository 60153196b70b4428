"""From a checkpoint to a quantised model folder, one block at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.layers.embedding import Embedding
from engine.layers.linear import DenseMethod, Linear
from engine.layers.norm import RMSNorm
from engine.models.decoder import Block
from engine.models.quantization import Quantization
from engine.models.spec import ModelError, ModelSpec
from engine.quantize.calibrate import Calibration
from engine.quantize.folder import FolderWriter, write_config
from engine.quantize.methods import Method, Rounded
from engine.weights import Checkpoint


@torch.inference_mode()
def quantize(checkpoint: Checkpoint, method: Method, sequences: Sequence[np.ndarray], folder: Path, device: torch.device,
             dtype: str | None = None, progress: Callable[[int, float | None], None] = lambda block, error: None) -> None:
    """Write the model of `checkpoint`, rounded by `method`, into `folder`: safetensors and config.json, but no tokenizer.

    sequences: the calibration set, int32 [tokens] each. dtype: of the tensors that are not rounded; None: the method's choice.
    progress: called after each block with its number and the mean relative error of its layers' outputs, None where not known.
    Raises ValueError, one line: a model that is quantised already or does not fit the method, or too little data.
    """
    spec = checkpoint.spec
    check(spec, method, dtype)
    if method.needs_data and not sequences:
        raise ModelError("this method needs calibration data, and there is none")
    stored = getattr(torch, dtype or stored_dtype(spec, method))
    running = running_dtype(spec, device)

    def load(module: torch.nn.Module) -> None:
        for part in module.modules():
            if isinstance(part, (Embedding, Linear, RMSNorm)):
                part.load(checkpoint)

    writer = FolderWriter(folder)
    calibration = None
    if method.needs_data:
        with torch.device(device):
            embedding = Embedding(spec.vocab_size, spec.hidden_size, "model.embed_tokens", scale=spec.embed_scale, dtype=running)
        load(embedding)
        calibration = Calibration(spec, sequences, embedding)
        del embedding

    def gather(layers, make):
        assert calibration is not None, "asked for inputs by a method that said it needs no data"
        return calibration.gather(block, index, layers, make)

    outside = ["model.embed_tokens.weight", "model.norm.weight", *([] if spec.tied_embeddings else ["lm_head.weight"])]
    for name in outside:
        writer.add(name, checkpoint.tensor(name).to(stored))
    for index in range(spec.num_layers):
        with torch.device(device):
            block = Block(spec, index, lambda name: DenseMethod(), running)
        load(block)
        rounded = method.round_block(block, gather)
        for name, tensor in _tensors(block, method, rounded, stored):
            writer.add(name, tensor)
        if calibration is not None and index + 1 < spec.num_layers:
            calibration.advance(block, index)
        errors = [item.error for item in rounded if item.error is not None]
        progress(index, sum(errors) / len(errors) if errors else None)
    writer.finish()
    write_config(checkpoint, method.config(), str(stored).removeprefix("torch."), folder)


def check(spec: ModelSpec, method: Method, dtype: str | None = None) -> None:
    """Raise ModelError where a model cannot be quantised by this method, whatever its weights, or the rest stored in `dtype`."""
    if dtype == "float16" and not spec.fits_float16:
        raise ModelError(f"dtype=float16: {spec.family}'s hidden states leave its range, and engines run a model in what it is "
                         "stored in; set auto, or bfloat16")
    if spec.quantization is not None and spec.quantization.method != "gguf":     # GGUF's blocks are unpacked when they are read
        raise ModelError(f"the model is quantised already ({spec.quantization.method}): give the one that it was made of")
    Quantization.read(method.config()).check(spec.linears())


def stored_dtype(spec: ModelSpec, method: Method) -> str:
    """Of what is not rounded: engines run the model in it."""
    dtype = method.dtype or spec.dtype
    return "bfloat16" if dtype == "float16" and not spec.fits_float16 else dtype


def running_dtype(spec: ModelSpec, device: torch.device) -> torch.dtype:
    """What the blocks are run in: float32 on the CPU, where 16 bits are slow."""
    if device.type == "cpu":
        return torch.float32
    return torch.float16 if spec.dtype == "float16" and spec.fits_float16 else torch.bfloat16


def _tensors(block: Block, method: Method, rounded: Sequence[Rounded], stored: torch.dtype) -> list[tuple[str, Tensor]]:
    """The block's tensors by their names in a checkpoint."""
    tensors = [(f"{norm.source}.weight", norm.weight.to(stored)) for norm in block.modules() if isinstance(norm, RMSNorm)]
    for item in rounded:
        start = 0
        for source, width in item.linear.sources:
            tensors += [(f"{source}.{kind}", tensor) for kind, tensor in method.pack(item.weight.rows(start, width)).items()]
            if item.linear.bias is not None:
                tensors.append((f"{source}.bias", item.linear.bias[start:start + width].to(stored)))
            start += width
    return tensors
