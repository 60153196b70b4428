"""What the kernels and the readers of checkpoints must agree on. Without torch, so that a config can be checked alone."""

from __future__ import annotations

FP8_BLOCK = 128     # side of the blocks of e4m3 weights that share a scale, and as many inputs of a token do
