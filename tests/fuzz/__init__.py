"""Hostile bytes and messages, made from real ones: `make fuzz N=1000000`."""
