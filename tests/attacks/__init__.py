"""Programs that make hostile files, each with a sentence on what stops it."""
