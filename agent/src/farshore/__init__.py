"""Farshore's runtime: replicate, watch, switch over, and bring home."""

__version__ = "0.1.0"
