"""Files to rows; numpy only."""
