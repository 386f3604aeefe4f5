"""What a configuration needs of a machine that need not be there, by its compiled programs."""
