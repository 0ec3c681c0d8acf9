"""Weights from elsewhere and for elsewhere: rename tables used in both directions, and proofs."""
