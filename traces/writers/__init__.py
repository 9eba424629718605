"""Writers of formats of other tools: one file each."""
