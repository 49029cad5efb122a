"""Farshore beside its peers, on the same machine, in the same minute: ``python -m bench --help``."""
