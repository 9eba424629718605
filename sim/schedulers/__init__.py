"""Who runs at each step: one file per engine, each naming the upstream version it follows."""
