"""What `peers.py` is made of: cases, data, environments, rounds, tables."""
