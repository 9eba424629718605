"""Request logs alone -> step prices."""
