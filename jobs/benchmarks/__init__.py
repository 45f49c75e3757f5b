"""Benchmarks of refinement on the embedded default: what evaluations are best spent on, and late-step models."""
