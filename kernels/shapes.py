"""Sizes of launches, on the host. triton.cdiv and triton.next_power_of_2 may also be called by kernels, and take 20 times as long
for it: together a fifth of what it took to launch a step of a small model."""


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is n or more, for n of 1 or more."""
    return 1 << (n - 1).bit_length()
