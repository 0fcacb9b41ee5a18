"""The files that this project owns: typed, validated when read, versioned."""
