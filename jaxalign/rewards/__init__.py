"""Rewards: reward models, reward functions, and how scores are combined and shaped."""
