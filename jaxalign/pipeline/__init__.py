"""Stages, and one file for each command."""
