"""Recipes: plans of compression steps that are written down and run."""
