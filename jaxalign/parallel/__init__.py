"""Mesh, shardings, processes."""
