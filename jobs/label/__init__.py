"""A local page on which people vote: keep or drop candidates, or which of two images of one prompt is better."""
