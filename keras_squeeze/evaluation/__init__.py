"""Measurements and advice: latency, comparisons, sensitivity of layers."""
