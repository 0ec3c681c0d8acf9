"""Describes modules; imports jax and flax only."""
