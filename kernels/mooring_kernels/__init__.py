"""Flat-arena LoRA algebra: one folder per operator, each with the reference that specifies it."""
