"""The HTML pages: of one target, of all targets; drawn from checks.json and figures.json alone."""
