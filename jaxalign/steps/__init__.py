"""Objectives and the one train step."""
