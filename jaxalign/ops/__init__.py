"""Pure array functions: attention, losses, estimators, readouts."""
