"""`kvtwin validate LEVEL`, a file per level."""
