"""Which simulated layer causes how much of an end-to-end error."""
