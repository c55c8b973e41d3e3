"""Quantization-aware training: weights and activations are rounded to a grid while the model learns."""
