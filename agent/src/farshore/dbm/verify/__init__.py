"""Verification: whether source, index and replica still say the same, found out by digests."""
