"""Benchmarks: ratios of ours to another way of doing the same, both measured in one run. ``make bench`` runs them."""
