"""What a multimodal checkpoint calls the layers of its language model, and a plain decoder, and so the code here, calls them."""

from __future__ import annotations

_PREFIXES = (("language_model.model.", "model."), ("model.language_model.", "model."), ("language_model.lm_head", "lm_head"))


def text_name(stored: str) -> str | None:
    """A multimodal checkpoint's name as a plain decoder's; None for vision towers and projectors."""
    for prefix, plain in _PREFIXES:
        if stored.startswith(prefix):
            return plain + stored.removeprefix(prefix)
    return stored if stored.startswith("lm_head.") else None


def stored_names(name: str) -> list[str]:
    """All names that a multimodal checkpoint, or its config, may have for a plain decoder's `name`, and that itself."""
    return [name, *(prefix + name.removeprefix(plain) for prefix, plain in _PREFIXES if name.startswith(plain))]
