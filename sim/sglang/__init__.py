"""SGLang: its scheduler, its loops and its caches, decision for decision."""
