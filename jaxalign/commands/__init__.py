"""The commands: flags to calls, and nothing else."""
