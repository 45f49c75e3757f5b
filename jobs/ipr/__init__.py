"""Iterative partial refinement (IPR, arXiv 2605.19317) of region-wise diffusion models, and its three benchmarks.

A sample is a grid of regions, each with a noise level of its own. IPR sets some regions of a finished sample back to
noise and draws them again among the others, over and over: no verifier, no further training.
"""

from pathlib import Path

#: Trained models that ship with the project: a folder a benchmark, model.safetensors and config.json in it.
WEIGHTS = Path(__file__).parent / "weights"
