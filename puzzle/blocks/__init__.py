"""Variants as modules: starting points, the library on disk, and block-wise distillation."""
