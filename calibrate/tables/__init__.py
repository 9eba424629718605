"""Tables of operator and step times to profiles: candidates, hold-out, choice, scaling to unseen hardware."""
