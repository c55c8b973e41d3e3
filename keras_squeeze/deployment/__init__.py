"""Deployment: the files that ship."""
