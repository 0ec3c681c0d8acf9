"""Fused operations: one selector, one reference each; imports jax only."""
