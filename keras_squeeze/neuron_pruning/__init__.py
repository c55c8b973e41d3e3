"""Neuron pruning: which neurons become zero, and their removal."""
