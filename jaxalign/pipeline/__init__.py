"""Stages, and the commands."""
