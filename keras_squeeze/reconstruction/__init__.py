"""Corrections of a compressed model without training."""
